"""Experts by Zipf's law: in each layer a random permutation ranks the experts, and rank r has popularity
(r + 1) ** -zipf, the same for all requests, prompts and outputs.

A row takes top_k distinct experts by successive
draws without replacement (Plackett-Luce), which is the distribution of Gumbel top-k over log-popularity (Yellott 1977;
Kool et al. 2019, arXiv:1903.06059); its slots hold them in draw order. With `stick` p, each expert of the request's
previous row in that layer first stays with probability p, independently (those that stay come first, in their old
order); the rest is drawn as above, without those. An expert that went may be drawn again, so two successive rows share
more than p of their experts; and popularity gets a little flatter (of 128 experts, top-8, zipf 0.6, the most popular is
in 42.8 % of the rows with p = 0, in 41.2 % with p = 0.3).
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

import numpy as np

from moetrace.generators.streams import LOW_32, SHIFT_11, SHIFT_32, check_seed, permutations
from moetrace.jit.compile import kernel
from moetrace.jit.random import GOLDEN, mix
from moetrace.spec.errors import UsageError
from moetrace.spec.model import Model

MAX_ZIPF = 20.0  # well before the popularity of the last of 65535 experts leaves the range of float64


class _Tables(NamedTuple):
    """The tables of a draw.

    threshold uint64 [E], alias uint16 [E]: Walker's alias table over ranks, thresholds in units of 2**-32;
    weight, tail float64 [E]: popularity of each rank, and of it with all after it; expert_of_rank uint8 or uint16
    [L, E].
    """

    threshold: np.ndarray
    alias: np.ndarray
    weight: np.ndarray
    tail: np.ndarray
    expert_of_rank: np.ndarray


class ZipfDrawer:
    """Draw experts by Zipf popularity without replacement, with a share kept from the previous row.

    `slots` is the number of requests alive at a time: two of them never have the same request number modulo `slots`.
    A request's rows must come in order of position and start at 0.
    """

    def __init__(self, model: Model, zipf: float, stick: float, seed: int, slots: int = 1) -> None:
        """Prepare the tables; a UsageError names the option whose value makes no sense."""
        if not (isfinite(zipf) and 0 <= zipf <= MAX_ZIPF):
            raise UsageError(f"zipf is {zipf}: give an exponent from 0 (uniform) to {MAX_ZIPF:g}.")
        if not 0 <= stick <= 1:
            raise UsageError(f"stick is {stick}: give a share from 0 to 1.")
        check_seed(seed)
        if isinstance(model.experts, list) or isinstance(model.top_k, list):
            raise UsageError(
                f"Zipf's law draws equally many experts in every layer, but those of {model.name} differ: use --like."
            )
        weight = np.arange(1, model.most_experts + 1, dtype=np.float64) ** -zipf
        expert_of_rank = permutations(seed, model.moe_layers, model.most_experts)
        self.tables = _Tables(*_alias_table(weight), weight, np.cumsum(weight[::-1])[::-1].copy(), expert_of_rank)
        self.keep = np.uint64(round(stick * 2**32))
        self.seed = np.uint64(seed)
        # Ranks of the last row of each living request; without stick nobody reads them again and one place will do.
        self.last = np.zeros((slots if stick else 1, model.moe_layers, model.most_top_k), np.uint16)

    def rank(self, expert_of_rank: np.ndarray) -> None:
        """Give the experts other ranks, uint8 or uint16 [L, E]; a row keeps its experts, not their ranks."""
        if self.keep:
            layer = np.arange(len(expert_of_rank))[:, None]
            rank_of_expert = np.argsort(expert_of_rank, axis=1).astype(np.uint16)
            self.last[:] = rank_of_expert[layer, self.tables.expert_of_rank[layer, self.last]]
        self.tables = self.tables._replace(expert_of_rank=expert_of_rank)

    def draw(self, request: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Return the experts uint8 or uint16 [rows, layers, top_k] of the rows (request, position int32 [rows])."""
        experts = np.empty((len(request), *self.last.shape[1:]), self.tables.expert_of_rank.dtype)
        with np.errstate(over="ignore"):  # uint64 wraps on purpose; NumPy would warn where Numba's JIT is disabled
            _draw_rows(self.tables, self.keep, self.seed, request, position, self.last, experts)
        return experts


def _alias_table(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return threshold uint64 [E] in units of 2**-32 and alias uint16 [E] (Walker's table, built as by Vose 1991)."""
    share = weight * (len(weight) / weight.sum())
    threshold = np.full(len(weight), 2**32, np.uint64)
    alias = np.arange(len(weight), dtype=np.uint16)
    small = [rank for rank in range(len(weight)) if share[rank] < 1]
    large = [rank for rank in range(len(weight)) if share[rank] >= 1]
    while small and large:
        low, high = small.pop(), large[-1]
        threshold[low] = round(share[low] * 2**32)
        alias[low] = high
        share[high] -= 1 - share[low]
        if share[high] < 1:
            small.append(large.pop())
    return threshold, alias


@kernel(inline=False)
def _draw_rows(tables, keep, seed, request, position, last, experts):
    """Fill experts [rows, L, k]; last uint16 [slots, L, k] holds the ranks of each living request's previous row."""
    rows, layers, k = experts.shape
    seen = np.zeros(len(tables.weight), np.int64)  # rank -> number of the last cell that took it: never cleared
    cell = 0
    for row in range(rows):
        slot = request[row] % len(last)
        token = mix(seed + mix((np.uint64(request[row]) << SHIFT_32) | np.uint64(position[row])))
        for layer in range(layers):
            cell += 1
            state = mix(token + np.uint64(layer) * GOLDEN)
            ranks = last[slot, layer]
            kept = 0
            if keep and position[row] > 0:
                state, kept = _keep_ranks(keep, state, ranks, seen, cell)
            _draw_ranks(tables, state, kept, ranks, seen, cell)
            for j in range(k):
                experts[row, layer, j] = tables.expert_of_rank[layer, ranks[j]]


@kernel(inline=False)
def _keep_ranks(keep, state, ranks, seen, cell):
    """Move the ranks that stay (each with probability keep / 2**32) to the front; return state and their count."""
    kept = 0
    for j in range(len(ranks)):
        state += GOLDEN
        rank = ranks[j]
        stays = (mix(state) >> SHIFT_32) < keep
        ranks[kept] = rank
        seen[rank] = cell if stays else 0
        kept += 1 if stays else 0
    return state, kept


@kernel(inline=False)
def _draw_ranks(tables, state, count, ranks, seen, cell):
    """Draw ranks[count:] by popularity among the unseen: by rejection from the alias table, then by scans.

    Rejection has no memory, so after any number of tries the missing ranks are again a draw by popularity among the
    unseen: the switch to the scan changes the time, not the distribution.
    """
    experts = len(tables.weight)
    # As many repeats as cost about what the scans do, where popularity is so unequal that most tries repeat.
    for _ in range(len(ranks) + min(experts // 2 + 8, 3 * len(ranks) + 16)):
        if count == len(ranks):
            return
        state += GOLDEN
        bits = mix(state)
        rank = ((bits >> SHIFT_32) * np.uint64(experts)) >> SHIFT_32
        rank = rank if (bits & LOW_32) < tables.threshold[rank] else np.uint64(tables.alias[rank])
        # Without a branch on `seen`, which no processor can predict: a repeat is overwritten by the next draw.
        ranks[count] = rank
        count += 0 if seen[rank] == cell else 1
        seen[rank] = cell
    _scan_ranks(tables.weight, tables.tail, state, count, ranks, seen, cell)


@kernel(inline=False)
def _scan_ranks(weight, tail, state, count, ranks, seen, cell):
    """Draw ranks[count:] by popularity among the unseen, however little popularity is left to them."""
    first = 0
    for j in range(count, len(ranks)):
        while seen[first] == cell:
            first += 1
        # The popularity of the unseen, which is at least that of `first`, the largest in its tail: no digits are lost.
        total = tail[first]
        for rank in ranks[:j]:
            total -= weight[rank] if rank > first else 0.0
        state += GOLDEN
        share = np.float64(mix(state) >> SHIFT_11) * 2.0**-53 * total
        for rank in range(first, len(weight)):
            if seen[rank] != cell:
                ranks[j] = rank
                share -= weight[rank]
                if share < 0:
                    break
        seen[ranks[j]] = cell
