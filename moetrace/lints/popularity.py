"""Experts that are chosen by nobody or by everybody: a part of the ids only, a shared expert, a collapsed layer."""

from collections.abc import Iterator
from math import comb, lgamma, log

import numpy as np

from moetrace.lints.finding import Finding, finding, many

_CAPPED = 8  # choices of an expert in a layer that count: warm-up or a single text must not decide
_BESIDE = 8  # chosen ids beside an unused part that say how often its own should be chosen
_EXPECTED = 20.0  # choices that an unused part lacks: as Poisson, a chance of 2e-9
_LOG_CHANCE = log(1e-6)
_EXPECTED_OF_EACH = 5.0  # of them, for each of its experts
_LEAST_STRIDED = 4  # experts whose ids are equal modulo a number
_PATTERNS = 10_000  # ways to choose the same number of unused experts: with more than these, a pattern is no chance
_EXPLAINED = 0.9  # of the unused experts, by a pattern
_ALWAYS, _MOSTLY = 0.99, 0.9
_NEAR = 0.9  # of the rows choose the next one, at most, beside a shared expert of some layers
_LEAST_ROWS = 32
_MANY_ROWS = 100  # from which a favourite of 90 % is no chance
_SECOND = 0.4  # 0.75 for Zipf's popularity with exponent 1.2, 6 of 64


def popularity(
    chosen: np.ndarray,
    made: np.ndarray,
    top_k: int,
    layer_index: np.ndarray,
    without: np.ndarray,
    distinct: np.ndarray | None = None,
) -> Iterator[Finding]:
    """`unused-experts`, `shared-expert` and `dominant-expert`.

    `chosen` int [layers, experts] is how often each expert was chosen, by `made` [layers] rows; layers that are true
    in `without` [layers] are not looked at. `distinct` [rows, layers, top_k] are ids of rows that do not repeat each
    other: what only warm-up or padding chooses is no favourite.
    """
    num_experts = chosen.shape[1]
    layers = np.flatnonzero(~without & (made > 0))
    if top_k >= num_experts or not layers.size:
        return
    yield from _unused(chosen[layers])
    share = np.minimum(chosen[layers] / made[layers, None], 1)
    if made[layers].min() < _LEAST_ROWS:
        return
    apart = share
    if distinct is not None and share.max() >= _MOSTLY:
        apart = _shares(distinct, layers, num_experts)
        share = np.minimum(share, apart + 0.02)
    if top_k > 1 and layers.size > 1:
        always = _shared_ones(share, int(made[layers].min()))
        if always.any():
            what = _named(share, always)
            yield finding("shared-expert", what, int(always.any(0).sum()), layer_index[layers[always.any(1)]])
        share, apart = np.where(always, 0, share), np.where(always, 0, apart)
    # Skewed routing has several favourites: where one has 90 %, the second has half of the rows or more. Rows that
    # repeat each other choose neither.
    most, second = share.max(axis=1), np.sort(apart, axis=1)[:, -2]
    one = (most >= _MOSTLY) & (second <= _SECOND) & (made[layers] >= _MANY_ROWS)
    if one.any():
        worst = int(np.argmax(np.where(one, most, 0)))
        where = many(int(np.count_nonzero(one)), "layer")
        what = (
            f"In {where}, one expert is chosen by at least {most[one].min():.0%} of the rows (layer "
            f"{layer_index[layers[worst]]}: expert {share[worst].argmax()}, {most[worst]:.0%})."
        )
        yield finding("dominant-expert", what, int(np.count_nonzero(one)), layer_index[layers[one]])


def _shared_ones(share: np.ndarray, rows: int) -> np.ndarray:
    """bool [layers, experts]: shared experts, by `share` of the rows that chose each, for layers with a minimum number
    of rows.

    One that is in all layers; with more rows also one that is in half of them or more, or equally many others in three
    of four layers, if no other expert comes near.
    """
    always = share >= _ALWAYS
    everywhere = always.all(0)
    if everywhere.any() or rows < _MANY_ROWS:
        return always & everywhere
    apart = always.any(1) & (np.where(always, 0, share).max(1) <= _NEAR)
    always &= apart[:, None]
    same = always.sum(0) >= max(2, share.shape[0] / 2)
    if same.any():
        return always & same
    number = always.sum(1)
    others = number == np.bincount(number[apart]).argmax() if apart.any() else apart
    return always & (apart & others)[:, None] & (np.count_nonzero(apart & others) >= max(2, 0.75 * apart.size))


def _named(share: np.ndarray, always: np.ndarray) -> str:
    """The sentence that names shared experts `always` [layers, experts]."""
    layers, ids = always.any(1), np.flatnonzero(always.any(0))
    where = "each layer" if layers.all() else f"{np.count_nonzero(layers)} of {layers.size} layers"
    if always[layers][:, ids].all():
        named = f"Expert {ids[0]} is" if ids.size == 1 else f"The experts {_ids(ids)} are"
    else:
        named, where = f"One of the experts {_ids(ids)} is", f"{where}, each its own"
        where = where.replace("each layer, each its own", "each layer, another in each")
    return f"{named} in at least {share[always].min():.0%} of the cells of {where}."


def _unused(chosen: np.ndarray) -> Iterator[Finding]:
    """`unused-experts`: runs of ids, or every n-th, that no layer chose, though those beside them are chosen often."""
    num_experts = chosen.shape[1]
    capped = np.minimum(chosen, _CAPPED).sum(0)
    used = np.flatnonzero(capped)
    if not used.size:
        return
    edges = np.r_[-1, used, num_experts]
    parts = []
    for before in np.flatnonzero(np.diff(edges) > 1).tolist():
        start, stop = int(edges[before]) + 1, int(edges[before + 1])
        at_end = start == 0 or stop == num_experts
        if stop - start < (1 if at_end else max(4, num_experts // 16)):
            continue
        beside = [used[max(0, before - _BESIDE) : before], used[before : before + _BESIDE]]
        means = [capped[ids].mean() for ids in beside if ids.size]
        each = min(means)  # the ids of the quieter side: popularity may fall towards one end
        if each >= _EXPECTED_OF_EACH and each * (stop - start) >= _EXPECTED:
            parts.append((start, stop))
    if _log_chance(chosen, parts) > _LOG_CHANCE:  # a short part, in which rare experts did not occur
        parts = []
    count = sum(stop - start for start, stop in parts)
    runs = (f"{start} to {stop - 1}" if stop - start > 1 else str(start) for start, stop in parts[:4])
    named = ", ".join(runs) + (", …" if len(parts) > 4 else "")
    strided, of = _strided(capped)
    if strided > count:
        count, named = strided, of
    if count:
        are = "is" if count == 1 else "are"
        what = f"{count} of {num_experts} experts ({named}) {are} not chosen in any layer, though the others are."
        if parts == [(0, 1)] and count == 1:
            what += " Ids may count from 1."
        yield finding("unused-experts", what, count)


def _log_chance(chosen: np.ndarray, parts: list[tuple[int, int]]) -> float:
    """The logarithm of the chance of such runs, if each layer's unused experts had any ids; `chosen` is of layers."""
    num_experts, runs, ids = chosen.shape[1], len(parts), sum(stop - start for start, stop in parts)
    unused = np.count_nonzero(chosen == 0, axis=1).tolist()
    places = _log_comb(num_experts - ids + runs, runs)
    return places + sum(_log_comb(num_experts - ids, n - ids) - _log_comb(num_experts, n) for n in unused)


def _log_comb(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def _strided(capped: np.ndarray) -> tuple[int, str]:
    """How many experts are those of other ranks, if the ids go round the ranks; which ones. `capped` is [experts]."""
    num_experts, best = capped.size, (0, "")
    dead = int(np.count_nonzero(capped == 0))
    if num_experts < 2 * _LEAST_STRIDED or comb(num_experts, dead) < _PATTERNS:
        return best
    for ranks in range(2, num_experts // _LEAST_STRIDED + 1):
        rank = np.arange(num_experts) % ranks
        unused = np.flatnonzero(np.bincount(rank, weights=capped) == 0)
        gone = np.isin(rank, unused)
        count, each = int(np.count_nonzero(gone)), capped[~gone].mean()
        patterned = comb(num_experts, count) >= _PATTERNS and count >= _EXPLAINED * dead
        if count > best[0] and patterned and each >= _EXPECTED_OF_EACH and each * count >= _EXPECTED * unused.size:
            others = np.setdiff1d(np.arange(ranks), unused)
            best = count, f"all whose id modulo {ranks} is not {' or '.join(map(str, others[:8].tolist()))}"
    return best


def _shares(ids: np.ndarray, layers: np.ndarray, num_experts: int) -> np.ndarray:
    """float [layers, experts]: how many of the rows of `ids` that route in a layer choose an expert."""
    shares = np.zeros((layers.size, num_experts))
    if len(ids) >= _LEAST_ROWS:
        for at, layer in enumerate(layers.tolist()):
            counts = np.bincount(ids[:, layer].ravel(), minlength=num_experts)[:num_experts]
            shares[at] = counts / max(1, np.count_nonzero(ids[:, layer].min(1) < num_experts))
    return shares


def _ids(ids: np.ndarray) -> str:
    return ", ".join(map(str, ids[:8].tolist())) + (", …" if ids.size > 8 else "")
