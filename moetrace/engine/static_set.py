"""Sets of experts that are kept for good: those demanded most often in a whole trace (`static-hindsight`)."""

from collections.abc import Iterable

import numpy as np

from moetrace.engine.demand import Demand
from moetrace.jit.compile import kernel


def count_demands(demands: Iterable[Demand], layers: int, experts: int) -> np.ndarray:
    """Return in how many steps each expert is demanded, int64 [L * E], from the blocks of a trace."""
    count = np.zeros(layers * experts, np.int64)
    for demand in demands:
        _count(demand.start, demand.expert, layers, experts, count)
    return count


def most_demanded(count: np.ndarray, weight: np.ndarray, capacity: int, pools: int) -> np.ndarray:
    """Choose the keys of the greatest counts in each pool, each as long as it fits.

    The lower of two keys with equal counts goes first. A key with a count of 0 is never chosen.

    Args:
        count: Demands of each key, int64 [keys].
        weight: What each key takes of the capacity, int64 [keys].
        capacity: Capacity of each pool, in the units of `weight`.
        pools: Number of pools, equal runs of keys.

    Returns:
        uint8 [keys], 1 for a chosen key.
    """
    wanted, size = np.zeros(weight.size, np.uint8), weight.size // pools
    for first in range(0, weight.size, size):
        part = slice(first, first + size)
        _fill(np.argsort(-count[part], kind="stable"), count[part], weight[part], capacity, wanted[part])
    return wanted


def keep_only(cells: np.ndarray, wanted: np.ndarray) -> None:
    """Let the GPU keep what is wanted (uint8 [L * E]) once it has arrived, for good, and nothing else."""
    wanted = wanted.reshape(cells.shape)
    cells["admit"] = wanted
    cells["score"] = np.where(wanted, np.inf, 0.0)


@kernel(inline=False)
def _count(start, expert, layers, experts, count):
    """Add the steps in which each expert of a block is demanded to count int64 [L * E]."""
    for at in range(start.size - 1):
        for i in range(start[at], start[at + 1]):
            count[at % layers * experts + expert[i]] += 1


@kernel(inline=False)
def _fill(order, count, weight, capacity, wanted):
    """Set wanted uint8 [keys] to 1 for keys in ``order`` as long as they fit ``capacity``."""
    used = 0
    for i in range(order.size):
        key = order[i]
        if count[key] == 0:
            break
        if used + weight[key] <= capacity:
            used += weight[key]
            wanted[key] = 1
