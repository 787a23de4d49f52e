"""Overlap: the chance that an expert chosen at one token of a request is chosen again a number of tokens later."""

from typing import NamedTuple

import numpy as np

from moetrace.jit.compile import kernel

LAGS = (1, 2, 4, 8, 16, 32, 64)


class Marks(NamedTuple):
    """The choices of one layer's rows as bits: masks uint64 [E / 64, n], and how many they are, size int32 [n]."""

    masks: np.ndarray
    size: np.ndarray

    def ordered(self, order: np.ndarray) -> "Marks":
        """Return the rows in another order, int [n]."""
        return Marks(np.take(self.masks, order, axis=1), np.take(self.size, order))


def mark(ids: np.ndarray, experts: int) -> Marks:
    """Return the choices of one layer, ids uint16 [n, k], as bits."""
    marks = Marks(np.zeros((-(-experts // 64), len(ids)), np.uint64), np.zeros(len(ids), np.int32))
    _mark(ids, *marks)
    return marks


def overlap(ids: np.ndarray, order: np.ndarray, starts: np.ndarray, lags: np.ndarray, experts: int) -> np.ndarray:
    """Return `marked_overlap` of one layer's choices, ids uint16 [n, k], put into an order, int [n]."""
    return marked_overlap(mark(ids, experts).ordered(order), starts, lags)


def marked_overlap(marks: Marks, starts: np.ndarray, lags: np.ndarray) -> np.ndarray:
    """Overlap of one layer at each lag.

    The overlap is `sum |S_t & S_t+lag| / sum |S_t|` over all pairs of rows of one request, `lag` rows apart, that both
    made choices in this layer. Where all rows choose k, that is the mean of `|S_t & S_t+lag| / k`.

    Args:
        marks: The choices of the layer.
        starts: Row at which each request begins, int64 [R].
        lags: Distances in rows, int64, increasing.

    Returns:
        float64 [lags]; NaN where no request is that long.
    """
    shared, chosen = _shared(marks.masks, marks.size, starts, lags)
    return np.divide(shared, chosen, out=np.full(lags.size, np.nan), where=chosen > 0)


@kernel(inline=False)
def _mark(ids, masks, size):
    """Set the bit of every expert that a row chose, in masks uint64 [words, n], and count them in size [n]."""
    for t in range(len(ids)):
        for expert in ids[t]:
            if expert != 65535:
                masks[expert >> 6, t] |= np.uint64(1) << np.uint64(expert & 63)
                size[t] += 1


@kernel(inline=False)
def _shared(masks, size, starts, lags):
    """Return for each lag how many experts both rows of the pairs chose, and how many the earlier ones: int64 [lags].

    Loops without a condition inside, request by request: vector instructions make this 20 times as fast.
    """
    shared, chosen = np.zeros(lags.size, np.int64), np.zeros(lags.size, np.int64)
    for request in range(starts.size):
        start = starts[request]
        stop = starts[request + 1] if request + 1 < starts.size else size.size
        for index in range(lags.size):
            lag = lags[index]
            if lag >= stop - start:
                break
            earlier, later = size[start : stop - lag], size[start + lag : stop]
            for t in range(later.size):
                chosen[index] += earlier[t] if later[t] > 0 else 0
            for word in range(len(masks)):
                shared[index] += _common_bits(masks[word, start : stop - lag], masks[word, start + lag : stop])
    return shared, chosen


@kernel(inline=False)
def _common_bits(one, other):
    """Count the bits set in both, uint64 [n]: by adding up ever wider fields, which LLVM knows as one instruction."""
    count = 0
    for t in range(one.size):
        bits = one[t] & other[t]
        bits = bits - ((bits >> np.uint64(1)) & np.uint64(0x5555555555555555))
        bits = (bits & np.uint64(0x3333333333333333)) + ((bits >> np.uint64(2)) & np.uint64(0x3333333333333333))
        bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        count += np.int64((bits * np.uint64(0x0101010101010101)) >> np.uint64(56))
    return count
