"""Predictability: how many of a row's experts a simple predictor names, from the layer before or the token before.

The predictor is naive Bayes (multinomial, add-one smoothing): an expert j scores
`log (n_j + 1) + sum over the source's experts i of log ((n_ij + 1) / (sum_i n_ij + E))`, where n_ij counts the pairs of
choices in the rows trained on, and n_j the choices of j. It names the k experts that score highest.
"""

import numpy as np

from moetrace.engine.compile import kernel

FEW_REQUESTS = 4  # with fewer, rows are split instead of requests
ROWS = 1 << 16  # each half is thinned to so many rows, evenly: it then takes as long however long the trace


def halves(request: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and to test on, int64: those of even and of odd requests.

    `request` int [n] numbers the requests; with fewer than FEW_REQUESTS of them, even and odd rows.
    """
    distinct, index = np.unique(request, return_inverse=True)
    odd = (index if distinct.size >= FEW_REQUESTS else np.arange(request.size)) % 2 == 1
    train, test = np.flatnonzero(~odd), np.flatnonzero(odd)
    return _thinned(train), _thinned(test)


def recall(
    source: np.ndarray, target: np.ndarray, train: np.ndarray, test: np.ndarray, gap: int, experts: int
) -> tuple[float, float]:
    """Return the recall at k of the predictor, and that of the k experts most chosen in training.

    source, target uint16 [n, k]: experts of target's row t are predicted from those of source's row t - gap;
    train, test int64 hold the rows t. Pairs in which either row made no choice are left out. Recall is
    `sum |named & chosen| / sum |chosen|` over the tested rows; NaN if there is nothing to train on or to test.
    """
    pairs, chosen = np.zeros((experts, experts), np.int32), np.zeros(experts, np.int64)
    _count_pairs(source, target, train, gap, pairs, chosen)
    if not chosen.any():
        return np.nan, np.nan
    prior = np.log(chosen + 1.0).astype(np.float32)
    weight = np.log((pairs + 1.0) / (pairs.sum(axis=0) + experts)).astype(np.float32)
    k = target.shape[1]
    named, popular, total = _count_named(source, target, test, gap, prior, weight, k)
    return (named / total, popular / total) if total else (np.nan, np.nan)


def _thinned(rows: np.ndarray) -> np.ndarray:
    if rows.size <= ROWS:
        return rows
    return rows[np.arange(ROWS) * rows.size // ROWS]


@kernel(inline=False)
def _count_pairs(source, target, rows, gap, pairs, chosen):
    """Count the pairs (source's expert, target's expert) in pairs int32 [E, E], and target's experts in chosen [E]."""
    k = target.shape[1]
    for index in range(rows.size):
        before, now = source[rows[index] - gap], target[rows[index]]
        some = False
        for slot in range(k):
            some |= before[slot] != 65535
        if not some:
            continue
        for slot in range(k):
            if now[slot] != 65535:
                chosen[now[slot]] += 1
        for slot in range(k):
            if before[slot] == 65535:
                continue
            pair = pairs[before[slot]]
            for other in range(k):
                if now[other] != 65535:
                    pair[now[other]] += 1


@kernel(inline=False)
def _count_named(source, target, rows, gap, prior, weight, k):
    """Return how many of target's experts are among the k that score highest, by score and by prior; and all of them.

    An expert is among them if fewer than k score higher, equal scores going to the lower id.
    """
    score = np.empty(prior.size, np.float32)
    named = popular = total = 0
    popularity = np.empty(prior.size, np.bool_)
    for expert in range(prior.size):
        popularity[expert] = _above(prior, expert) < k
    for index in range(rows.size):
        before, now = source[rows[index] - gap], target[rows[index]]
        score[:] = prior
        some = False
        for slot in range(k):
            if before[slot] != 65535:
                some = True
                terms = weight[before[slot]]
                for expert in range(score.size):
                    score[expert] += terms[expert]
        if not some:
            continue
        for slot in range(k):
            if now[slot] != 65535:
                total += 1
                popular += popularity[now[slot]]
                named += _above(score, now[slot]) < k
    return named, popular, total


@kernel(inline=False)
def _above(score, expert):
    """Count the experts that stand above this one."""
    own = score[expert]
    count = 0
    for other in range(score.size):
        count += (score[other] > own) | ((score[other] == own) & (other < expert))
    return count
