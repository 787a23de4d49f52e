"""How kernels are compiled: without the GIL, without bounds checks, cached across processes and never stale."""

import contextlib
from collections.abc import Callable
from typing import Any

import numba
from numba.core import config
from numba.core.caching import FunctionCache

from moetrace.engine.fingerprint import fingerprint_beside

PURE_PYTHON = bool(vars(config)["DISABLE_JIT"])  # NUMBA_DISABLE_JIT=1: kernels are what they look like


class _FingerprintCache(FunctionCache):
    """Numba's function cache with a fingerprint added to what makes an entry stale."""

    def __init__(self, function: Callable, fingerprint: str):
        super().__init__(function)
        self._cache_file._source_stamp = (self._cache_file._source_stamp, fingerprint)


def kernel(
    function: Callable | None = None,
    *,
    signature: Any = None,
    inline: bool = True,
    checked: bool = False,
    fingerprint: str | None = "",
) -> Any:
    """Compile a function for the engine; usable as ``@kernel`` or ``@kernel(signature=...)``.

    With a signature it is compiled (or fetched from the cache) at once, and never for other types. Division by zero
    follows IEEE 754 and array bounds are not checked: what goes in was checked before. Where no folder can be
    written the kernel works uncached.

    ``inline`` kernels become a part of their caller and count no references to arrays, so they may not make any: with
    calls and counts, the replay of a layer at batch 1 took 9 times as long, passing the state's arrays around.
    """
    if function is None:
        return lambda f: kernel(f, signature=signature, inline=inline)
    options = {"nogil": True, "error_model": "numpy", "_nrt": not inline, "boundscheck": checked}
    options["forceinline"] = inline and signature is None
    dispatcher: Any = numba.njit(**options)(function)
    if PURE_PYTHON:
        return dispatcher
    if fingerprint is not None:
        with contextlib.suppress(RuntimeError):  # no folder can be written
            dispatcher._cache = _FingerprintCache(function, fingerprint or fingerprint_beside(function))
    if signature is not None:
        dispatcher.compile(signature)
        dispatcher.disable_compile()
    return dispatcher
