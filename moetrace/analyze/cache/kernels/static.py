"""Static sets: wanted keys are kept from their first access on, and no others.

The hindsight set is of the keys accessed most often in the whole trace. The prefill-seeded one is of those that most
rows chose in the prefill steps so far, recomputed each time prefill steps end; keys that left the set are then evicted.
Ties go to the lower key. Sets are filled in this order with every key that still fits.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.engine.static_set import most_demanded
from moetrace.jit.compile import kernel
from moetrace.trace.schema import PREFILL


class StaticSet:
    """The wanted keys of one cache, and those of them that are resident."""

    def __init__(self, weight: np.ndarray, capacity: int, pools: int):
        self._weight, self._capacity, self._pools = weight, capacity, pools
        self._wanted, self.resident = np.zeros(weight.size, np.uint8), np.zeros(weight.size, np.uint8)

    def want(self, count: np.ndarray) -> None:
        """Want the keys of the greatest counts, int64 [keys], in each pool, as long as they fit; a count of 0 never."""
        self._wanted = most_demanded(count, self._weight, self._capacity, self._pools)
        self.resident &= self._wanted

    def replay(self, block: Accesses, start: int, stop: int, hit: np.ndarray) -> None:
        """Fill hit uint8 [n] of the accesses of events start up to stop."""
        _replay(self._wanted, self.resident, block.key, block.bounds[start : stop + 1], hit)


def count_accesses(blocks: Iterable[Accesses], keys: int) -> np.ndarray:
    """Return how often each key is accessed, int64 [keys]."""
    count = np.zeros(keys, np.int64)
    for block in blocks:
        count += np.bincount(block.key, minlength=keys)
    return count


class PrefillCounts:
    """How many rows chose each key in prefill steps so far; it divides blocks where sets are recomputed.

    Rows, not accesses: at once, an expert is accessed one time in a prompt, by however many of its rows.
    """

    def __init__(self, keys: int):
        self.count = np.zeros(keys, np.int64)
        self._under_way = False

    def parts(self, block: Accesses, layers: int) -> Iterator[tuple[int, int, bool]]:
        """Yield ranges of events, and whether the set is recomputed before each; counts are those until then."""
        prefill = block.phase == PREFILL
        edges = [0, *(np.flatnonzero(np.diff(prefill)) + 1).tolist(), prefill.size]
        for start, stop in pairwise(edges):
            if start == stop:
                continue
            anew = self._under_way and not prefill[start]
            yield start * layers, stop * layers, anew
            self._under_way = bool(prefill[start])
            if self._under_way:
                part = slice(block.bounds[start * layers], block.bounds[stop * layers])
                chosen_by = block.chosen_by[part] if block.chosen_by.size else None  # one at a time: each by one row
                self.count += np.bincount(block.key[part], chosen_by, self.count.size).astype(np.int64)


@kernel(inline=False)
def _replay(wanted, resident, key, bounds, hit):
    """Fill hit uint8 [n] of key int32 [n]; wanted keys, uint8 [keys], are resident from their first access on."""
    for event in range(bounds.size - 1):
        for i in range(bounds[event], bounds[event + 1]):
            hit[i] = resident[key[i]]
            resident[key[i]] = wanted[key[i]]
