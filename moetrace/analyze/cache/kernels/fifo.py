"""FIFO: the victim is the key admitted longest ago, used since or not.

One at a time and of equal sizes, 16 capacities go together (`FifoQueues`): a key has a bit for each cache that holds
it, so that an access that hits in all of them costs one comparison. Else a linked list for each (`FifoList`).
"""

from typing import NamedTuple

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.jit.compile import kernel

CACHES = 16
_TOGETHER = 8  # layers


class FifoQueues(NamedTuple):
    """Up to 16 FIFO caches, bit by bit."""

    capacity: np.ndarray  # int64 [caches]: of each pool, in keys
    held: np.ndarray  # uint16 [keys + 1]: which caches hold each key; the last is no key's
    queue: np.ndarray  # int32 [caches, pools, max capacity]: rings of keys, of which the next to go is at `head`
    head: np.ndarray  # int32 [caches, pools]


class FifoList(NamedTuple):
    """A FIFO cache: a ring a pool, from the sentinel `keys + pool` to the oldest resident key, the newest, and back."""

    weight: np.ndarray  # int64 [keys]
    capacity: int  # of each pool, in units of weight
    used: np.ndarray  # int64 [pools]
    newer: np.ndarray  # int32 [keys + pools]; -1 = not resident
    older: np.ndarray  # int32 [keys + pools]
    event: np.ndarray  # int64 [keys]: number of the first access of the last event that demanded it


def fifo_queues(keys: int, capacities: list[int], pools: int) -> FifoQueues:
    """Return empty caches; a capacity is that of each pool, and 0 keeps nothing."""
    capacity = np.minimum(np.array(capacities, np.int64), keys)
    queue = np.full((len(capacities), pools, max(1, int(capacity.max()))), keys, np.int32)
    return FifoQueues(capacity, np.zeros(keys + 1, np.uint16), queue, np.zeros((len(capacities), pools), np.int32))


def fifo_list(weight: np.ndarray, capacity: int, pools: int) -> FifoList:
    """Return an empty cache of keys of `weight` (int64), with `capacity` in each of the pools."""
    ring = np.full(weight.size + pools, -1, np.int32)
    ring[weight.size :] = np.arange(weight.size, weight.size + pools)
    return FifoList(weight, capacity, np.zeros(pools, np.int64), ring, ring.copy(), np.full(weight.size, -1))


def replay_queues(caches: FifoQueues, block: Accesses, hits: np.ndarray) -> None:
    """Replay the accesses of a block one at a time, filling hits uint16 [n]: bit c is 1 if cache c hits."""
    if caches.capacity.size == 1 and caches.capacity[0]:
        _replay_queue(caches, block.key, block.bounds, hits)
    else:
        _replay_queues(caches, block.key, block.bounds, hits)


def replay_list(cache: FifoList, block: Accesses, layers: int, sequential: bool, hit: np.ndarray) -> None:
    """Replay the accesses of a block, filling hit uint8 [n]."""
    _replay_list(cache, block, layers, sequential, hit)


@kernel(inline=False)
def _replay_queues(caches, key, bounds, hits):
    """Replay key int32 [n] through up to 16 caches, filling hits uint16 [n], a bit a cache."""
    keeps = 0  # bits of the caches that keep anything
    for cache in range(caches.capacity.size):
        keeps |= (caches.capacity[cache] > 0) << cache
    pool = -1
    for event in range(bounds.size - 1):
        pool = pool + 1 if pool + 1 < caches.head.shape[1] else 0
        for i in range(bounds[event], bounds[event + 1]):
            held = np.int64(caches.held[key[i]])
            hits[i] = held
            missing, cache = keeps & ~held, 0
            if missing:
                caches.held[key[i]] = keeps
            while missing:
                if missing & 1:
                    at = caches.head[cache, pool]
                    victim = caches.queue[cache, pool, at]
                    caches.held[victim] = np.int64(caches.held[victim]) & ~(1 << cache)
                    caches.queue[cache, pool, at] = key[i]
                    caches.head[cache, pool] = at + 1 if at + 1 < caches.capacity[cache] else 0
                missing, cache = missing >> 1, cache + 1


@kernel(inline=False)
def _replay_queue(caches, key, bounds, hits):
    """The same for one cache only: 2.5 ns an access with eight layers in turn, 4.5 to 5.7 one after another."""
    pools, pool = caches.head.shape[1], 0
    event = 0
    while event < bounds.size - 1:
        start, length, together = bounds[event], bounds[event + 1] - bounds[event], 1
        if pool + _TOGETHER <= pools:
            together = _TOGETHER
            for turn in range(1, _TOGETHER):
                if bounds[event + turn + 1] - bounds[event + turn] != length:
                    together = 1
        if together == 1:
            for i in range(start, start + length):
                hits[i] = _demand_guessing(caches, pool, key[i])
        else:
            for i in range(length):
                for turn in range(_TOGETHER):
                    at = start + turn * length + i
                    hits[at] = _demand_without_branches(caches, pool + turn, key[at])
        event += together
        pool = pool + together if pool + together < pools else 0


@kernel
def _demand_guessing(caches, pool, key):
    """Demand a key from the first cache; return 1 if it hits, else 0."""
    held = np.int64(caches.held[key])
    if not held:
        at = caches.head[0, pool]
        caches.held[caches.queue[0, pool, at]] = 0
        caches.held[key], caches.queue[0, pool, at] = 1, key
        caches.head[0, pool] = at + 1 if at + 1 < caches.capacity[0] else 0
    return held


@kernel
def _demand_without_branches(caches, pool, key):
    """A hit stores the old value again: longer, but with no branch that a processor would often guess wrong."""
    held, at = np.int64(caches.held[key]), np.int64(caches.head[0, pool])
    victim = caches.queue[0, pool, at]
    caches.held[victim] = np.int64(caches.held[victim]) & held
    caches.held[key] = 1
    caches.queue[0, pool, at] = victim if held else key
    at += 1 - held
    caches.head[0, pool] = at if at < caches.capacity[0] else 0
    return held


@kernel(inline=False)
def _replay_list(cache, block, layers, sequential, hit):
    """Replay the accesses of a block through a linked list, filling hit uint8 [n]."""
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
    newer, older, sentinel = cache.newer, cache.older, cache.weight.size + pool
    for i in range(start, stop):
        hit[i] = newer[key[i]] >= 0
        cache.event[key[i]] = event
    oldest = newer[sentinel]  # that is not of this event, as far as it was looked for
    for i in range(start, stop):
        k, weight = key[i], cache.weight[key[i]]
        if hit[i] or weight > cache.capacity:
            continue
        while cache.used[pool] + weight > cache.capacity:
            while oldest != sentinel and cache.event[oldest] == event:
                oldest = newer[oldest]
            if oldest == sentinel:
                break
            victim, oldest = oldest, newer[oldest]
            newer[older[victim]], older[newer[victim]] = newer[victim], older[victim]
            newer[victim] = -1
            cache.used[pool] -= cache.weight[victim]
        if cache.used[pool] + weight <= cache.capacity:
            cache.used[pool] += weight
            newest = older[sentinel]
            newer[newest], older[k] = k, newest
            newer[k], older[sentinel] = sentinel, k
            if oldest == sentinel:
                oldest = np.int32(k)
