"""How kernels are compiled: without the GIL, without bounds checks, cached across processes and never stale."""

import hashlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core import config
from numba.core.caching import FunctionCache

HERE = Path(__file__).parent
PURE_PYTHON = bool(vars(config)["DISABLE_JIT"])  # NUMBA_DISABLE_JIT=1: kernels are what they look like


@cache
def engine_fingerprint() -> str:
    """Return the SHA-256 of every source file of the engine.

    Numba's own cache notices an edit of the file that a kernel stands in, not of the files whose functions were
    compiled into it; with this as a part of the key no kernel outlives an edit anywhere in the engine.
    """
    digest = hashlib.sha256()
    for path in sorted(HERE.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


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
    fingerprint: str | None = None,
) -> Any:
    """Compile a function for the engine; usable as ``@kernel`` or ``@kernel(signature=...)``.

    With a signature it is compiled (or fetched from the cache) at once, and never for other types. Division by zero
    follows IEEE 754 and array bounds are not checked: what goes in was checked before. Where no folder can be
    written the kernel works uncached.

    ``inline`` kernels become a part of their caller and count no references to arrays, so they may not make any: with
    calls and counts, the replay of a layer at batch 1 took 9 times as long, passing the state's arrays around.
    """
    if function is None:
        return lambda f: kernel(f, signature=signature, inline=inline, fingerprint=fingerprint)
    options = {"nogil": True, "error_model": "numpy", "_nrt": not inline, "forceinline": inline and signature is None}
    dispatcher: Any = numba.njit(**options)(function)
    if PURE_PYTHON:
        return dispatcher
    try:
        dispatcher._cache = _FingerprintCache(function, fingerprint or engine_fingerprint())
    except RuntimeError as error:
        print(f"moetrace: compiled code is not kept between runs: {error}", file=sys.stderr)
    if signature is not None:
        dispatcher.compile(signature)
        dispatcher.disable_compile()
    return dispatcher
