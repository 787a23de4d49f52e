"""Counting what hits: by phase, by step and by request, and what these counts say."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.jit.compile import kernel
from moetrace.trace.format import Trace
from moetrace.trace.schema import NOT_RECORDED, PHASE_NAMES

# Columns of a tally's totals.
HITS, MISSED_BYTES, RECORDED, AGREEING, WHOLE_ROWS, WHOLE_STEPS, RECORDED_HITS = range(7)
_TOTALS = 7
ACCESSED, COMPULSORY, STEPS, CHOOSING_ROWS, CHOOSING_STEPS = range(5)  # columns of what was demanded
MOST_CACHES = 64  # whose hits are looked at together, a bit each
MAX_GROUPS = 4096  # of requests, that a bootstrap draws from
_DRAWS, _AT_A_TIME = 1000, 50
QUANTILES = (50, 95, 99)


class RequestGroups(NamedTuple):
    """The requests of a trace, in at most MAX_GROUPS groups; each is a group of its own if there are not more."""

    number: np.ndarray  # int32 [requests], ascending
    groups: int

    def group_of(self, request: np.ndarray) -> np.ndarray:
        """Return the group of each row, int32 [n]."""
        return (np.searchsorted(self.number, request) % self.groups).astype(np.int32)


class HitTally(NamedTuple):
    """What one policy at one capacity hit so far, by phase of step."""

    # int64 [phases, 7]: hits, missed bytes, accesses with a record, and those that agree with it, rows and steps whose
    # choices all hit, and accesses that hit by the record
    totals: np.ndarray
    group_hits: np.ndarray  # int64 [phases, groups]
    step_misses: list[Counter[int]]  # [phases]: how many steps had so many misses


class DemandCounts(NamedTuple):
    """What was demanded so far, by phase of step, whoever hit it."""

    counts: np.ndarray  # int64 [phases, 5]: accesses, first accesses, steps, rows and steps with a choice
    group_accesses: np.ndarray  # int64 [phases, groups]
    seen: np.ndarray  # uint8 [keys]: whether each was accessed


def requests_of(trace: Trace) -> RequestGroups:
    """Return the requests of a trace, from a pass over its rows that reads no ids."""
    number = np.zeros(0, np.int32)
    for part in trace.row_blocks():
        number = np.union1d(number, part.request)
    return RequestGroups(number, max(1, min(number.size, MAX_GROUPS)))


def no_tally(groups: int) -> HitTally:
    """Return what is known before the first access."""
    phases = len(PHASE_NAMES)
    return HitTally(
        np.zeros((phases, _TOTALS), np.int64), np.zeros((phases, groups), np.int64), [Counter() for _ in PHASE_NAMES]
    )


def no_demand(keys: int, groups: int) -> DemandCounts:
    """Return what is known before the first access."""
    phases = len(PHASE_NAMES)
    return DemandCounts(np.zeros((phases, 5), np.int64), np.zeros((phases, groups), np.int64), np.zeros(keys, np.uint8))


def count_demand(demand: DemandCounts, block: Accesses, group: np.ndarray, layers: int) -> None:
    """Add the accesses of a block; group int32 [rows] is that of each row's request."""
    _count(block.key, block.row, block.bounds, layers, block.phase, group, demand)
    some = np.diff(block.bounds[::layers]) > 0
    np.add.at(demand.counts[:, CHOOSING_STEPS], block.phase, some)
    np.add.at(demand.counts[:, CHOOSING_ROWS], block.phase, some & (block.step_rows == 1))
    if block.choice.size:
        made = (block.choice >= 0).any(axis=(1, 2)) & np.repeat(block.step_rows > 1, block.step_rows)
        np.add.at(demand.counts[:, CHOOSING_ROWS], np.repeat(block.phase, block.step_rows), made)


def count_hits(tally: HitTally, block: Accesses, hit: np.ndarray, size: np.ndarray, group: np.ndarray) -> None:
    """Add the hits of a block: hit uint8 [n], size int64 [keys] in bytes, group as in `count_demand`."""
    layers = (block.bounds.size - 1) // max(1, block.phase.size)
    misses = np.empty(block.phase.size, np.int64)
    _tally(block, hit, size, layers, tally.totals, misses)
    _tally_groups(block, hit, group, layers, tally.group_hits)
    whole = (misses == 0) & (np.diff(block.bounds[::layers]) > 0)
    np.add.at(tally.totals[:, WHOLE_STEPS], block.phase, whole)
    np.add.at(tally.totals[:, WHOLE_ROWS], block.phase, whole & (block.step_rows == 1))
    for phase, counter in enumerate(tally.step_misses):
        found, steps = np.unique(misses[block.phase == phase], return_counts=True)
        counter.update(dict(zip(found.tolist(), steps.tolist(), strict=True)))


def mark_hits(bits: np.ndarray, hit: np.ndarray, number: int) -> None:
    """Set the bit of cache `number`, below MOST_CACHES, where its accesses hit; bits uint64 [n], hit uint8 [n]."""
    _mark(bits, hit, np.uint64(number))


def count_whole_rows(tallies: Sequence[HitTally], block: Accesses, bits: np.ndarray) -> None:
    """Add, for each of the caches that `bits` are of, the rows of steps of several whose choices all hit.

    All caches at once, as a pass over the choices for each took as long as most of their replays.
    """
    whole = np.zeros((len(PHASE_NAMES), len(tallies)), np.int64)
    _count_whole(block, bits, whole)
    for tally, of in zip(tallies, whole.T, strict=True):
        tally.totals[:, WHOLE_ROWS] += of


def quantiles(step_misses: Counter[int]) -> list[int | None]:
    """Return for each of QUANTILES the least number of misses that such a share of the steps do not exceed."""
    if not step_misses:
        return [None] * len(QUANTILES)
    values = np.array(sorted(step_misses))
    below = np.cumsum([step_misses[value] for value in values.tolist()])
    return [int(values[np.searchsorted(below, percent / 100 * below[-1])]) for percent in QUANTILES]


def intervals(hits: np.ndarray, accesses: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the 2.5 and 97.5 % quantiles of hit rates, float64 [n], if requests are drawn anew (a bootstrap).

    hits and accesses int64 [n, groups]. Groups of requests are drawn with replacement, as many as there are, 1000 times
    over. NaN if there are fewer than two groups with accesses.
    """
    rows, groups = hits.shape
    draw = np.random.default_rng(seed)
    rates = np.empty((_DRAWS, rows))
    for first in range(0, _DRAWS, _AT_A_TIME):
        times = draw.multinomial(groups, np.full(groups, 1 / groups), size=_AT_A_TIME).astype(np.float64)
        with np.errstate(invalid="ignore"):
            rates[first : first + _AT_A_TIME] = (times @ hits.T) / (times @ accesses.T)
    known = (accesses > 0).sum(1) > 1
    low, high = np.full(rows, np.nan), np.full(rows, np.nan)
    if known.any():
        low[known], high[known] = np.nanquantile(rates[:, known], [0.025, 0.975], axis=0)
    return low, high


@kernel(inline=False)
def _count(key, row, bounds, layers, phase, group, demand):
    """Add the accesses of whole steps to ``demand``; key int32 [n], row int32 [n], group int32 [rows]."""
    counts = demand.counts
    for step in range(phase.size):
        start, stop, first = bounds[step * layers], bounds[(step + 1) * layers], 0
        for i in range(start, stop):
            first += demand.seen[key[i]] == 0
            demand.seen[key[i]] = 1
            demand.group_accesses[phase[step], group[row[i]]] += 1
        counts[phase[step], 0] += stop - start
        counts[phase[step], 1] += first
        counts[phase[step], 2] += 1


@kernel(inline=False)
def _mark(bits, hit, number):
    """Set bit ``number`` of bits uint64 [n] where hit uint8 [n] is not 0."""
    for i in range(hit.size):
        bits[i] |= np.uint64(hit[i] > 0) << number


@kernel(inline=False)
def _count_whole(block, bits, whole):
    """Add to whole int64 [phases, caches] the rows, of steps with several, whose choices all have the cache's bit."""
    row, none = 0, np.uint64(0)
    for step in range(block.phase.size):
        for row_of_step in range(block.step_rows[step]):
            some, every, at = False, ~none, row + row_of_step
            if block.step_rows[step] == 1:
                continue
            for layer in range(block.choice.shape[1]):
                for slot in range(block.choice.shape[2]):
                    access = block.choice[at, layer, slot]
                    if access >= 0:
                        some = True
                        every &= bits[access]
                if every == none:
                    break
            if some and every != none:
                for cache in range(whole.shape[1]):
                    whole[block.phase[step], cache] += np.int64(every >> np.uint64(cache) & np.uint64(1))
        row += block.step_rows[step]


@kernel(inline=False)
def _tally(block, hit, size, layers, totals, misses):
    """Add each phase's figures to totals int64 [phases, 7]; fill misses int64 [steps]."""
    for step in range(block.phase.size):
        start, stop = block.bounds[step * layers], block.bounds[(step + 1) * layers]
        hits, missed_bytes, known, agreeing, resident = 0, 0, 0, 0, 0
        for i in range(start, stop):
            hits += hit[i] > 0
            missed_bytes += 0 if hit[i] else size[block.key[i]]
        if block.recorded.size:
            for i in range(start, stop):
                known += block.recorded[i] != NOT_RECORDED
                resident += block.recorded[i] != NOT_RECORDED and block.recorded[i] > 0
                agreeing += block.recorded[i] != NOT_RECORDED and (block.recorded[i] > 0) == (hit[i] > 0)
        totals[block.phase[step], HITS] += hits
        totals[block.phase[step], MISSED_BYTES] += missed_bytes
        totals[block.phase[step], RECORDED] += known
        totals[block.phase[step], AGREEING] += agreeing
        totals[block.phase[step], RECORDED_HITS] += resident
        misses[step] = stop - start - hits


@kernel(inline=False)
def _tally_groups(block, hit, group, layers, group_hits):
    """Add the hits of each request's rows, those of one request after another's in one addition."""
    for step in range(block.phase.size):
        own, hits = 0, 0
        for i in range(block.bounds[step * layers], block.bounds[(step + 1) * layers]):
            if group[block.row[i]] != own:
                group_hits[block.phase[step], own] += hits
                own, hits = np.int64(group[block.row[i]]), 0
            hits += hit[i] > 0
        group_hits[block.phase[step], own] += hits
