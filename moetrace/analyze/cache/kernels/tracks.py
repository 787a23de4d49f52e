"""Belady of equal sizes, one access at a time: which keys are kept from one access to the next, as a question of room.

A key that hits was kept for a *span*: after its last access, up to before this one. At each access between, the cache
holds it and the key that is accessed, so that a cache of C keys keeps at most C - 1 spans at once. Belady evicts the
key whose span would end last; so it keeps the spans that are kept if all are taken by their ends, each if there is room
beside those before it. To find room, the spans are laid on C - 1 tracks: a span goes on the track whose last one ended
latest, but before it, and is now the last one itself. No such track: the access misses, as does any other whose key was
touched as early. Only the ends of tracks must be known, a bit each at its moment, and where each key was touched last:
no next uses, and no order of residents. An access takes 5 to 6 ns, with a heap of residents over 20.
"""

from typing import NamedTuple

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.analyze.cache.kernels.stack import count_ones
from moetrace.jit.compile import kernel

_WORD = 64  # bits


class Tracks(NamedTuple):
    """The tracks of a cache: of a block, and of the moments before it that still matter."""

    ends: np.ndarray  # uint64 [words]: bit of each moment at which the last span of a track ended
    words: np.ndarray  # uint64 [words / 64]: bit of each of these that is not 0


class BeladyCaches:
    """Caches of some capacities in keys. They share the numbers of moments, of accesses and some before."""

    def __init__(self, keys: int, capacities: list[int]) -> None:
        """Take a number of keys, and empty caches."""
        self._tracks = [min(capacity, keys) - 1 for capacity in capacities]  # -1: a cache that keeps nothing
        self._moments = max([0, *self._tracks])
        # Tracks without a span end before all accesses, each at a moment of its own.
        self._ends = [np.arange(self._moments - count, self._moments, dtype=np.int32) for count in self._tracks]
        self._last = np.full(keys, -1, np.int32)

    def begin(self, block: Accesses) -> np.ndarray:
        """Return when the key of each access of the next block was touched before, -1 = never: int32 [n]."""
        self._forget()
        before = np.empty(block.key.size, np.int32)
        _note(block.key, self._last, self._moments, before)
        return before

    def replay(self, cache: int, before: np.ndarray, hit: np.ndarray) -> None:
        """Replay the block through a cache, filling hit uint8 [n]."""
        if self._tracks[cache] < 0:
            hit[:] = 0
            return
        moments = self._moments + before.size
        groups = -(-moments // _WORD**2)
        tracks = Tracks(np.zeros(groups * _WORD, np.uint64), np.zeros(groups, np.uint64))
        with np.errstate(over="ignore"):  # without Numba, a product that counts bits would warn
            _replay(tracks, self._ends[cache], before, self._moments, hit)

    def end(self, count: int) -> None:
        """End a block of this number of accesses."""
        self._moments += count

    def _forget(self) -> None:
        """Number the moments anew, without those at which no key was touched last and no track ends."""
        matters, touched = np.zeros(self._moments, bool), np.flatnonzero(self._last >= 0)
        matters[self._last[touched]] = True
        for ends in self._ends:
            matters[ends] = True
        kept = np.flatnonzero(matters)
        number = np.empty(self._moments, np.int32)  # a cumsum takes 10 times as long
        number[kept] = np.arange(kept.size)
        self._last[touched] = number[self._last[touched]]
        self._ends = [number[ends] for ends in self._ends]
        self._moments = kept.size


@kernel(inline=False)
def _note(key, last, first, before):
    """Fill before int32 [n] with the moments in last int32 [keys]; note there the accesses, from moment first on."""
    for i in range(before.size):
        own = np.uint32(key[np.uint64(i)])
        before[np.uint64(i)] = last[own]
        last[own] = first + i


@kernel(inline=False)
def _replay(tracks, ends, before, first, hit):
    """Fill hit uint8 [n] of accesses from moment first on, with before int32 [n].

    ``tracks`` has no end yet; ends int32 [tracks] are those before the block, and become those after it.
    """
    for i in range(ends.size):
        _mark(tracks, np.uint64(ends[i]))
    none_until = 0  # moments before this one at which no track ends, as was seen
    for i in range(hit.size):
        touched, now = np.int64(before[np.uint64(i)]), first + i
        hits = touched >= none_until
        if hits and touched != now - 1:  # else the span is of no access
            if _take_last_end(tracks, np.uint64(touched)):
                _mark(tracks, np.uint64(now - 1))
            else:
                hits = False
                none_until = touched + 1
        hit[np.uint64(i)] = hits
    _find_all(tracks, ends)


@kernel
def _take_last_end(tracks, moment):
    """Unmark the last moment, up to this one, at which a track ends; return whether there is one.

    Most often it is in the same word.
    """
    word, below = moment // np.uint64(_WORD), np.uint64(_WORD - 1) - moment % np.uint64(_WORD)
    left = tracks.ends[word] >> below
    if left:
        lowest = (left & (~left + np.uint64(1))) << below
    else:
        word = _last_word(tracks, np.int64(word) - 1)
        if word < 0:
            return False
        word = np.uint64(word)
        left = tracks.ends[word]
        lowest = left & (~left + np.uint64(1))
    left = tracks.ends[word] ^ lowest
    tracks.ends[word] = left
    if not left:
        tracks.words[word // np.uint64(_WORD)] &= ~_bit(word)
    return True


@kernel
def _last_word(tracks, word):
    """Return the last word, up to this one, that is not 0; -1 if there is none."""
    if word < 0:
        return -1
    group = word // _WORD
    left = tracks.words[group] >> np.uint64(_WORD - 1 - word % _WORD)
    if left:
        return word - _zeros_below(left)
    group -= 1
    while group >= 0 and not tracks.words[group]:
        group -= 1
    return group * _WORD + _WORD - 1 - _zeros_below(tracks.words[group]) if group >= 0 else -1


@kernel
def _zeros_below(word):
    """Count the bits below the lowest that is 1; there is one."""
    return count_ones((word - np.uint64(1)) & ~word)


@kernel
def _mark(tracks, moment):
    """A track ends at a moment."""
    word = moment // np.uint64(_WORD)
    before = tracks.ends[word]
    tracks.ends[word] = before | _bit(moment)
    if not before:
        tracks.words[word // np.uint64(_WORD)] |= _bit(word)


@kernel
def _bit(number):
    """Return the bit of a number in its word: the first one's is the highest, as the lowest 1 is found quickest."""
    return np.uint64(1) << (np.uint64(_WORD - 1) - number % np.uint64(_WORD))


@kernel
def _find_all(tracks, ends):
    """Fill ends int32 [tracks] with the moments at which tracks end, in order."""
    count = 0
    for word in range(tracks.ends.size):
        left = tracks.ends[word]
        while left:
            last = word * _WORD + _WORD - 1 - _zeros_below(left)
            left &= left - np.uint64(1)
            ends[count] = last
            count += 1
