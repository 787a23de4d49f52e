"""Numba's dispatchers as kernels need them, and their cache. Numba is imported when the first one is made."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any


def entry(function: Callable, options: dict[str, Any]) -> Any:
    """Return the dispatcher of a kernel that Python calls."""
    import numba

    return numba.njit(**options, **_pipelines()[0])(function)


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
    try:
        from moetrace.jit.pipeline import EntryCompiler, PartCompiler
    except ImportError:
        return {}, {}
    return {"pipeline_class": EntryCompiler}, {"pipeline_class": PartCompiler}


def cache_of(function: Callable, fingerprint: str) -> Any:
    """Return Numba's cache for a function, with the fingerprint as a part of what makes an entry stale.

    Raises RuntimeError where no folder can be written.
    """
    found = _cache_class()(function)
    found._cache_file._source_stamp = (found._cache_file._source_stamp, fingerprint)
    return found


@cache
def _cache_class() -> Any:
    from numba.core.caching import FunctionCache

    class KernelCache(FunctionCache):
        """Numba's cache, which takes a named tuple for the same as long as its class has the same name."""

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            """Find what was compiled; None if nothing was, or for named tuples whose class has another name now.

            Numba unpickles the types of all that is in a file before it looks at the stamp.
            """
            try:
                return super().load_overload(sig, target_context)
            except (AttributeError, ImportError):
                self.flush()
                return None

        def _index_key(self, sig: Any, codegen: Any) -> Any:
            """Add the names of the fields: compiled code knows of their order only."""
            return (*super()._index_key(sig, codegen), tuple(_fields(getattr(sig, "args", sig))))

    return KernelCache


def _fields(types: Any) -> Iterator[tuple[str, ...]]:
    """Yield the names of the fields of all named tuples among types, and in them."""
    for each in types:
        if isinstance(fields := getattr(each, "fields", None), tuple):
            yield fields
        inner = getattr(each, "types", None) or getattr(getattr(each, "signature", None), "args", ())
        if isinstance(inner, tuple):
            yield from _fields(inner)
