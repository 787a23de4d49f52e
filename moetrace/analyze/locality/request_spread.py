"""How much requests differ: the part of the variance of choices that the request explains, and the position-0 sink."""

import numpy as np

from moetrace.jit.compile import kernel


def between_requests(ids: np.ndarray, starts: np.ndarray, experts: int) -> float:
    """Intraclass correlation of one layer: 0 if requests are alike, 1 if the request decides everything.

    Let R requests have n_r rows that made choices, a share p_re of which chose expert e, and a share p_e of all rows.
    Chance adds `m p_e (1 - p_e)` to the variance of p_re, where `m = mean(1 / n_r)`: the variance of a mean of n_r
    rows, averaged over the requests. (One over the mean number of rows is less where lengths differ: for independent
    rows of 2 to 1,941 that left a correlation of 0.05.) The correlation is
    `sum_e (var_r(p_re) - m p_e (1 - p_e)) / sum_e (1 - m) p_e (1 - p_e)`, var with R - 1 below: the variance between
    requests over that of a single choice, both without what chance adds (the one-way random effects ICC for yes-no
    outcomes by moments, Fleiss 1981; requests count alike).

    Args:
        ids: uint16 [n, k], the rows of one request after those of another.
        starts: Row at which each request begins, int64 [R].
        experts: Experts of a layer.

    Returns:
        The correlation, by chance also below 0. NaN with fewer than two requests, where there is no variance, or where
        all requests have one row.
    """
    rows, total, share, square = _per_request(ids, starts, experts)
    some = int((rows > 0).sum())
    if some < 2:
        return np.nan
    variance = (square - share**2 / some) / (some - 1)
    p = total / rows.sum()
    single = (p * (1 - p)).sum()
    chance = (1 / rows[rows > 0]).mean()
    return float((variance.sum() - chance * single) / ((1 - chance) * single)) if single > 0 and chance < 1 else np.nan


def sink(ids: np.ndarray, experts: int) -> float:
    """Return the mean overlap of two requests' rows at position 0 in one layer; NaN with fewer than two of them.

    ids uint16 [R, k] are those rows. `sum_e c_e (c_e - 1) / ((R - 1) sum_e c_e)` for counts c_e: 1 if all requests
    begin with the same experts, as the attention sink of a BOS token makes them.
    """
    ids = ids[(ids != 65535).any(axis=1)]
    count = np.bincount(ids[ids != 65535], minlength=experts).astype(np.float64)
    return float((count * (count - 1)).sum() / ((len(ids) - 1) * count.sum())) if len(ids) > 1 else np.nan


@kernel(inline=False)
def _per_request(ids, starts, experts):
    """Return rows [R] that made choices, choices [E], sum [E] and sum of squares [E] of the shares of the requests."""
    rows = np.zeros(starts.size, np.int64)
    total, share, square = np.zeros(experts, np.int64), np.zeros(experts), np.zeros(experts)
    count = np.zeros(experts, np.int64)
    for request in range(starts.size):
        count[:] = 0
        stop = starts[request + 1] if request + 1 < starts.size else len(ids)
        for t in range(starts[request], stop):
            some = 0
            for slot in range(ids.shape[1]):
                if ids[t, slot] != 65535:
                    count[ids[t, slot]] += 1
                    some = 1
            rows[request] += some
        for expert in range(experts):
            total[expert] += count[expert]
            part = count[expert] / max(rows[request], 1)
            share[expert] += part
            square[expert] += part * part
    return rows, total, share, square
