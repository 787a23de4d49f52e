"""Counter-based random numbers: each (seed, request, position, layer) has its own SplitMix64 stream.

So neither the size of blocks nor the batch changes what a row draws (SplitMix64: Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import numpy as np
from numba import njit

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


def kernel(function):
    """Compile without the GIL; the machine code is kept for later processes if there is a writable folder for it."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


mix = kernel(mix_64)


def check_seed(seed: int) -> None:
    """Raise a UsageError for a seed that is no uint63."""
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"--seed is {seed}: give a whole number from 0 to {MAX_SEED}.")


def permutations(seed: int, layers: int, experts: int) -> np.ndarray:
    """Return expert_of_rank [layers, experts]: an independent random permutation in every layer."""
    cells = np.arange(layers * experts, dtype=np.uint64).reshape(layers, experts)
    start = mix_64(np.full(1, ~np.uint64(seed)))  # the complement: apart from the streams that the rows draw from
    order = np.argsort(mix_64(start + cells * GOLDEN), axis=1, kind="stable")
    return order.astype(expert_dtype(experts))
