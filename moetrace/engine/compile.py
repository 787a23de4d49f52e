"""How kernels are compiled: without the GIL, without bounds checks, cached across processes and never stale."""

import hashlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

HERE = Path(__file__).parent


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
    allocates: bool = False,
    fingerprint: str | None = None,
) -> Any:
    """Compile a function for the engine; usable as ``@kernel`` or ``@kernel(signature=...)``.

    With a signature it is compiled (or fetched from the cache) at once, and never for other types. Division by zero
    follows IEEE 754 and array bounds are not checked: what goes in was checked before. Where no folder can be
    written the kernel works uncached.
    """
    if function is None:
        return lambda f: kernel(f, signature=signature, allocates=allocates, fingerprint=fingerprint)
    dispatcher = numba.njit(nogil=True, error_model="numpy", _nrt=allocates, forceinline=signature is None and not allocates)(function)
    if numba.config.DISABLE_JIT:
        return dispatcher
    try:
        dispatcher._cache = _FingerprintCache(function, fingerprint or engine_fingerprint())
    except RuntimeError as error:
        print(f"moetrace: compiled code is not kept between runs: {error}", file=sys.stderr)
    if signature is not None:
        dispatcher.compile(signature)
        dispatcher.disable_compile()
    return dispatcher
