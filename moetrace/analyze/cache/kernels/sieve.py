"""Sieve (Zhang et al. 2024): a FIFO queue, and a hand that evicts the first key not accessed since it passed last."""

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
