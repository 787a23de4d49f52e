"""Stack distances: one pass tells what LRU caches of every capacity hit (Mattson et al. 1970), for equal sizes.

The distance of an access is how many other keys were touched since its own was: an LRU cache hits if it holds more than
that. A first access, which no cache hits, has the number of all keys (of its layer) for a distance. At once, distances
are those before the event. Then they tell the hits of all caches that hold the largest event of their pool; a smaller
one keeps what of it fits first, which is no part of what a larger one keeps.

Each layer's own stack (`LayerStacks`) is the place of each expert in it, in a few vector registers; that of all layers
(`GlobalStack`), too large for this, is a bit for each moment at which a key was touched last, and counts of bits.
"""

from typing import NamedTuple

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.jit.compile import kernel

MAX_EXPERTS = np.iinfo(np.int16).max  # of a layer, whose distances are int16
# Places are filled up to a multiple of this: two registers of AVX-512, four of AVX2. A loop of a length that is known
# has nothing before or after it: 128 experts take 3.4 ns an access, not 4.5.
_LANES = 128
_TOGETHER = 8  # layers
_GROUP = 8  # experts of a row that are touched in one pass over their layer's stack
_WORD = 64  # bits


class LayerStacks(NamedTuple):
    """The LRU stack of each layer."""

    # Number of experts touched after each expert. Those never touched come last in any order; filled up.
    place: np.ndarray  # uint8 or, for more than 256 experts, int16 [layers, >= experts]
    seen: np.ndarray  # int64 [layers]: experts touched so far


class GlobalStack(NamedTuple):
    """The LRU stack of all keys: moments, of which those are marked at which a key was touched last."""

    moment: np.ndarray  # int64 [keys]: when each was touched last, -1 = never
    key_at: np.ndarray  # int32 [moments]: which was
    marks: np.ndarray  # uint64 [moments / 64]: bit of each marked moment
    words: np.ndarray  # int32 [moments / 64]: marks in each word
    groups: np.ndarray  # int32 [moments / 4096]: marks in each group of words
    now: np.ndarray  # int64 [1]: the next moment


def layer_stacks(layers: int, experts: int) -> LayerStacks:
    """Return the stacks before the first access."""
    dtype = np.uint8 if experts <= 256 else np.int16
    place = np.full((layers, -(-experts // _LANES) * _LANES), np.iinfo(dtype).max, dtype)
    place[:, :experts] = np.arange(experts)
    return LayerStacks(place, np.zeros(layers, np.int64))


def global_stack(keys: int) -> GlobalStack:
    """Return the stack before the first access."""
    groups = -(-2 * keys // _WORD**2)
    moments = groups * _WORD**2
    return GlobalStack(
        np.full(keys, -1),
        np.zeros(moments, np.int32),
        np.zeros(moments // _WORD, np.uint64),
        np.zeros(moments // _WORD, np.int32),
        np.zeros(groups, np.int32),
        np.zeros(1, np.int64),
    )


def layer_distances(stacks: LayerStacks, block: Accesses, experts: int, sequential: bool, distance: np.ndarray) -> None:
    """Fill distance int16 [n] of the accesses of the next block."""
    # Groups of any other size would have to be filled up, which is slower than one by one.
    if sequential and block.row_choices and block.row_choices % _GROUP == 0:
        walk = _walk_groups
    else:
        walk = _walk_layers if sequential else _walk_layers_at_once
    walk(stacks, block.key, block.bounds, experts, distance)


def global_distances(stack: GlobalStack, block: Accesses, sequential: bool, distance: np.ndarray) -> None:
    """Fill distance int32 [n] of the accesses of the next block."""
    _walk_all(stack, block.key, block.bounds, sequential, distance)


def count_distances(distance: np.ndarray, block: Accesses, layers: int, count: np.ndarray) -> None:
    """Add the distances to count int64 [phases, layers, keys + 1].

    A pass of its own over a buffer of distances: within the walks a histogram costs twice as much.
    """
    _count(distance, block.bounds, block.phase, layers, count.reshape(len(count), -1), count.shape[2])


@kernel(inline=False)
def _count(distance, bounds, phase, layers, count, width):
    """Add to count [phases, layers * width]. Indices are unsigned, as signed ones are tested each: 0.3 ns, not 0.6."""
    for step in range(phase.size):
        of, first = count[phase[step]], step * layers
        at = np.uint64(bounds[first])
        for layer in range(layers):
            own, stop = np.uint64(layer * width), np.uint64(bounds[first + layer + 1])
            while at < stop:
                of[own + np.uint64(distance[at])] += 1
                at += np.uint64(1)


@kernel
def _touch(place, expert):
    """Put an expert on top of its layer's stack, those above it one lower; return where it was.

    Places differ, so that no byte has to be stored on its own: a vector load that waits for one takes 3 times as long.
    """
    own = place[expert]
    for first in range(0, place.size, _LANES):
        lanes = place[first : first + _LANES]
        for other in range(_LANES):
            before = lanes[other]
            lanes[other] = (before + (before < own)) * (before != own)
    return own


@kernel
def _touch_layer(stacks, layer, experts, expert):
    """Touch an expert; return its distance. Unsigned: with 8 experts 2.2 to 2.6 ns an access, not 2.7 to 2.9."""
    layer = np.uint64(layer)
    own = np.int64(_touch(stacks.place[layer], np.uint64(expert)))
    new = own >= stacks.seen[layer]
    stacks.seen[layer] += new
    return experts if new else own


@kernel(inline=False)
def _walk_layers(stacks, key, bounds, experts, distance):
    """Eight layers in turn: an access waits for the stores of the one before it to the same stack, and this hides it.

    With 128 experts 5.4 ns an access one layer after the other, 3.0 four in turn, 2.4 eight. The number of layers is a
    constant where it can be, so that LLVM writes out their accesses one after another: it is 3.1 if it cannot.
    """
    layers = stacks.seen.size
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
                        at, layer = np.uint64(start + turn * length + i), first + turn
                        distance[at] = _touch_layer(stacks, layer, experts, key[at] - layer * experts)
                continue
            for layer in range(first, last):
                for at in range(bounds[step * layers + layer], bounds[step * layers + layer + 1]):
                    distance[at] = _touch_layer(stacks, layer, experts, key[at] - layer * experts)


@kernel
def _touch_group(stacks, layer, experts, key, start, distance):
    """Touch eight different experts, one after another, in one pass over their stack; set their distances.

    Each lay where it did before the first of them, and one lower for each touched before it that came from below it.
    """
    place, first = stacks.place[np.uint64(layer)], np.uint32(layer * experts)
    # Unsigned or constant indices, as a signed one may be negative, which is tested for each time: 1.5 ns an access,
    # not 2.3.
    keys, found = key[start : start + _GROUP], distance[start : start + _GROUP]
    at_a = np.uint32(keys[0]) - first
    at_b = np.uint32(keys[1]) - first
    at_c = np.uint32(keys[2]) - first
    at_d = np.uint32(keys[3]) - first
    at_e = np.uint32(keys[4]) - first
    at_f = np.uint32(keys[5]) - first
    at_g = np.uint32(keys[6]) - first
    at_h = np.uint32(keys[7]) - first
    a, b, c, d = place[at_a], place[at_b], place[at_c], place[at_d]
    e, f, g, h = place[at_e], place[at_f], place[at_g], place[at_h]
    found[0] = a
    found[1] = b + (a > b)
    found[2] = c + (a > c) + (b > c)
    found[3] = d + (a > d) + (b > d) + (c > d)
    found[4] = e + (a > e) + (b > e) + (c > e) + (d > e)
    found[5] = f + (a > f) + (b > f) + (c > f) + (d > f) + (e > f)
    found[6] = g + (a > g) + (b > g) + (c > g) + (d > g) + (e > g) + (f > g)
    found[7] = h + (a > h) + (b > h) + (c > h) + (d > h) + (e > h) + (f > h) + (g > h)
    if stacks.seen[layer] < experts:
        _mark_new(stacks, layer, experts, key, start, distance)
    for lane in range(0, place.size, _LANES):
        lanes = place[lane : lane + _LANES]
        for other in range(_LANES):
            x = lanes[other]
            lanes[other] = x + (x < a) + (x < b) + (x < c) + (x < d) + (x < e) + (x < f) + (x < g) + (x < h)
    place[at_a] = 7
    place[at_b] = 6
    place[at_c] = 5
    place[at_d] = 4
    place[at_e] = 3
    place[at_f] = 2
    place[at_g] = 1
    place[at_h] = 0


@kernel
def _mark_new(stacks, layer, experts, key, start, distance):
    """Give those of a group that is about to be touched for the first time the distance of first accesses."""
    seen = stacks.seen[layer]
    for i in range(start, start + _GROUP):
        if stacks.place[layer, key[i] - layer * experts] >= seen:
            distance[i] = experts
            stacks.seen[layer] += 1


@kernel(inline=False)
def _walk_groups(stacks, key, bounds, experts, distance):
    """As `_walk_layers`, where all layers have the same number of accesses in a step, in groups of eight different
    experts.

    Per access 1.5 ns with 128 experts and 1.8 with 256, one by one 1.8 and 2.8.
    """
    layers = stacks.seen.size
    for step in range((bounds.size - 1) // layers):
        length = bounds[step * layers + 1] - bounds[step * layers]
        for first in range(0, layers, _TOGETHER):
            last = min(first + _TOGETHER, layers)
            for group in range(0, length, _GROUP):
                for layer in range(first, last):
                    start = bounds[step * layers + layer] + group
                    _touch_group(stacks, layer, experts, key, start, distance)


@kernel(inline=False)
def _walk_layers_at_once(stacks, key, bounds, experts, distance):
    """Fill distance int16 [n] of key int32 [n], all accesses of an event at once."""
    layers = stacks.seen.size
    for step in range((bounds.size - 1) // layers):
        for layer in range(layers):
            start, stop = bounds[step * layers + layer], bounds[step * layers + layer + 1]
            place, seen = stacks.place[layer], stacks.seen[layer]
            for i in range(start, stop):
                own = np.int64(place[key[i] - layer * experts])
                distance[i] = experts if own >= seen else own
            for i in range(start, stop):
                _touch_layer(stacks, layer, experts, key[i] - layer * experts)


@kernel(inline=False)
def _walk_all(stack, key, bounds, sequential, distance):
    """Fill distance int32 [n] of key int32 [n] in the stack of all layers."""
    for event in range(bounds.size - 1):
        for i in range(bounds[event], bounds[event + 1]):
            distance[i] = _newer(stack, stack.moment[key[i]])
            if sequential:
                _mark(stack, key[i])
        if not sequential:
            for i in range(bounds[event], bounds[event + 1]):
                _mark(stack, key[i])


@kernel
def _newer(stack, moment):
    """Count the marks after a moment."""
    if moment < 0:
        return stack.moment.size
    word, group = moment // _WORD, moment // _WORD**2
    # The bits above the moment's; by two shifts, as one of 64 would do nothing.
    above = stack.marks[word] >> np.uint64(moment % _WORD) >> np.uint64(1)
    newer = count_ones(above)
    for other in range(word + 1, (group + 1) * _WORD):
        newer += stack.words[other]
    for other in range(group + 1, stack.groups.size):
        newer += stack.groups[other]
    return newer


@kernel
def count_ones(word):
    """Count the bits of a word that are 1 (LLVM makes one instruction of this)."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@kernel
def _mark(stack, key):
    """Touch a key now, in place of when it was touched before."""
    if stack.now[0] == stack.key_at.size:
        _renumber(stack)
    if stack.moment[key] >= 0:
        _flip(stack, stack.moment[key], -1)
    stack.moment[key] = stack.now[0]
    stack.key_at[stack.now[0]] = key
    _flip(stack, stack.now[0], 1)
    stack.now[0] += 1


@kernel
def _flip(stack, moment, change):
    """Mark a moment (change 1), or take its mark away (-1)."""
    stack.marks[moment // _WORD] ^= np.uint64(1) << np.uint64(moment % _WORD)
    stack.words[moment // _WORD] += change
    stack.groups[moment // _WORD**2] += change


@kernel
def _renumber(stack):
    """Make room: the marked moments, at most half of all, become the first ones."""
    now = 0
    for moment in range(stack.key_at.size):
        if stack.marks[moment // _WORD] >> np.uint64(moment % _WORD) & np.uint64(1):
            stack.moment[stack.key_at[moment]] = now
            stack.key_at[now] = stack.key_at[moment]
            now += 1
    for word in range(stack.marks.size):
        stack.marks[word] = np.uint64(0)
        stack.words[word] = 0
    for group in range(stack.groups.size):
        stack.groups[group] = 0
    for moment in range(now):
        _flip(stack, moment, 1)
    stack.now[0] = now
