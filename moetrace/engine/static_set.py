"""Sets of experts that are kept for good: which these are, of residencies whose set never changes."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from moetrace.engine.demand import Demand
from moetrace.jit.compile import kernel


class StaticRoom(NamedTuple):
    """The data from which a residency's set is chosen; a key is a layer entry x the experts of a layer + the expert."""

    exists: np.ndarray  # bool [layers, experts]: layers may have fewer experts than others
    capacity: np.ndarray  # int64 [pools]: experts
    pools: int  # 1, or one a layer
    demand_count: np.ndarray  # int64 [layers * experts]: in how many steps each is demanded


def count_demands(demands: Iterable[Demand], layers: int, experts: int) -> np.ndarray:
    """Return in how many steps each expert is demanded, int64 [L * E], from the blocks of a trace."""
    count = np.zeros(layers * experts, np.int64)
    for demand in demands:
        _count(demand.start, demand.expert, layers, experts, count)
    return count


def most_demanded(count: np.ndarray, weight: np.ndarray, capacity: int | np.ndarray, pools: int) -> np.ndarray:
    """Choose the keys of the greatest counts in each pool, each as long as it fits.

    The lower of two keys with equal counts goes first. A key with a count of 0 is never chosen.

    Args:
        count: Demands of each key, int64 [keys].
        weight: The part of the capacity that each key takes, int64 [keys].
        capacity: Capacity of each pool, one for all or int64 [pools], in the units of `weight`.
        pools: Number of pools, equal runs of keys.

    Returns:
        uint8 [keys], 1 for a chosen key.
    """
    wanted, size = np.zeros(weight.size, np.uint8), weight.size // pools
    for first, room in zip(range(0, weight.size, size), np.broadcast_to(capacity, pools).tolist(), strict=True):
        part = slice(first, first + size)
        _fill(np.argsort(-count[part], kind="stable"), count[part], weight[part], room, wanted[part])
    return wanted


def most_demanded_keys(room: StaticRoom) -> np.ndarray:
    """Return the keys int64 [n] of those that are demanded in the most steps, as many as there is room for."""
    count = room.demand_count
    return np.flatnonzero(most_demanded(count, np.ones_like(count), room.capacity, room.pools))


def keep_only(cells: np.ndarray, wanted: np.ndarray) -> None:
    """Let the GPU keep only wanted experts (uint8 [L * E]), permanently once they have arrived."""
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
