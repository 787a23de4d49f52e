"""Overlap: the chance that an expert chosen at one token of a request is chosen again so many tokens later."""

import numpy as np

from moetrace.engine.compile import kernel

LAGS = (1, 2, 4, 8, 16, 32, 64)


def overlap(ids: np.ndarray, order: np.ndarray, starts: np.ndarray, lags: np.ndarray, experts: int) -> np.ndarray:
    """Return the overlap of one layer at each lag, float64 [lags]; NaN where no request is that long.

    ids uint16 [n, k] are the layer's choices, which `order` int32 [n] puts into the order to look at; requests
    begin at `starts` int64 [R] of that order; lags are int64, increasing.

    The overlap is `sum |S_t & S_t+lag| / sum |S_t|` over all pairs of rows of one request, `lag` rows apart, that both
    made choices in this layer. Where all rows choose k, that is the mean of `|S_t & S_t+lag| / k`.
    """
    masks, size = np.zeros((-(-experts // 64), order.size), np.uint64), np.zeros(order.size, np.int64)
    _mark(ids, order, masks, size)
    shared, chosen = _shared(masks, size, starts, lags)
    return np.divide(shared, chosen, out=np.full(lags.size, np.nan), where=chosen > 0)


@kernel(inline=False)
def _mark(ids, order, masks, size):
    """Set the bit of every expert that row order[t] chose, in masks uint64 [words, n], and count them in size [n]."""
    for t in range(order.size):
        row = ids[order[t]]
        for slot in range(row.size):
            expert = np.uint64(row[slot])
            if expert != np.uint64(65535):
                masks[expert >> np.uint64(6), t] |= np.uint64(1) << (expert & np.uint64(63))
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
