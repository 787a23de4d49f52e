"""Co-activation: which experts of a layer are chosen together more often than their popularity explains.

Lift of a pair is `n n_ij / (n_i n_j)` over n rows. Even without any affinity it is not 1: top-k draws without
replacement, and rare pairs scatter. So each figure stands beside that of a simulated null: rows that draw k distinct
experts one after another in proportion to the layer's counts, and nothing else.
"""

from typing import NamedTuple

import numpy as np

from moetrace.jit.compile import kernel

ROWS = 1 << 13  # evenly spread rows of a layer; figures grow with the rows, so the null has the same number
LEAST_EXPECTED = 1.0  # pairs that independence expects less often are left out


class Coactivation(NamedTuple):
    """Figures of one layer's pairs; NaN without pairs."""

    lift_p99: float  # 99th percentile of the lift over the pairs
    chi2_over_dof: float  # mean over the pairs of (n_ij - expected)^2 / expected


def coactivation(ids: np.ndarray, experts: int, seed: int | tuple[int, ...]) -> tuple[Coactivation, Coactivation]:
    """Return the figures of one layer, ids uint16 [n, k], and of its null."""
    ids = ids[(ids != 65535).all(axis=1)]
    if len(ids) > ROWS:
        ids = ids[np.arange(ROWS) * len(ids) // ROWS]
    ids = np.ascontiguousarray(ids)
    count = np.bincount(ids.ravel(), minlength=experts)
    null = draw(np.cumsum(count), len(ids), ids.shape[1], np.random.default_rng(seed))
    return _figures(ids, experts), _figures(null, experts)


def _figures(ids: np.ndarray, experts: int) -> Coactivation:
    together = np.zeros((experts, experts), np.int64)
    count_together(ids, together)
    single = np.diagonal(together)
    above = np.triu_indices(experts, 1)
    expected = np.outer(single, single)[above] / max(1, len(ids))
    kept = expected >= LEAST_EXPECTED
    if not kept.any():
        return Coactivation(np.nan, np.nan)
    seen, expected = together[above][kept], expected[kept]
    return Coactivation(float(np.quantile(seen / expected, 0.99)), float(((seen - expected) ** 2 / expected).mean()))


@kernel(inline=False)
def count_together(ids, together):
    """Count in together int64 [E, E] the rows of ids uint16 [n, k] that chose both experts (one, on the diagonal)."""
    for t in range(len(ids)):
        row = ids[t]
        for one in row:
            for other in row:
                together[one, other] += 1


@kernel(inline=False)
def draw(cumulative, rows, k, random):
    """Return ids uint16 [rows, k]: each row draws distinct experts in proportion to the steps of cumulative int64 [E].

    By trying again if an expert came before: a layer's counts give no expert more than 1 / k, so k tries are enough on
    average.
    """
    ids = np.empty((rows, k), np.uint16)
    for t in range(rows):
        for slot in range(k):
            before = 1
            while before:
                expert = np.searchsorted(cumulative, np.int64(random.random() * cumulative[-1]), side="right")
                ids[t, slot] = expert
                before = 0
                for other in range(slot):
                    before += ids[t, other] == expert
    return ids
