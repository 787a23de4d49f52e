"""Counter-based random numbers by SplitMix64 (Steele, Lea and Flood 2014): a draw depends only on its counter.

Numba turns uint64 with a plain integer into float64, so every constant of the arithmetic is typed.
"""

import numpy as np

from moetrace.jit.compile import kernel

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # what the state grows by from number to number
_FACTOR_1 = np.uint64(0xBF58476D1CE4E5B9)
_FACTOR_2 = np.uint64(0x94D049BB133111EB)
_27, _30, _31 = (np.uint64(bits) for bits in (27, 30, 31))


def mix_64(z):
    """Return SplitMix64's output for a state, of uint64 numbers or arrays."""
    z = (z ^ (z >> _30)) * _FACTOR_1
    z = (z ^ (z >> _27)) * _FACTOR_2
    return z ^ (z >> _31)


mix = kernel(mix_64)


@kernel
def drawn(seed, step, layer, place, expert):
    """Return a number of 0 to 2^32 - 1 that depends on all five, as if it were random."""
    state = np.uint64(seed)
    for part in (step, layer, place, expert):
        state = mix(state + GOLDEN * (np.uint64(part) + np.uint64(1)))
    return np.int64(state >> np.uint64(32))
