"""Numba's dispatchers as kernels need them. Numba is imported when the first one is made."""

from collections.abc import Callable
from functools import cache
from typing import Any

from moetrace.jit.announce import announced
from moetrace.jit.apart import heard
from moetrace.jit.no_collection import no_collection


def entry(function: Callable, options: dict[str, Any]) -> Any:
    """Return the dispatcher of a kernel that Python calls; it compiles where signals still work."""
    import numba
    from numba.core.compiler_lock import global_compiler_lock

    dispatcher: Any = numba.njit(**options, **_pipelines()[0])(function)
    compile_here, typeof = dispatcher.compile, dispatcher.typeof_pyval
    if options.get("boundscheck"):
        compile_here = _checked(compile_here)

    def compile_it(sig: Any) -> Any:
        # Without searches for cycles a first replay compiles in four fifths of the time, with 0.57 for 0.39 GB.
        with announced(), no_collection():
            return heard(compile_here, sig)

    def typeof_alone(value: Any) -> Any:
        # Numba goes through its table of types here, to which the first compilation, in another thread, adds some.
        with global_compiler_lock:
            return typeof(value)

    dispatcher.compile, dispatcher.typeof_pyval = compile_it, typeof_alone
    return dispatcher


def _checked(compile_here: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let functions that are compiled on the way check array bounds, too: those that a user's function calls."""
    import numba.core.config
    from numba.core.compiler_lock import global_compiler_lock

    config: Any = numba.core.config

    def compile_it(sig: Any) -> Any:
        with global_compiler_lock:  # nobody else compiles meanwhile
            before, config.BOUNDSCHECK = config.BOUNDSCHECK, 1
            try:
                return compile_here(sig)
            finally:
                config.BOUNDSCHECK = before

    return compile_it


def settle(dispatcher: Any) -> None:
    """Let a dispatcher that kernels are given compile no more, and say at once where its code lies.

    Numba looks that up, by hashes of all types, in each call of the kernel: 0.5 ms for the hooks of a block.
    """
    dispatcher.disable_compile()
    ((types_of, compiled),) = dispatcher.overloads.items()
    look_up, library = dispatcher.get_compile_result, compiled.library
    dispatcher.get_compile_result = lambda sig: compiled if sig.args == types_of else look_up(sig)
    library.get_pointer_to_function = cache(library.get_pointer_to_function)


def part(function: Callable, options: dict[str, Any]) -> Any:
    """Return the dispatcher of a kernel where another one names it, for which a constant is a number like any other.

    Numba compiles a function once for each constant that it is called with, and once more for numbers.
    """
    import numba
    from numba import types

    options = options | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True} | _pipelines()[1]
    dispatcher: Any = numba.njit(**options)(function)
    with_constants = dispatcher.get_call_template
    dispatcher.get_call_template = lambda args, kws: with_constants(tuple(map(types.unliteral, args)), kws)
    return dispatcher


@cache
def _pipelines() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return options that compile less, for entries and for parts; none where Numba is not as we know it."""
    import moetrace.jit.read_only  # noqa: F401  what it overloads, kernels may name

    try:
        from moetrace.jit.pipeline import EntryCompiler, PartCompiler
    except ImportError:
        return {}, {}
    return {"pipeline_class": EntryCompiler}, {"pipeline_class": PartCompiler}
