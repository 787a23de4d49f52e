"""LFU and Belady in small caches of equal sizes, one access at a time: what is resident stands in slots.

A slot holds a rank and, in its lowest bits, the expert. The least of a few dozen numbers is found in as many eighths of
instructions, which is quicker than a heap and has no branches. `eviction` says what the ranks mean.
"""

from typing import NamedTuple

import numpy as np

from moetrace.analyze.accesses import Accesses
from moetrace.analyze.eviction import BELADY, LFU_IN_CACHE
from moetrace.analyze.next_use import NEVER
from moetrace.engine.compile import kernel

_EXPERT_BITS, _TOUCH_BITS = 9, 27
_COUNT_SHIFT = _EXPERT_BITS + _TOUCH_BITS
MAX_EXPERTS, MAX_CHOICES = 1 << _EXPERT_BITS, 1 << _TOUCH_BITS  # a layer's, above which ranks would not fit
_NEVER = 1 << 53  # next uses are below: ranks have _EXPERT_BITS less than an int64
_EMPTY = np.iinfo(np.int64).max
_LANES = 8  # slots in a register


class Slots(NamedTuple):
    """A cache for each layer."""

    capacity: int
    rank: np.ndarray  # int64 [layers, >= capacity]: of what is in each slot, the least goes first; _EMPTY if nothing is
    slot: np.ndarray  # int16 [layers, experts]: of each expert, -1 = not resident
    residents: np.ndarray  # int64 [layers]
    accessed: np.ndarray  # int64 [layers, experts]: how often
    touches: np.ndarray  # int64 [layers]: accesses so far
    # LFU in cache: ranks of those that were admitted and, if theirs is still the same, not accessed again. They are the
    # next victims, in this order. A ring a layer: a miss adds one and takes one, so that it never overflows.
    once: np.ndarray  # int64 [layers, capacity]
    head: np.ndarray  # int64 [layers]
    waiting: np.ndarray  # int64 [layers]


def slots(layers: int, experts: int, capacity: int) -> Slots:
    """Return empty caches of `capacity` (0 keeps nothing) in each layer."""
    capacity = min(capacity, experts)
    return Slots(
        capacity,
        np.full((layers, -(-max(1, capacity) // _LANES) * _LANES), _EMPTY),
        np.full((layers, experts), -1, np.int16),
        np.zeros(layers, np.int64),
        np.zeros((layers, experts), np.int64),
        np.zeros(layers, np.int64),
        np.zeros((layers, max(1, capacity)), np.int64),
        np.zeros(layers, np.int64),
        np.zeros(layers, np.int64),
    )


def replay_slots(cache: Slots, rule: int, block: Accesses, next_use: np.ndarray, hit: np.ndarray) -> None:
    """Replay the accesses of a block one at a time, filling hit uint8 [n]; `rule` is one of `eviction`."""
    if cache.capacity == 0:
        hit[:] = 0
    elif rule == LFU_IN_CACHE:
        _replay_lfu(cache, block.key, block.bounds, hit)
    else:
        _replay(cache, rule == BELADY, block.key, block.bounds, next_use, hit)


@kernel(inline=False)
def _replay(cache, looks_ahead, key, bounds, next_use, hit):
    layers, experts = cache.slot.shape
    for step in range((bounds.size - 1) // layers):
        for layer in range(layers):
            rank, slot, accessed = cache.rank[layer], cache.slot[layer], cache.accessed[layer]
            start, stop = bounds[step * layers + layer], bounds[step * layers + layer + 1]
            touched = cache.touches[layer] - start
            for i in range(start, stop):
                expert = key[i] - layer * experts
                if looks_ahead:
                    order = -next_use[i] if next_use[i] < _NEVER else NEVER - _NEVER - next_use[i]
                else:
                    accessed[expert] += 1
                    order = (accessed[expert] << _TOUCH_BITS) + touched + i
                own = np.int64(slot[expert])
                hit[i] = own >= 0
                if own < 0:
                    own = _vacate(cache, layer, rank, slot)
                    slot[expert] = own
                rank[own] = (order << _EXPERT_BITS) | expert
            cache.touches[layer] += stop - start


@kernel
def _vacate(cache, layer, rank, slot):
    """Return an empty slot, evicting what has the least rank if there is none."""
    if cache.residents[layer] < cache.capacity:
        cache.residents[layer] += 1
        return cache.residents[layer] - 1
    least = rank[0]
    for other in range(rank.size):
        least = min(least, rank[other])
    own = np.int64(slot[least & (MAX_EXPERTS - 1)])
    slot[least & (MAX_EXPERTS - 1)] = -1
    return own


@kernel(inline=False)
def _replay_lfu(cache, key, bounds, hit):
    layers, experts = cache.slot.shape
    for step in range((bounds.size - 1) // layers):
        for layer in range(layers):
            rank, slot, accessed = cache.rank[layer], cache.slot[layer], cache.accessed[layer]
            start, stop = bounds[step * layers + layer], bounds[step * layers + layer + 1]
            touched = cache.touches[layer] - start
            for i in range(start, stop):
                expert = key[i] - layer * experts
                own = np.int64(slot[expert])
                hit[i] = own >= 0
                if own >= 0:
                    accessed[expert] += 1
                    rank[own] = (accessed[expert] << _COUNT_SHIFT) | ((touched + i) << _EXPERT_BITS) | expert
                    continue
                accessed[expert] = 1
                order = (1 << _COUNT_SHIFT) | ((touched + i) << _EXPERT_BITS) | expert
                own = _vacate_once(cache, layer, rank, slot)
                _wait(cache, layer, order)
                slot[expert], rank[own] = own, order
            cache.touches[layer] += stop - start


@kernel
def _vacate_once(cache, layer, rank, slot):
    """Return an empty slot as `_vacate` does: most often by the eviction of one that was accessed once only."""
    if cache.residents[layer] == cache.capacity:
        once, head, waiting = cache.once[layer], cache.head[layer], cache.waiting[layer]
        while waiting:
            order = once[head]
            head, waiting = head + 1 if head + 1 < cache.capacity else 0, waiting - 1
            own = np.int64(slot[order & (MAX_EXPERTS - 1)])
            if own >= 0 and rank[own] == order:
                slot[order & (MAX_EXPERTS - 1)] = -1
                cache.head[layer], cache.waiting[layer] = head, waiting
                return own
        cache.waiting[layer] = 0
    return _vacate(cache, layer, rank, slot)


@kernel
def _wait(cache, layer, order):
    tail = cache.head[layer] + cache.waiting[layer]
    cache.once[layer, tail if tail < cache.capacity else tail - cache.capacity] = order
    cache.waiting[layer] += 1
