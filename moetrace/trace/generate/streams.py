"""Counter-based random numbers: each (seed, request, position, layer) has its own SplitMix64 stream.

So neither the size of blocks nor the batch changes what a row draws (SplitMix64: Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import config, njit
from numba.core.caching import FunctionCache

from moetrace.spec.errors import UsageError
from moetrace.trace.schema import expert_dtype

MAX_SEED = 2**63 - 1

# Numba turns uint64 with a plain integer into float64, so every constant of the arithmetic below is typed.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1 = np.uint64(0xBF58476D1CE4E5B9)
_FACTOR_2 = np.uint64(0x94D049BB133111EB)
_27, _30, _31, SHIFT_32, SHIFT_11 = (np.uint64(bits) for bits in (27, 30, 31, 32, 11))
LOW_32 = np.uint64(0xFFFFFFFF)


def mix_64(z):
    """SplitMix64's output function, of uint64 numbers or arrays."""
    z = (z ^ (z >> _30)) * _FACTOR_1
    z = (z ^ (z >> _27)) * _FACTOR_2
    return z ^ (z >> _31)


@cache
def _fingerprint() -> str:
    """SHA-256 of every source file of this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


class _FolderCache(FunctionCache):
    """Numba's function cache, which notices an edit of a kernel's own file alone, made to notice those beside it.

    As in moetrace.engine.compile, which nothing here may import.
    """

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = (self._cache_file._source_stamp, _fingerprint())


def kernel(function: Callable) -> Any:
    """Compile without the GIL; the machine code is kept for later processes if there is a writable folder for it."""
    dispatcher: Any = njit(nogil=True)(function)
    if not vars(config)["DISABLE_JIT"]:
        with contextlib.suppress(RuntimeError):  # no folder can be written
            dispatcher._cache = _FolderCache(function)
    return dispatcher


mix = kernel(mix_64)


def check_seed(seed: int) -> None:
    """Raise a UsageError for a seed that is no uint63."""
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"seed is {seed}: give a whole number from 0 to {MAX_SEED}.")


def permutations(seed: int, layers: int, experts: int) -> np.ndarray:
    """Return expert_of_rank [layers, experts]: an independent random permutation in every layer."""
    cells = np.arange(layers * experts, dtype=np.uint64).reshape(layers, experts)
    start = mix_64(np.full(1, ~np.uint64(seed)))  # the complement: apart from the streams that the rows draw from
    order = np.argsort(mix_64(start + cells * GOLDEN), axis=1, kind="stable")
    return order.astype(expert_dtype(experts))
