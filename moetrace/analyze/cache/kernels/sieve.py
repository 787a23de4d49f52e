"""Sieve (Zhang et al. 2024): a FIFO queue, and a hand that evicts the first key not accessed since it passed last.

One at a time and of equal sizes, the queue lies in an array (`SieveRow`): the hand moves along it, and what it leaves
there moves down to those that it left before. Else it is a linked list (`Sieve`).
"""

from typing import NamedTuple

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.engine.residency import find_unvisited
from moetrace.jit.compile import kernel


class Sieve(NamedTuple):
    """A cache: a ring a pool, from the sentinel `keys + pool` to the key admitted first, to the last, and back."""

    weight: np.ndarray  # int64 [keys]
    capacity: int  # of each pool, in units of weight
    used: np.ndarray  # int64 [pools]
    residents: np.ndarray  # int64 [pools]: how many keys
    newer: np.ndarray  # int32 [keys + pools]; -1 = not resident
    older: np.ndarray  # int32 [keys + pools]
    visited: np.ndarray  # uint8 [keys]: whether it was accessed since it was admitted, or the hand passed
    hand: np.ndarray  # int32 [pools]: the key that it looks at next; the sentinel = the first one that was admitted
    event: np.ndarray  # int64 [keys]: number of the first access of the last event that demanded it


class SieveRow(NamedTuple):
    """A cache of equal sizes for all layers: keys the hand has passed, a gap, and those to come, all by admission."""

    capacity: int
    # int32 [4 * capacity]: more than twice, so that the later part seldom has to move down when the end is reached
    row: np.ndarray
    seen: np.ndarray  # uint8 [keys]: 0 = not resident, 2 if accessed since it was admitted or the hand passed, else 1
    state: np.ndarray  # int64 [3]: how many were passed; where those to come begin and end


def sieve_row(keys: int, capacity: int) -> SieveRow:
    """Return an empty cache of `capacity` keys; 0 keeps nothing."""
    capacity = min(capacity, keys)
    return SieveRow(capacity, np.zeros(4 * capacity, np.int32), np.zeros(keys, np.uint8), np.zeros(3, np.int64))


def sieve(weight: np.ndarray, capacity: int, pools: int) -> Sieve:
    """Return an empty cache of keys of `weight` (int64), with `capacity` in each of the pools."""
    ring = np.full(weight.size + pools, -1, np.int32)
    ring[weight.size :] = np.arange(weight.size, weight.size + pools)
    used, residents = np.zeros(pools, np.int64), np.zeros(pools, np.int64)
    visited, event = np.zeros(weight.size, np.uint8), np.full(weight.size, -1)
    hand = ring[weight.size :].copy()
    return Sieve(weight, capacity, used, residents, ring, ring.copy(), visited, hand, event)


def replay_sieve(cache: Sieve, block: Accesses, layers: int, sequential: bool, hit: np.ndarray) -> None:
    """Replay the accesses of a block, filling hit uint8 [n]."""
    _replay(cache, block, layers, sequential, hit)


def replay_row(cache: SieveRow, block: Accesses, hit: np.ndarray) -> None:
    """Replay the accesses of a block one at a time, filling hit uint8 [n]."""
    if cache.capacity:
        _replay_row(cache, block.key, hit)
    else:
        hit[:] = 0


@kernel(inline=False)
def _replay_row(cache, key, hit):
    """Replay key int32 [n], filling hit uint8 [n]."""
    capacity, row, seen = cache.capacity, cache.row, cache.seen
    passed, start, stop = cache.state[0], cache.state[1], cache.state[2]
    for i in range(hit.size):
        own = np.uint32(key[np.uint64(i)])
        resident = seen[own] > 0
        hit[np.uint64(i)] = resident
        seen[own] = 2
        if not resident:
            seen[own] = 1
            if passed + stop - start == capacity:
                victim = np.uint32(row[np.uint64(start)])
                while seen[victim] == 2:
                    seen[victim] = 1
                    row[np.uint64(passed)] = victim
                    passed, start = passed + 1, start + 1
                    if start == stop:
                        passed, start, stop = 0, 0, passed
                    victim = np.uint32(row[np.uint64(start)])
                seen[victim] = 0
                start += 1
                if start == stop:
                    passed, start, stop = 0, 0, passed
            if stop == row.size:
                for other in range(start, stop):
                    row[passed + other - start] = row[other]
                start, stop = passed, passed + stop - start
            row[np.uint64(stop)] = own
            stop += 1
    cache.state[0], cache.state[1], cache.state[2] = passed, start, stop


@kernel(inline=False)
def _replay(cache, block, layers, sequential, hit):
    """Replay the accesses of a block, filling hit uint8 [n]."""
    bounds = block.bounds
    for event in range(bounds.size - 1):
        pool = event % layers if cache.used.size > 1 else 0
        start, stop = bounds[event], bounds[event + 1]
        if sequential:
            for i in range(start, stop):
                _demand(cache, pool, block.key, i, i + 1, block.first + i, hit)
        else:
            _demand(cache, pool, block.key, start, stop, block.first + start, hit)


@kernel
def _demand(cache, pool, key, start, stop, event, hit):
    """Demand the keys start up to stop at once, filling their part of hit uint8 [n]."""
    ours = 0  # residents that are keys of this event
    for i in range(start, stop):
        k = key[i]
        hit[i] = cache.newer[k] >= 0
        cache.event[k] = event
        ours += hit[i] > 0
        cache.visited[k] |= hit[i]
    newer, older, sentinel = cache.newer, cache.older, cache.weight.size + pool
    for i in range(start, stop):
        k, weight = key[i], cache.weight[key[i]]
        if hit[i] or weight > cache.capacity:
            continue
        while cache.used[pool] + weight > cache.capacity and cache.residents[pool] > ours:
            _evict(cache, pool, sentinel, event)
        if cache.used[pool] + weight <= cache.capacity:
            cache.used[pool] += weight
            cache.residents[pool] += 1
            cache.visited[k] = 0
            ours += 1
            newest = older[sentinel]
            newer[newest], older[k] = k, newest
            newer[k], older[sentinel] = sentinel, k


@kernel
def _evict(cache, pool, sentinel, event):
    """Evict one key that is not of the event; there is one. The hand leaves those of the event as they are."""
    newer, older, residents = cache.newer, cache.older, cache.residents[pool]
    victim = find_unvisited(newer, cache.visited, cache.event, event, cache.hand[pool], sentinel, residents)
    cache.hand[pool] = newer[victim]
    newer[older[victim]], older[newer[victim]] = newer[victim], older[victim]
    newer[victim] = -1
    cache.used[pool] -= cache.weight[victim]
    cache.residents[pool] -= 1
