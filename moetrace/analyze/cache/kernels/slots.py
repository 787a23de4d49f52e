"""LFU and Belady in small caches of equal sizes, one access at a time: residents are in slots.

A slot holds a rank and, in its lowest bits, the expert. The least of a few dozen numbers takes one eighth of an
instruction each, which is quicker than a heap and has no branches. `eviction` says what the ranks mean.
"""

from typing import NamedTuple

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.analyze.cache.eviction import BELADY, LFU_IN_CACHE
from moetrace.analyze.cache.next_use import NEVER
from moetrace.jit.compile import kernel

_EXPERT_BITS, _TOUCH_BITS = 9, 27
_COUNT_SHIFT = _EXPERT_BITS + _TOUCH_BITS
MAX_EXPERTS, MAX_CHOICES = 1 << _EXPERT_BITS, 1 << _TOUCH_BITS  # a layer's, above which ranks would not fit
_NEVER = 1 << 53  # next uses are below: ranks have _EXPERT_BITS less than an int64
_EMPTY = np.iinfo(np.int64).max
_FIRST_TO_GO = np.iinfo(np.int64).min  # below every rank, even with some added
_LANES = 8  # slots in a register
_SMALL = 32  # slots: more take longer to compare than a wrong guess costs
_TOGETHER = 8  # layers


class Slots(NamedTuple):
    """A cache for each layer."""

    experts: int  # of a layer
    capacity: int
    rank: np.ndarray  # int64 [layers, >= capacity]: of each slot's expert, the least goes first; _EMPTY without one
    slot: np.ndarray  # int16 [layers, MAX_EXPERTS]: of each expert, -1 = not resident
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
    rank = np.full((layers, -(-max(1, capacity) // _LANES) * _LANES), _EMPTY)
    slot = np.full((layers, MAX_EXPERTS), -1, np.int16)
    if _is_small(capacity, experts):
        # Slots are filled with experts that there are not, the first to go: then there is always a victim.
        nobody = MAX_EXPERTS - 1 - np.arange(capacity)
        rank[:, :capacity] = _FIRST_TO_GO + (np.arange(capacity) << _EXPERT_BITS) + nobody
        slot[:, nobody] = np.arange(capacity)
    return Slots(
        experts,
        capacity,
        rank,
        slot,
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
    elif _is_small(cache.capacity, cache.experts):
        _replay_small(cache, rule, block.key, block.bounds, next_use, hit)
    elif rule == LFU_IN_CACHE:
        _replay_lfu(cache, block.key, block.bounds, hit)
    else:
        _replay(cache, rule == BELADY, block.key, block.bounds, next_use, hit)


def _is_small(capacity: int, experts: int) -> bool:
    """Whether it is quicker to look for a victim at each access, even if it hits, than to guess whether it does."""
    return capacity <= _SMALL and capacity + experts <= MAX_EXPERTS


@kernel(inline=False)
def _replay_small(cache, rule, key, bounds, next_use, hit):
    """Replay by a rule and, if it is small, a number of slots that the compiler knows: 4.2 ns for 4.7 with 8 experts.

    A vector load of ranks waits for the store of the last one; eight of their own do not.
    """
    lanes, kept = cache.rank.shape[1], 0 if rule == LFU_IN_CACHE else -1
    if rule == BELADY:
        _walk_small(cache, lanes, True, 0, key, bounds, next_use, hit)
    elif lanes == _LANES:
        _walk_small(cache, _LANES, False, kept, key, bounds, next_use, hit)
    else:
        _walk_small(cache, lanes, False, kept, key, bounds, next_use, hit)


@kernel
def _walk_small(cache, lanes, looks_ahead, kept, key, bounds, next_use, hit):
    """Eight layers in turn where their accesses are equally many: half the time with 8 experts."""
    layers, experts = cache.slot.shape[0], cache.experts
    for step in range((bounds.size - 1) // layers):
        for first in range(0, layers, _TOGETHER):
            last = min(first + _TOGETHER, layers)
            start, length = bounds[step * layers + first], bounds[step * layers + first + 1]
            length -= start
            equal = last - first == _TOGETHER
            for layer in range(first, last):
                equal &= bounds[step * layers + layer + 1] - bounds[step * layers + layer] == length
            if equal:
                for i in range(length):
                    for turn in range(_TOGETHER):
                        at, layer = np.uint64(start + turn * length + i), np.uint64(first + turn)
                        coming = next_use[at] if looks_ahead else 0
                        expert = np.uint64(key[at]) - layer * np.uint64(experts)
                        hit[at] = _demand_small(cache, lanes, looks_ahead, kept, layer, expert, coming)
                continue
            for layer in range(first, last):
                for i in range(bounds[step * layers + layer], bounds[step * layers + layer + 1]):
                    coming = next_use[i] if looks_ahead else 0
                    expert = np.uint64(key[i] - layer * experts)
                    hit[i] = _demand_small(cache, lanes, looks_ahead, kept, np.uint64(layer), expert, coming)


@kernel
def _demand_small(cache, lanes, looks_ahead, kept, layer, expert, next_use):
    """Return whether an access hits; `kept` masks the bits of a count that remain when a miss begins a new one.

    Without branches: a hit stores the old value again, and bits are chosen by masks, as LLVM makes a branch of
    some selects. Indices are unsigned, as a signed one may be negative, which is tested for each time. With both, LFU
    with 8 experts takes 4.7 ns an access, not 5.8.
    """
    rank, slot = cache.rank[layer], cache.slot[layer]
    own = np.int64(slot[expert])
    hits = ~(own >> 63)  # all bits, or none
    if looks_ahead:
        order = -next_use if next_use < _NEVER else NEVER - _NEVER - next_use
    else:
        count = (cache.accessed[layer, expert] & (hits | kept)) + 1
        cache.accessed[layer, expert] = count
        order = (count << _TOUCH_BITS) + cache.touches[layer]
        cache.touches[layer] += 1
    least = rank[0]
    for other in range(lanes):
        least = min(least, rank[other])
    victim = np.uint64(least & (MAX_EXPERTS - 1))
    place = np.int64(slot[victim])
    slot[victim] = place | ~hits
    own = (own & hits) | (place & ~hits)
    slot[expert] = own
    rank[np.uint64(own)] = (order << _EXPERT_BITS) | np.int64(expert)
    return hits & 1


@kernel(inline=False)
def _replay(cache, looks_ahead, key, bounds, next_use, hit):
    """Replay key int32 [n] one at a time by LFU or, with next_use int64 [n], Belady, filling hit uint8 [n]."""
    layers, experts = cache.slot.shape[0], cache.experts
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
    """Return an empty slot, if necessary by evicting the key of least rank."""
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
    """Replay key int32 [n] one at a time by LFU in cache, filling hit uint8 [n]."""
    layers, experts = cache.slot.shape[0], cache.experts
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
    """Append the rank of the key just admitted to those of its layer that wait for a second access."""
    tail = cache.head[layer] + cache.waiting[layer]
    cache.once[layer, tail if tail < cache.capacity else tail - cache.capacity] = order
    cache.waiting[layer] += 1
