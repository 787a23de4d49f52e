"""How Numba is made to compile less: its work for each function is done once for each kernel.

Numba optimizes each function that a kernel calls, and emits its machine code, before it links the function into the
caller, where it is optimized again: once a level. Nobody calls these from Python, so all of that is waste: it took
10 of the 31 s that a first replay compiled for. A kernel within a kernel is a *part* here: translated, and left to its
caller to be optimized.
"""

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, Flags
from numba.core.compiler_machinery import LoweringPass, register_pass
from numba.core.targetconfig import TargetConfig
from numba.core.typed_passes import InlineOverloads, IRLegalization, NopythonRewrites
from numba.core.untyped_passes import InlineClosureLikes, InlineInlinables

_STEPS = ("_optimize_functions", "_optimize_final_module", "_finalize_dynamic_globals", "_finalize_final_module")
if not all(hasattr(JITCodeLibrary, step) for step in _STEPS) or not hasattr(Flags(), "_values"):
    raise ImportError("this Numba makes its libraries in other steps: kernels compile as it has them")


class _NoEnvironments:
    """Stands for a code generator where the only thing asked of it is to remember a function's environment.

    Environments are for code that holds Python objects, which kernels don't.
    """

    def set_env(self, name: str, env: Any) -> None:
        """Forget it."""


class _PartLibrary(JITCodeLibrary):
    """Code to link into other libraries, as it comes from Numba."""

    codegen: Any = _NoEnvironments()  # type: ignore[assignment]

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """Say, by a 0, that there is no machine code; the library is complete all the same."""
        self._ensure_finalized()
        return 0


@register_pass(mutates_CFG=False, analysis_only=False)
class _UsePartLibrary(LoweringPass):
    """Let the lowering that follows put its code into a `_PartLibrary`."""

    _name = "moetrace_use_part_library"

    def __init__(self) -> None:
        super().__init__()

    def run_pass(self, state: Any) -> Any:
        """Set the library that the lowering fills."""
        state.library = _PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return True


class _QuickFlags(Flags):
    """Numba's flags, compared as they are set; they are a part of every look-up of a function's implementation.

    Numba lists all 25 options with their values each time, to hash and to compare: a tenth of the compilation.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return _HASH_OF_FLAGS

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TargetConfig) and self._values == other._values:
            return True
        return super().__eq__(other)


# They look for closures and for arithmetic with whole arrays: a twentieth of a first replay's compilation.
_FOR_OTHERS = (InlineClosureLikes, InlineInlinables, InlineOverloads, NopythonRewrites)
_HASH_OF_FLAGS = hash(Flags())  # it is of the options' names, so the same for all


class EntryCompiler(Compiler):
    """Numba's pipeline, for kernels that Python calls."""

    def __init__(
        self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Flags, locals: Any
    ) -> None:
        super().__init__(typingctx, targetctx, library, args, return_type, _QuickFlags(flags), locals)

    def define_pipelines(self) -> list[Any]:
        """Return the passes; those for what kernels have none of are left to users' functions."""
        pipelines = super().define_pipelines()
        if not self.state.flags.boundscheck:
            for pipeline in pipelines:
                pipeline.passes = [each for each in pipeline.passes if each[0] not in _FOR_OTHERS]
        return pipelines


class PartCompiler(EntryCompiler):
    """The same for parts, except for the library that gets their code."""

    def define_pipelines(self) -> list[Any]:
        """Return the passes."""
        (pipeline,) = super().define_pipelines()
        pipeline.add_pass_after(_UsePartLibrary, IRLegalization)
        pipeline.finalize()
        return [pipeline]
