"""How unequally experts are chosen: statistics of the counts of one layer.

Every function takes `count`, the number of choices of each expert of one layer, int [E]; NaN where nothing was chosen.
"""

from typing import NamedTuple

import numpy as np

_MOST = 50.0  # exponents are sought from 0 to here: at 50 the second expert of a layer is never chosen


class Zipf(NamedTuple):
    """A power law `p(r) ~ r ** -exponent` beside the shares of the experts, ranked r = 1..E."""

    exponent: float  # of maximum likelihood over all E ranks
    misfit: float  # total variation distance between law and shares, 0 to 1: share of choices that the law misplaces
    least_squares: float  # slope of log share on log rank over the experts chosen at all, sign turned


def zipf(count: np.ndarray) -> Zipf:
    """Fit a power law to the ranked counts (Clauset, Shalizi and Newman 2009, section 3, on ranks, without a cut-off).

    The likelihood of the exponent s is `prod (r ** -s / sum(q ** -s)) ** count_r`; its derivative vanishes where the
    law's mean of log rank is that of the data, and that mean falls with s, so bisection finds the one s.
    """
    ranked = np.sort(np.asarray(count, np.float64))[::-1]
    total = ranked.sum()
    if total == 0 or ranked.size < 2:
        return Zipf(np.nan, np.nan, np.nan)
    share, log_rank = ranked / total, np.log(np.arange(1, ranked.size + 1))
    mean = share @ log_rank
    low, high = 0.0, _MOST
    while high - low > 1e-9:
        middle = (low + high) / 2
        weight = np.exp(-middle * log_rank)
        low, high = (middle, high) if weight @ log_rank > mean * weight.sum() else (low, middle)
    weight = np.exp(-low * log_rank)
    misfit = np.abs(share - weight / weight.sum()).sum() / 2
    chosen = share > 0
    x, y = log_rank[chosen], np.log(share[chosen])
    x -= x.mean()
    return Zipf(low, float(misfit), float(-(x @ y) / (x @ x)) if chosen.sum() > 1 else np.nan)


def gini(count: np.ndarray) -> float:
    """Gini coefficient over all E experts: 0 if all are chosen alike, 1 - 1/E if one takes all."""
    ranked = np.sort(np.asarray(count, np.float64))
    size, total = ranked.size, ranked.sum()
    if total == 0:
        return np.nan
    return float(2 * (np.arange(1, size + 1) @ ranked) / (size * total) - (size + 1) / size)


def top_share(count: np.ndarray, experts: int) -> float:
    """Share of the choices that goes to the given number of most chosen experts."""
    total = np.sum(count)
    return float(np.sort(count)[::-1][:experts].sum() / total) if total else np.nan


def max_over_mean(count: np.ndarray) -> float:
    """Choices of the most chosen expert over the mean of all E experts."""
    total = np.sum(count)
    return float(np.max(count) * np.size(count) / total) if total else np.nan


def jsd_bits(first: np.ndarray, second: np.ndarray) -> float:
    """Jensen-Shannon divergence of the shares of two counts, in bits: 0 alike, 1 disjoint (Lin 1991)."""
    if np.sum(first) == 0 or np.sum(second) == 0:
        return np.nan
    p, q = (np.asarray(count, np.float64) / np.sum(count) for count in (first, second))
    middle = (p + q) / 2

    def divergence(share: np.ndarray) -> float:
        some = share > 0
        return float(share[some] @ np.log2(share[some] / middle[some]))

    return max(0.0, (divergence(p) + divergence(q)) / 2)
