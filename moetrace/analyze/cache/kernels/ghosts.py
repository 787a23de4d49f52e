"""S3-FIFO and ARC, which remember what they evicted: of equal sizes, one access at a time.

Each has queues of resident keys and of ghosts, and a key is in at most one of them.
"""

from typing import NamedTuple

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.jit.compile import kernel

S3_FIFO, ARC = 0, 1
_SMALL, _MAIN, _GHOST = 0, 1, 2  # S3-FIFO's queues
_ONCE, _OFTEN, _GHOST_ONCE, _GHOST_OFTEN = 0, 1, 2, 3  # ARC's: T1, T2, B1 and B2
_QUEUES, _NOWHERE = 4, 4
_PROMOTED = 2  # S3-FIFO: accesses in the small queue that lead to the main one
_MOST_ACCESSES = 3  # S3-FIFO: that the main queue counts


class Queues(NamedTuple):
    """A cache: rings from the sentinel `keys + 4 * pool + queue` to the oldest key, the newest, and back."""

    capacity: int  # of each pool, in keys
    newer: np.ndarray  # int32 [keys + 4 * pools]
    older: np.ndarray  # int32 [keys + 4 * pools]
    where: np.ndarray  # uint8 [keys]: the queue; 4 = none
    length: np.ndarray  # int64 [pools, 4]
    accessed: np.ndarray  # uint8 [keys]: S3-FIFO: how often since it came into its queue
    evicts: np.ndarray  # uint8 [pools]: S3-FIFO: whether anything was evicted yet
    target: np.ndarray  # float64 [pools]: ARC: the length that T1 should have


def queues(keys: int, capacity: int, pools: int) -> Queues:
    """Return an empty cache with `capacity` in each of the pools."""
    ring = np.arange(keys + _QUEUES * pools, dtype=np.int32)
    length, evicts = np.zeros((pools, _QUEUES), np.int64), np.zeros(pools, np.uint8)
    where, accessed = np.full(keys, _NOWHERE, np.uint8), np.zeros(keys, np.uint8)
    return Queues(min(capacity, 2 * keys), ring, ring.copy(), where, length, accessed, evicts, np.zeros(pools))


def replay_queues(cache: Queues, policy: int, block: Accesses, layers: int, hit: np.ndarray) -> None:
    """Replay the accesses of a block one at a time, filling hit uint8 [n]; policy is S3_FIFO or ARC."""
    if cache.capacity == 0:
        hit[:] = 0
        return
    (_replay_arc if policy == ARC else _replay_s3_fifo)(cache, block.key, block.bounds, layers, hit)


@kernel
def _add(cache, pool, queue, key):
    """Put a key, which is in no queue, into one of its pool as the newest."""
    sentinel = cache.where.size + _QUEUES * pool + queue
    newest = cache.older[sentinel]
    cache.newer[newest], cache.older[key] = key, newest
    cache.newer[key], cache.older[sentinel] = sentinel, key
    cache.where[key] = queue
    cache.length[pool, queue] += 1


@kernel
def _remove(cache, pool, key):
    """Take a key out of the queue of its pool that it is in."""
    cache.newer[cache.older[key]], cache.older[cache.newer[key]] = cache.newer[key], cache.older[key]
    cache.length[pool, cache.where[key]] -= 1
    cache.where[key] = _NOWHERE


@kernel
def _take_oldest(cache, pool, queue):
    """Remove the oldest key of a queue that has one, and return it."""
    key = np.int64(cache.newer[cache.where.size + _QUEUES * pool + queue])
    _remove(cache, pool, key)
    return key


@kernel(inline=False)
def _replay_s3_fifo(cache, key, bounds, layers, hit):
    """Replay key int32 [n], event by event, through S3-FIFO, filling hit uint8 [n]."""
    small = max(1, cache.capacity // 10)
    ghosts = cache.capacity * 9 // 10
    for event in range(bounds.size - 1):
        pool = event % layers if cache.length.shape[0] > 1 else 0
        for i in range(bounds[event], bounds[event + 1]):
            k = np.int64(key[i])
            hit[i] = cache.where[k] <= _MAIN
            if hit[i]:
                cache.accessed[k] = min(cache.accessed[k] + 1, _MOST_ACCESSES)
                continue
            known = cache.where[k] == _GHOST
            if known:
                _remove(cache, pool, k)
            while cache.length[pool, _SMALL] + cache.length[pool, _MAIN] >= cache.capacity:
                _evict_s3_fifo(cache, pool, small, ghosts)
            early = cache.evicts[pool] == 0 and cache.length[pool, _SMALL] >= small
            _add(cache, pool, _MAIN if known or early else _SMALL, k)
            cache.accessed[k] = 0


@kernel
def _evict_s3_fifo(cache, pool, small, ghosts):
    """Evict a key, if need be after others got another chance; perhaps none, if all that were in small do."""
    cache.evicts[pool] = 1
    if cache.length[pool, _MAIN] > cache.capacity - small or cache.length[pool, _SMALL] == 0:
        victim = _take_oldest(cache, pool, _MAIN)
        while cache.accessed[victim]:
            cache.accessed[victim] -= 1
            _add(cache, pool, _MAIN, victim)
            victim = _take_oldest(cache, pool, _MAIN)
        return
    while cache.length[pool, _SMALL]:
        victim = _take_oldest(cache, pool, _SMALL)
        if cache.accessed[victim] < _PROMOTED:
            if ghosts:
                if cache.length[pool, _GHOST] == ghosts:
                    _take_oldest(cache, pool, _GHOST)
                _add(cache, pool, _GHOST, victim)
            return
        cache.accessed[victim] = 0
        _add(cache, pool, _MAIN, victim)


@kernel(inline=False)
def _replay_arc(cache, key, bounds, layers, hit):
    """Replay key int32 [n], event by event, through ARC, filling hit uint8 [n]."""
    for event in range(bounds.size - 1):
        pool = event % layers if cache.length.shape[0] > 1 else 0
        length = cache.length[pool]
        for i in range(bounds[event], bounds[event + 1]):
            k = np.int64(key[i])
            where = np.int64(cache.where[k])
            hit[i] = where <= _OFTEN
            if where == _GHOST_ONCE:
                more = max(1.0, length[_GHOST_OFTEN] / length[_GHOST_ONCE])
                cache.target[pool] = min(float(cache.capacity), cache.target[pool] + more)
            elif where == _GHOST_OFTEN:
                less = max(1.0, length[_GHOST_ONCE] / length[_GHOST_OFTEN])
                cache.target[pool] = max(0.0, cache.target[pool] - less)
            if where == _NOWHERE:
                _make_room(cache, pool, length)
            else:
                if not hit[i]:
                    _replace(cache, pool, length, where == _GHOST_OFTEN)
                _remove(cache, pool, k)
            _add(cache, pool, _ONCE if where == _NOWHERE else _OFTEN, k)


@kernel
def _make_room(cache, pool, length):
    """Before the admission of a key that is no ghost."""
    if length[_ONCE] + length[_GHOST_ONCE] == cache.capacity:
        if length[_ONCE] < cache.capacity:
            _take_oldest(cache, pool, _GHOST_ONCE)
            _replace(cache, pool, length, False)
        else:
            _take_oldest(cache, pool, _ONCE)
        return
    every = length[_ONCE] + length[_OFTEN] + length[_GHOST_ONCE] + length[_GHOST_OFTEN]
    if every >= cache.capacity:
        if every == 2 * cache.capacity:
            _take_oldest(cache, pool, _GHOST_OFTEN)
        _replace(cache, pool, length, False)


@kernel
def _replace(cache, pool, length, of_often):
    """Turn a resident key into a ghost, unless there is room."""
    if length[_ONCE] + length[_OFTEN] < cache.capacity:
        return
    target = cache.target[pool]
    if length[_ONCE] and (length[_ONCE] > target or (of_often and length[_ONCE] == target)):
        _add(cache, pool, _GHOST_ONCE, _take_oldest(cache, pool, _ONCE))
    else:
        _add(cache, pool, _GHOST_OFTEN, _take_oldest(cache, pool, _OFTEN))
