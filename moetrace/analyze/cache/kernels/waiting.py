"""LFU in cache of equal sizes, one access at a time: a hit only stores a new rank.

The rank of a resident is its count of accesses since it was admitted, then the number of its last one; the least goes.
Keys that were admitted wait in a ring, the oldest first. Those of them that were accessed once only are the next
victims, in this order. Others, as they come to the front, move to a heap, with the rank that they have then. A rank in
the heap is out of date once its key hits again; but ranks only grow, so that the front is brought up to date, and let
sink, only when a victim is looked for there.
"""

from typing import NamedTuple

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.analyze.cache.eviction import TOUCHED_BITS
from moetrace.jit.compile import kernel
from moetrace.jit.heap import sink

_ONCE = 1 << TOUCHED_BITS  # the least rank of a key accessed once
_TWICE = 2 << TOUCHED_BITS
_HEAD, _WAITING, _HEAPED = 0, 1, 2  # of a state


class Counted(NamedTuple):
    """A cache for all layers."""

    rank: np.ndarray  # int64 [keys]; 0 = not resident
    ring: np.ndarray  # int32 [capacity]: keys that wait, the oldest at `head`
    heap_rank: np.ndarray  # int64 [capacity]: of the others: the rank that each had when it was put in its place
    heap_key: np.ndarray  # int64 [capacity]
    state: np.ndarray  # int64 [3]: where the ring begins, how many wait, and how many are in the heap


def counted(keys: int, capacity: int) -> Counted:
    """Return an empty cache of `capacity` keys; 0 keeps nothing."""
    room = max(1, min(capacity, keys))
    return Counted(
        np.zeros(keys, np.int64),
        np.zeros(room if capacity else 0, np.int32),
        np.zeros(room, np.int64),
        np.zeros(room, np.int64),
        np.zeros(3, np.int64),
    )


def replay_counted(cache: Counted, block: Accesses, hit: np.ndarray) -> None:
    """Replay the accesses of a block one at a time, filling hit uint8 [n]."""
    if cache.ring.size:
        _replay(cache, block.key, block.first, hit)
    else:
        hit[:] = 0


@kernel(inline=False)
def _replay(cache, key, first, hit):
    """Replay key int32 [n], accesses from number first on, filling hit uint8 [n]."""
    capacity = cache.ring.size
    head, waiting, heaped = cache.state[_HEAD], cache.state[_WAITING], cache.state[_HEAPED]
    for i in range(hit.size):
        own = np.uint32(key[np.uint64(i)])
        rank = cache.rank[own]
        cache.rank[own] = (rank & -_ONCE) + _ONCE + first + i
        hit[np.uint64(i)] = rank > 0
        if rank == 0:
            if waiting + heaped == capacity:
                evicted = False
                while waiting and not evicted:
                    front = np.int64(cache.ring[np.uint64(head)])
                    head, waiting = head + 1 if head + 1 < capacity else 0, waiting - 1
                    if cache.rank[np.uint64(front)] < _TWICE:
                        cache.rank[np.uint64(front)] = 0
                        evicted = True
                    else:
                        _push(cache, heaped, cache.rank[np.uint64(front)], front)
                        heaped += 1
                if not evicted:
                    heaped = _evict_least(cache, heaped)
            tail = head + waiting
            cache.ring[np.uint64(tail if tail < capacity else tail - capacity)] = own
            waiting += 1
    cache.state[_HEAD], cache.state[_WAITING], cache.state[_HEAPED] = head, waiting, heaped


@kernel
def _push(cache, count, rank, key):
    """Put a key into the heap of ``count`` others."""
    at = count
    while at > 0 and cache.heap_rank[(at - 1) // 2] > rank:
        cache.heap_rank[at], cache.heap_key[at] = cache.heap_rank[(at - 1) // 2], cache.heap_key[(at - 1) // 2]
        at = (at - 1) // 2
    cache.heap_rank[at], cache.heap_key[at] = rank, key


@kernel
def _evict_least(cache, count):
    """Evict the key of least rank of the heap, of which there are ``count``; return how many are left."""
    while cache.heap_rank[0] != cache.rank[cache.heap_key[0]]:
        cache.heap_rank[0] = cache.rank[cache.heap_key[0]]
        sink(cache.heap_rank, cache.heap_key, count, 0)
    cache.rank[cache.heap_key[0]] = 0
    cache.heap_rank[0], cache.heap_key[0] = cache.heap_rank[count - 1], cache.heap_key[count - 1]
    sink(cache.heap_rank, cache.heap_key, count - 1, 0)
    return count - 1
