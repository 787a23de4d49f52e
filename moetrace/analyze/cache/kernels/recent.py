"""LRU of equal sizes: the residents are the keys touched since a moment, and only that moment must be known.

All touches stand in a log. A key was touched last at one of its places; that place is *live*. An LRU cache of C keys
holds those of the C newest live places: of all live ones behind an edge. The edge is known to a group of places: all
live places behind the group are resident, and of those in it the newest that C leaves room for. A touch of a key that
was touched behind the group moves nothing; one of any other key brings the group nearer to its end. So an access costs
a comparison and a store, and each group of places one look at which are live: 1.2 ns one at a time, linked lists 7.
"""

from typing import NamedTuple

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.jit.compile import kernel

_GROUP = 64  # places: of 32, a group is looked at too often; of 128, an access is too often in that at the edge
_BEFORE = 2 * _GROUP  # places before the log: keys that were never touched lie there, before any group


class Touches(NamedTuple):
    """The touches of a block, after the earlier residents; places count from _BEFORE."""

    resident: np.ndarray  # int32 [a multiple of _GROUP]: the newest last, filled up in front
    key: np.ndarray  # int32 [n]
    last: np.ndarray  # int32 [keys]: the place where each was touched last


class RecentKeys:
    """An LRU cache of `capacity` keys, at least `least_capacity`: its residents, the newest last."""

    def __init__(self, keys: int, capacity: int) -> None:
        """Take a number of keys, and an empty cache."""
        self._keys, self._capacity = keys, min(capacity, keys)
        self._resident = np.zeros(0, np.int32)

    def replay(self, block: Accesses, sequential: bool, hit: np.ndarray) -> None:
        """Replay the accesses of a block, one at a time or each event at once, filling hit uint8 [n]."""
        count = self._resident.size
        # Filled up with the newest key, which is live at the end only.
        log = Touches(
            np.full(-(-count // _GROUP) * _GROUP, self._resident[-1:]), block.key, np.zeros(self._keys, np.int32)
        )
        log.resident[log.resident.size - count :] = self._resident
        log.last[self._resident] = np.arange(log.resident.size - count, log.resident.size) + _BEFORE
        if sequential:
            _replay(log, self._capacity - count, hit)
        else:
            _replay_events(log, block.bounds, self._capacity - count, hit)
        left = np.empty(self._capacity, np.int32)
        self._resident = left[self._capacity - _keep(log, left) :]


def least_capacity(most_at_once: int) -> int:
    """Return the fewest keys that a cache must hold: the group at the edge may have no key of the event at hand."""
    return most_at_once + 2 * _GROUP


@kernel(inline=False)
def _replay(log, room, hit):
    """Fill hit uint8 [n] of the keys of a log, each an event; there is room for that number of further live places.

    Rare cases share one branch, and indices are unsigned: 1.2 ns an access; with two branches it is 2.1 or, by
    chance, 6.
    """
    older, last = _BEFORE + log.resident.size, log.last
    edge = _BEFORE  # where the group at the edge ends
    while room <= 0:
        room, edge = room + _live(log, edge), edge + _GROUP
    for i in range(hit.size):
        own = np.uint32(log.key[np.uint64(i)])
        before = np.int64(last[own])
        last[own] = older + i
        hit[np.uint64(i)] = before >= edge
        room -= before < edge
        in_group = np.uint64(before - edge + _GROUP) < np.uint64(_GROUP)
        if (room <= 0) | in_group:
            if in_group:
                hit[np.uint64(i)] = room + 1 > _live_after(log, before, edge)
            while room <= 0:
                room, edge = room + _live(log, edge), edge + _GROUP


@kernel(inline=False)
def _replay_events(log, bounds, room, hit):
    """The same of events at once, bounds int64 [events + 1]: all hit the residents before them."""
    older, last = _BEFORE + log.resident.size, log.last
    edge = _BEFORE
    while room <= 0:
        room, edge = room + _live(log, edge), edge + _GROUP
    for event in range(bounds.size - 1):
        missing = 0
        for i in range(bounds[event], bounds[event + 1]):
            before = np.int64(last[np.uint32(log.key[np.uint64(i)])])
            hit[np.uint64(i)] = before >= edge
            missing += before < edge
            if np.uint64(before - edge + _GROUP) < np.uint64(_GROUP):
                hit[np.uint64(i)] = room > _live_after(log, before, edge)
        for i in range(bounds[event], bounds[event + 1]):
            last[np.uint32(log.key[np.uint64(i)])] = older + i
        room -= missing
        while room <= 0:
            room, edge = room + _live(log, edge), edge + _GROUP


@kernel
def _live(log, first):
    """Count the live places of a group: so large is a cache that the log reaches beyond."""
    start = first - _BEFORE
    if start < log.resident.size:
        return _live_of(log.resident, log.last, start, first)
    return _live_of(log.key, log.last, start - log.resident.size, first)


@kernel
def _live_of(key, last, start, first):
    """Count the live places of the group whose keys begin at key[start], and whose places begin at ``first``."""
    live = 0
    for other in range(_GROUP):
        live += last[np.uint32(key[np.uint64(start) + np.uint64(other)])] == first + other
    return live


@kernel
def _live_after(log, place, end):
    """Count the live places behind one, up to the end of its group."""
    live = 0
    for other in range(place + 1, end):
        at = other - _BEFORE - log.resident.size
        key = log.key[at] if at >= 0 else log.resident[other - _BEFORE]
        live += log.last[key] == other
    return live


@kernel(inline=False)
def _keep(log, left):
    """Put the keys of the newest live places, as many as are resident, to the end of left; return how many."""
    count, older = 0, log.resident.size
    for back in range(1, older + log.key.size + 1):
        at = older + log.key.size - back
        key = log.key[at - older] if at >= older else log.resident[at]
        if log.last[key] == _BEFORE + at:
            count += 1
            left[left.size - count] = key
            if count == left.size:
                break
    return count
