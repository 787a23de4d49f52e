"""LRU of equal sizes: what is resident is whatever was touched since a moment, and only that moment has to be known.

All touches stand in a log. A key was touched last at one of its places; that place is *live*. An LRU cache of C keys
holds those of the C newest live places: of all live ones behind an edge. The edge is known to a group of places: all
live places behind the group are resident, and of those in it the newest that C leaves room for. A touch of a key that
was touched behind the group moves nothing; one of any other key brings the group nearer to its end. So an access costs
a comparison and a store, and each group of places one look at which are live. With linked lists it took 7 to 8 ns an
access, and 2 now.
"""

from typing import NamedTuple

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.jit.compile import kernel

_GROUP = 32  # places: fewer are looked at too often, of more an access is too often in the group at the edge
_BEFORE = 2 * _GROUP  # places before the log: what was never touched lies there, before any group


class RecentKeys:
    """An LRU cache of `capacity` keys, at least `least_capacity`: its residents, the newest last."""

    def __init__(self, keys: int, capacity: int) -> None:
        """Take a number of keys, and an empty cache."""
        self._keys, self._capacity = keys, min(capacity, keys)
        self._resident = np.zeros(0, np.int32)

    def replay(self, block: Accesses, sequential: bool, hit: np.ndarray) -> None:
        """Replay the accesses of a block, one at a time or each event at once, filling hit uint8 [n]."""
        log = np.concatenate((self._resident, block.key))
        last = np.zeros(self._keys, np.int32)
        last[self._resident] = np.arange(_BEFORE, _BEFORE + self._resident.size)
        one_by_one = np.empty(0, np.int64)
        left = np.empty(self._capacity, np.int32)
        count = _replay(log, last, one_by_one if sequential else block.bounds, self._capacity, hit, left)
        self._resident = left[self._capacity - count :]


def least_capacity(most_at_once: int) -> int:
    """Return the fewest keys that a cache must hold: the group at the edge may have no key of the event at hand."""
    return most_at_once + 2 * _GROUP


@kernel(inline=False)
def _replay(log, last, bounds, capacity, hit, left):
    """Fill hit uint8 [n] of the last n places of log int32, and the end of left int32 [capacity]; return how many.

    ``last`` int32 [keys]: the place where each was touched last; places of the log begin at _BEFORE. ``bounds`` int64
    [events + 1], or [0] if each access is an event.
    """
    older = log.size - hit.size
    newer = older  # live places behind the group at the edge; all, as long as there is room
    edge = _BEFORE  # where that group ends
    while newer >= capacity:  # not of one at a time
        newer, edge = newer - _live(log, last, edge, older), edge + _GROUP
    if bounds.size == 0:
        for i in range(hit.size):
            place = np.int32(_BEFORE + older + i)
            own = np.uint64(log[np.uint64(older + i)])
            before = last[own]
            last[own] = place
            hits = before >= edge
            hit[np.uint64(i)] = hits
            newer += before < edge
            if before >= edge - _GROUP and not hits:
                hit[np.uint64(i)] = newer - 1 + _live_after(log, last, before, edge) < capacity
            while newer >= capacity:
                newer, edge = newer - _live(log, last, edge, older + i + 1), edge + _GROUP
    else:
        for event in range(bounds.size - 1):
            start, stop = bounds[event], bounds[event + 1]
            for i in range(start, stop):
                before = last[log[older + i]]
                hit[i] = before >= edge
                if before >= edge - _GROUP and before < edge:
                    hit[i] = newer + _live_after(log, last, before, edge) < capacity
            for i in range(start, stop):
                own = log[older + i]
                newer += last[own] < edge
                last[own] = _BEFORE + older + i
            while newer >= capacity:
                newer, edge = newer - _live(log, last, edge, older + stop), edge + _GROUP
    return _keep(log, last, left)


@kernel
def _live(log, last, first, end):
    """Count the live places of the group that begins at ``first``, before the end of the log so far."""
    live = 0
    for place in range(first, min(first + _GROUP, _BEFORE + end)):
        live += last[log[place - _BEFORE]] == place
    return live


@kernel
def _live_after(log, last, place, end):
    """Count the live places behind one, up to the end of its group."""
    live = 0
    for other in range(place + 1, end):
        live += last[log[other - _BEFORE]] == other
    return live


@kernel
def _keep(log, last, left):
    """Put the keys of the newest live places, as many as are resident, to the end of left; return how many."""
    count = 0
    for i in range(log.size):
        at = log.size - 1 - i
        if last[log[at]] == _BEFORE + at and count < left.size:
            count += 1
            left[left.size - count] = log[at]
            if count == left.size:
                break
    return count
