"""Random streams: each (seed, request, position, layer) has one of its own, and so has each permutation.

So neither the size of blocks nor the batch changes what a row draws.
"""

import numpy as np

from moetrace.jit.random import GOLDEN, mix_64
from moetrace.spec.errors import UsageError
from moetrace.trace.schema import expert_dtype

MAX_SEED = 2**63 - 1
SHIFT_32, SHIFT_11 = np.uint64(32), np.uint64(11)
LOW_32 = np.uint64(0xFFFFFFFF)


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
