"""Predictability: how many of a row's experts a simple predictor names, from the layer before or the token before.

The predictor is naive Bayes (multinomial, add-one smoothing): an expert j scores
`log (n_j + 1) + sum over the source's experts i of log ((n_ij + 1) / (sum_i n_ij + E))`, where n_ij counts the pairs of
choices in the rows trained on, and n_j the choices of j. It names the k experts that score highest.
"""

import numpy as np

from moetrace.jit.compile import kernel

FEW_REQUESTS = 4  # with fewer, rows are split instead of requests
# Each half is thinned evenly to this number of rows. Training rows fill a table of E * E pairs. Test rows cost the most
# time, and 4,096 rows of 8 choices leave a recall a standard error of half a point.
TRAIN_ROWS, TEST_ROWS = 1 << 15, 1 << 12


def halves(request: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and to test on, int64: those of even and of odd requests.

    `request` int [n] numbers the requests; with fewer than FEW_REQUESTS of them, even and odd rows.
    """
    distinct, index = np.unique(request, return_inverse=True)
    odd = (index if distinct.size >= FEW_REQUESTS else np.arange(request.size)) % 2 == 1
    train, test = np.flatnonzero(~odd), np.flatnonzero(odd)
    return _thinned(train, TRAIN_ROWS), _thinned(test, TEST_ROWS)


def recall(
    source: np.ndarray, target: np.ndarray, train: np.ndarray, test: np.ndarray, gap: int, experts: int
) -> tuple[float, float]:
    """Recall at k of the predictor, and of the k experts most chosen in training.

    Recall is `sum |named & chosen| / sum |chosen|` over the tested rows. Pairs in which either row made no choice are
    left out.

    Args:
        source: Choices that a prediction is made from, uint16 [n, k].
        target: Choices that are predicted, uint16 [n, k].
        train: Rows t to train on, int64.
        test: Rows t to test on, int64.
        gap: The experts of target's row t are predicted from those of source's row t - gap.
        experts: Experts of a layer.

    Returns:
        Both recalls; NaN if there is nothing to train on or to test.
    """
    pairs, chosen = np.zeros((experts, experts), np.int32), np.zeros(experts, np.int64)
    _count_pairs(source, target, train, gap, pairs, chosen)
    if not chosen.any():
        return np.nan, np.nan
    prior = np.log(chosen + 1.0).astype(np.float32)
    # Logarithms of 32 bits: in 64 they take longer than a layer's whole test.
    weight = np.log(pairs.astype(np.float32) + 1) - np.log(pairs.sum(axis=0) + experts).astype(np.float32)
    k = target.shape[1]
    named, popular, total = _count_named(source, target, test, gap, prior, weight, k)
    return (named / total, popular / total) if total else (np.nan, np.nan)


def _thinned(rows: np.ndarray, most: int) -> np.ndarray:
    return rows if rows.size <= most else rows[np.arange(most) * rows.size // most]


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
    """Return how many of target's experts are among the k of highest score, and of highest prior; and all of them."""
    score = np.empty(prior.size, np.float32)
    popularity = np.empty(prior.size)
    for expert in range(prior.size):
        popularity[expert] = _in_top(prior, prior[expert], k)
    named = popular = 0.0
    total = 0
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
                named += _in_top(score, score[now[slot]], k)
    return named, popular, total


@kernel(inline=False)
def _in_top(score, own, k):
    """Return the chance that one of this score is among the k highest if lots decide between equal ones."""
    above = np.int32(0)
    for expert in range(score.size):
        above = np.int32(above + np.int32(score[expert] > own))
    if above >= k:
        return 0.0
    equal = np.int32(0)
    for expert in range(score.size):
        equal = np.int32(equal + np.int32(score[expert] == own))
    return min(1.0, (k - above) / equal)
