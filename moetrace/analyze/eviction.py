"""Who is evicted, in Numba: caches of keys with a budget each, demanded by one event after another.

An event demands distinct keys at once (a single access is an event of one key). Those that are resident are hits. Then
every missing one, in order, is admitted: victims go until it fits, but never a key of the same event. If even then it
does not fit, or is larger than the whole budget, it is not kept; in the latter case nothing is evicted for it. At last
every resident key of the event is touched, in order. Policies differ in the victim only:

- LRU: touched longest ago. A doubly linked list, O(1) an access.
- ranked: of least priority, among those touched longest ago. A binary heap that knows where each key is, O(log n) for
  n residents. LFU's priority is how often the key was accessed, ever or since it was admitted last; Belady's is how
  soon it is next used.

Keys are divided among pools that do not share: one of all layers, or one a layer. Kernels check nothing: keys are
those of `accesses`.
"""

from typing import NamedTuple

import numpy as np

from moetrace.engine.compile import kernel

LFU, LFU_IN_CACHE, BELADY = 0, 1, 2  # what a heap ranks by
_PROTECTED = np.iinfo(np.int64).max  # priority of a key that the event at hand demands
_PRIORITY, _TOUCHED, _KEY = 0, 1, 2


class RecencyList(NamedTuple):
    """An LRU cache: a ring a pool, from the sentinel `keys + pool` to the oldest resident key, the newest, and back."""

    weight: np.ndarray  # int64 [keys]
    capacity: int  # of each pool, in units of weight
    used: np.ndarray  # int64 [pools]
    count: np.ndarray  # int64 [pools]: resident keys
    newer: np.ndarray  # int32 [keys + pools]; -1 = not resident
    older: np.ndarray  # int32 [keys + pools]


class RankedHeap(NamedTuple):
    """A cache whose victims have least priority: of each pool, a binary heap of resident keys."""

    weight: np.ndarray  # int64 [keys]
    capacity: int  # of each pool, in units of weight
    used: np.ndarray  # int64 [pools]
    count: np.ndarray  # int64 [pools]: resident keys
    heap: np.ndarray  # int64 [keys, 3]: priority, touched, key; that of pool p begins at p * keys / pools
    place: np.ndarray  # int32 [keys]: its row in `heap`; -1 = not resident
    accessed: np.ndarray  # int64 [keys]: how often
    clock: np.ndarray  # int64 [1]


def recency_list(weight: np.ndarray, capacity: int, pools: int) -> RecencyList:
    """Return an empty LRU cache of keys of `weight` (int64), with `capacity` in each of the pools."""
    ring = np.full(weight.size + pools, -1, np.int32)
    ring[weight.size :] = np.arange(weight.size, weight.size + pools)
    return RecencyList(weight, capacity, np.zeros(pools, np.int64), np.zeros(pools, np.int64), ring, ring.copy())


def ranked_heap(weight: np.ndarray, capacity: int, pools: int) -> RankedHeap:
    """Return an empty ranked cache of keys of `weight` (int64), with `capacity` in each of the pools."""
    heap, place = np.zeros((weight.size, 3), np.int64), np.full(weight.size, -1, np.int32)
    used, count = np.zeros(pools, np.int64), np.zeros(pools, np.int64)
    return RankedHeap(weight, capacity, used, count, heap, place, np.zeros(weight.size, np.int64), np.zeros(1, np.int64))


@kernel
def evict_by_recency(cache, key, bounds, layers, sequential, hit):
    """Replay the accesses of whole steps (see `Accesses`) through an LRU cache, filling hit uint8 [n]."""
    for event in range(bounds.size - 1):
        pool = event % layers if cache.used.size > 1 else 0
        start, stop = bounds[event], bounds[event + 1]
        if sequential:
            for i in range(start, stop):
                _demand_recent(cache, pool, key, i, i + 1, hit)
        else:
            _demand_recent(cache, pool, key, start, stop, hit)


@kernel
def evict_by_rank(cache, rule, key, next_use, bounds, layers, sequential, hit):
    """Replay the accesses of whole steps through a ranked cache, filling hit uint8 [n]; next_use [n] is for BELADY."""
    for event in range(bounds.size - 1):
        pool = event % layers if cache.used.size > 1 else 0
        start, stop = bounds[event], bounds[event + 1]
        if sequential:
            for i in range(start, stop):
                _demand_ranked(cache, rule, pool, key, next_use, i, i + 1, hit)
        else:
            _demand_ranked(cache, rule, pool, key, next_use, start, stop, hit)


@kernel
def _demand_recent(cache, pool, key, start, stop, hit):
    newer, older, sentinel = cache.newer, cache.older, cache.weight.size + pool
    ours = 0  # residents that are keys of this event: the newest ones, so the oldest is a victim while there are others
    for i in range(start, stop):
        hit[i] = newer[key[i]] >= 0
        if hit[i]:
            _unlink(newer, older, key[i])
            _link_newest(newer, older, key[i], sentinel)
            ours += 1
    for i in range(start, stop):
        k, weight = key[i], cache.weight[key[i]]
        if newer[k] == sentinel:
            continue
        if newer[k] >= 0:
            _unlink(newer, older, k)
        else:
            if weight > cache.capacity:
                continue
            while cache.used[pool] + weight > cache.capacity and cache.count[pool] > ours:
                victim = newer[sentinel]
                _unlink(newer, older, victim)
                newer[victim] = -1
                cache.used[pool] -= cache.weight[victim]
                cache.count[pool] -= 1
            if cache.used[pool] + weight > cache.capacity:
                continue
            cache.used[pool] += weight
            cache.count[pool] += 1
            ours += 1
        _link_newest(newer, older, k, sentinel)


@kernel
def _unlink(newer, older, key):
    newer[older[key]] = newer[key]
    older[newer[key]] = older[key]


@kernel
def _link_newest(newer, older, key, sentinel):
    newest = older[sentinel]
    newer[newest], older[key] = key, newest
    newer[key], older[sentinel] = sentinel, key


@kernel
def _demand_ranked(cache, rule, pool, key, next_use, start, stop, hit):
    first = pool * (cache.weight.size // cache.used.size)
    ours = 0  # residents that are keys of this event: of highest priority, so the least is a victim while there are more
    for i in range(start, stop):
        hit[i] = cache.place[key[i]] >= 0
        if hit[i]:
            ours += 1
            if stop - start > 1:
                _rank(cache, first, pool, key[i], _PROTECTED, 0)
    for i in range(start, stop):
        k, weight = key[i], cache.weight[key[i]]
        if cache.place[k] >= 0 or weight > cache.capacity:
            continue
        while cache.used[pool] + weight > cache.capacity and cache.count[pool] > ours:
            _evict_least(cache, first, pool)
        if cache.used[pool] + weight <= cache.capacity:
            cache.place[k] = first + cache.count[pool]
            cache.used[pool] += weight
            cache.count[pool] += 1
            ours += 1
            _rank(cache, first, pool, k, _PROTECTED, 0)
    for i in range(start, stop):
        k = key[i]
        cache.accessed[k] = 1 if rule == LFU_IN_CACHE and not hit[i] else cache.accessed[k] + 1
        if cache.place[k] >= 0:
            cache.clock[0] += 1
            _rank(cache, first, pool, k, -next_use[i] if rule == BELADY else cache.accessed[k], cache.clock[0])


@kernel
def _evict_least(cache, first, pool):
    victim = cache.heap[first, _KEY]
    cache.used[pool] -= cache.weight[victim]
    cache.count[pool] -= 1
    last = first + cache.count[pool]
    if last > first:
        priority, touched, key = cache.heap[last, _PRIORITY], cache.heap[last, _TOUCHED], cache.heap[last, _KEY]
        cache.place[key] = first
        _rank(cache, first, pool, key, priority, touched)
    cache.place[victim] = -1


@kernel
def _rank(cache, first, pool, key, priority, touched):
    """Move a resident key to where its new priority belongs."""
    heap, place = cache.heap, cache.place
    at = place[key] - first
    while at > 0:
        parent = first + ((at - 1) >> 1)
        if not _before(priority, touched, heap[parent, _PRIORITY], heap[parent, _TOUCHED]):
            break
        _move(heap, place, parent, first + at)
        at = (at - 1) >> 1
    while True:
        child = 2 * at + 1
        if child >= cache.count[pool]:
            break
        low = first + child
        if child + 1 < cache.count[pool] and _before(
            heap[low + 1, _PRIORITY], heap[low + 1, _TOUCHED], heap[low, _PRIORITY], heap[low, _TOUCHED]
        ):
            child, low = child + 1, low + 1
        if not _before(heap[low, _PRIORITY], heap[low, _TOUCHED], priority, touched):
            break
        _move(heap, place, low, first + at)
        at = child
    heap[first + at, _PRIORITY], heap[first + at, _TOUCHED], heap[first + at, _KEY] = priority, touched, key
    place[key] = first + at


@kernel
def _move(heap, place, source, target):
    heap[target, _PRIORITY], heap[target, _TOUCHED] = heap[source, _PRIORITY], heap[source, _TOUCHED]
    heap[target, _KEY] = heap[source, _KEY]
    place[heap[source, _KEY]] = target


@kernel
def _before(priority, touched, other_priority, other_touched):
    return priority < other_priority or (priority == other_priority and touched < other_touched)
