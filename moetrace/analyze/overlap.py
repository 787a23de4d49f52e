"""Overlap: the chance that an expert chosen at one token of a request is chosen again so many tokens later."""

import numpy as np

from moetrace.engine.compile import kernel

LAGS = (1, 2, 4, 8, 16, 32, 64)


def overlap(ids: np.ndarray, order: np.ndarray, first: np.ndarray, lags: np.ndarray, experts: int) -> np.ndarray:
    """Return the overlap of one layer at each lag, float64 [lags]; NaN where no request is that long.

    ids uint16 [n, k] are the layer's choices, which `order` int32 [n] puts into the order to look at; `first` int32 [n]
    is where the request begins that a row of that order belongs to; lags are int64, increasing.

    The overlap is `sum |S_t & S_t+lag| / sum |S_t|` over all pairs of rows of one request, `lag` rows apart, that both
    made choices in this layer. Where all rows choose k, that is the mean of `|S_t & S_t+lag| / k`.
    """
    words = -(-experts // 64)
    masks, size = np.zeros((words, order.size), np.uint64), np.zeros(order.size, np.int32)
    _mark(ids, order, masks, size)
    shared, chosen = _shared(masks, size, first, lags)
    return np.divide(shared, chosen, out=np.full(lags.size, np.nan), where=chosen > 0)


@kernel(inline=False)
def _mark(ids, order, masks, size):
    """Set the bit of every expert that row order[t] chose, in masks uint64 [words, n], and count them in size [n]."""
    one = np.uint64(1)
    for t in range(order.size):
        row = ids[order[t]]
        count = 0
        for slot in range(row.size):
            expert = np.uint64(row[slot])
            if expert != np.uint64(65535):
                masks[expert >> np.uint64(6), t] |= one << (expert & np.uint64(63))
                count += 1
        size[t] = count


@kernel(inline=False)
def _shared(masks, size, first, lags):
    """Return for each lag how many experts both rows of the pairs chose, and how many the earlier ones, int64 [lags]."""
    shared, chosen = np.zeros(lags.size, np.int64), np.zeros(lags.size, np.int64)
    fives, threes, fours = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333), np.uint64(0x0F0F0F0F0F0F0F0F)
    ones = np.uint64(0x0101010101010101)
    for index in range(lags.size):
        lag = lags[index]
        both = earlier = 0
        for t in range(lag, size.size):
            valid = (first[t] <= t - lag) & (size[t] > 0)
            earlier += size[t - lag] if valid else 0
        for word in range(masks.shape[0]):
            mask = masks[word]
            for t in range(lag, size.size):
                bits = mask[t] & mask[t - lag] if first[t] <= t - lag else np.uint64(0)
                # Bits set, by adding up ever wider fields: LLVM makes it the processor's own instruction.
                bits = bits - ((bits >> np.uint64(1)) & fives)
                bits = (bits & threes) + ((bits >> np.uint64(2)) & threes)
                bits = (bits + (bits >> np.uint64(4))) & fours
                both += np.int64((bits * ones) >> np.uint64(56))
        shared[index], chosen[index] = both, earlier
    return shared, chosen
