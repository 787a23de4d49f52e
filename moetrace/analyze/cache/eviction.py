"""Who is evicted, in Numba: caches of keys with a budget each, demanded by one event after another.

An event demands distinct keys at once (a single access is an event of one key). Resident ones are hits. Then
every missing one, in order, is admitted: victims go until it fits, but never a key of the same event. If even then it
does not fit, or is larger than the whole budget, it is not kept; in the latter case nothing is evicted for it. At last
every resident key of the event is touched, in order. Policies differ in the victim only:

- LRU: touched longest ago. A doubly linked list, O(1) an access.
- ranked: of least rank. A heap that knows where each key is, O(log n) for n residents. LFU ranks by how often the key
  was accessed, ever or since it was admitted last, then by when it was touched; Belady by how soon it is next used.

Keys are divided among pools that do not share: one of all layers, or one a layer. Kernels check nothing: keys are
those of `accesses`.
"""

from typing import NamedTuple

import numpy as np

from moetrace.engine.residency import demands
from moetrace.jit.compile import kernel
from moetrace.jit.heap import ARITY, KEY, RANK, rise_placed, sink_placed

LFU, LFU_IN_CACHE, BELADY = 0, 1, 2  # what a heap ranks by
# LFU's rank is the number of accesses to a key above that of the touch, in one int64: comparing is one comparison.
TOUCHED_BITS = 36
MAX_COUNT = 1 << (63 - TOUCHED_BITS)
_PROTECTED = np.iinfo(np.int64).max  # rank of a key that would be the victim, were it not of the event at hand


class RecencyList(NamedTuple):
    """An LRU cache: a ring a pool, from the sentinel `keys + pool` to the oldest resident key, the newest, and back."""

    weight: np.ndarray  # int64 [keys]
    capacity: int  # of each pool, in units of weight
    used: np.ndarray  # int64 [pools]
    residents: np.ndarray  # int64 [pools]: how many keys
    newer: np.ndarray  # int32 [keys + pools]; -1 = not resident
    older: np.ndarray  # int32 [keys + pools]


class RankedHeap(NamedTuple):
    """A cache whose victims have least rank: of each pool, a heap of resident keys."""

    weight: np.ndarray  # int64 [keys]
    capacity: int  # of each pool, in units of weight
    used: np.ndarray  # int64 [pools]
    residents: np.ndarray  # int64 [pools]: how many keys
    heap: np.ndarray  # int64 [keys + 4, 2]: rank and key; that of pool p begins at p * keys / pools
    place: np.ndarray  # int64 [keys]: where in the heap of its pool; -1 = not resident
    accessed: np.ndarray  # int64 [keys]: how often
    event: np.ndarray  # int64 [keys]: number of the first access of the last event of several that demanded it


def recency_list(weight: np.ndarray, capacity: int, pools: int) -> RecencyList:
    """Return an empty LRU cache of keys of `weight` (int64), with `capacity` in each of the pools."""
    ring = np.full(weight.size + pools, -1, np.int32)
    ring[weight.size :] = np.arange(weight.size, weight.size + pools)
    return RecencyList(weight, capacity, np.zeros(pools, np.int64), np.zeros(pools, np.int64), ring, ring.copy())


def ranked_heap(weight: np.ndarray, capacity: int, pools: int) -> RankedHeap:
    """Return an empty ranked cache of keys of `weight` (int64), with `capacity` in each of the pools."""
    heap, place = np.zeros((weight.size + ARITY, 2), np.int64), np.full(weight.size, -1)
    used, residents = np.zeros(pools, np.int64), np.zeros(pools, np.int64)
    return RankedHeap(
        weight, capacity, used, residents, heap, place, np.zeros(weight.size, np.int64), np.full(weight.size, -1)
    )


@kernel
def evict_by_recency(cache, block, layers, sequential, hit):
    """Replay the accesses of a block through an LRU cache, filling hit uint8 [n]."""
    bounds = block.bounds
    for event in range(bounds.size - 1):
        pool = event % layers if cache.used.size > 1 else 0
        start, stop = bounds[event], bounds[event + 1]
        if sequential:
            for i in range(start, stop):
                demand_recent(cache, pool, block.key, i, i + 1, hit)
        else:
            demand_recent(cache, pool, block.key, start, stop, hit)


@kernel
def evict_by_rank(cache, rule, block, next_use, layers, sequential, hit):
    """Replay the accesses of a block through a ranked cache, filling hit uint8 [n]; next_use [n] is for BELADY."""
    bounds = block.bounds
    for event in range(bounds.size - 1):
        pool = event % layers if cache.used.size > 1 else 0
        start, stop = bounds[event], bounds[event + 1]
        if sequential:
            for i in range(start, stop):
                _demand_ranked(cache, rule, pool, block, next_use, i, i + 1, hit)
        else:
            _demand_ranked(cache, rule, pool, block, next_use, start, stop, hit)


@kernel
def demand_recent(cache, pool, key, start, stop, hit):
    """Demand the keys start up to stop at once from an LRU cache, filling their part of hit uint8 [n]."""
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
            while cache.used[pool] + weight > cache.capacity and cache.residents[pool] > ours:
                victim = newer[sentinel]
                _unlink(newer, older, victim)
                newer[victim] = -1
                cache.used[pool] -= cache.weight[victim]
                cache.residents[pool] -= 1
            if cache.used[pool] + weight > cache.capacity:
                continue
            cache.used[pool] += weight
            cache.residents[pool] += 1
            ours += 1
        _link_newest(newer, older, k, sentinel)


@kernel
def _unlink(newer, older, key):
    """Take a key out of its ring, int32 [keys + pools] each way."""
    newer[older[key]] = newer[key]
    older[newer[key]] = older[key]


@kernel
def _link_newest(newer, older, key, sentinel):
    """Put a key, which is in no ring, into a pool's as the newest one."""
    newest = older[sentinel]
    newer[newest], older[key] = key, newest
    newer[key], older[sentinel] = sentinel, key


@kernel
def _demand_ranked(cache, rule, pool, block, next_use, start, stop, hit):
    """Demand the keys start up to stop at once from a ranked cache, filling their part of hit uint8 [n]."""
    heap = cache.heap[pool * (cache.weight.size // cache.used.size) :]
    place, together, event = cache.place, stop - start > 1, block.first + start
    ours = 0  # residents that are keys of this event
    for i in range(start, stop):
        k = block.key[i]
        hit[i] = place[k] >= 0
        ours += hit[i] > 0  # without `> 0`, plain Python would add in uint8
        cache.accessed[k] = demands(cache.accessed[k], rule == LFU_IN_CACHE, hit[i])
        if together:
            cache.event[k] = event
    for i in range(start, stop):
        if not hit[i]:
            ours += _admit(cache, heap, pool, block.key[i], _rank(cache, rule, block, next_use, i), ours, event)
    for i in range(start, stop):
        k = block.key[i]
        if place[k] >= 0 and (together or hit[i]):
            rank = _rank(cache, rule, block, next_use, i)
            if rank > heap[place[k], RANK]:
                sink_placed(heap, place, cache.residents[pool], place[k], rank, k)
            elif rank < heap[place[k], RANK]:
                rise_placed(heap, place, place[k], rank, k)


@kernel
def _rank(cache, rule, block, next_use, i):
    """Return the rank, int64, that access i gives to its key; the least goes first."""
    if rule == BELADY:
        return -next_use[i]
    return (cache.accessed[block.key[i]] << TOUCHED_BITS) + block.first + i


@kernel
def _admit(cache, heap, pool, key, rank, ours, event):
    """Admit a key, evicting others except `ours` keys, those of `event`; return whether it was admitted (0 or 1)."""
    weight, count = cache.weight[key], cache.residents[pool]
    if weight > cache.capacity:
        return 0
    vacant = False  # the root: its key went, and the new one may take its place, which is the cheapest
    while cache.used[pool] + weight > cache.capacity and count > ours:
        if vacant:
            sink_placed(heap, cache.place, count, 0, heap[count, RANK], heap[count, KEY])
        while cache.event[heap[0, KEY]] == event:
            sink_placed(heap, cache.place, count, 0, _PROTECTED, heap[0, KEY])
        victim = heap[0, KEY]
        cache.place[victim] = -1
        cache.used[pool] -= cache.weight[victim]
        count -= 1
        vacant = True
    fits = cache.used[pool] + weight <= cache.capacity
    if fits:
        cache.used[pool] += weight
        count += 1
        if vacant:
            sink_placed(heap, cache.place, count, 0, rank, key)
        else:
            rise_placed(heap, cache.place, count - 1, rank, key)
    elif vacant and count:
        sink_placed(heap, cache.place, count, 0, heap[count, RANK], heap[count, KEY])
    cache.residents[pool] = count
    return 1 if fits else 0
