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
ACCESSED, COMPULSORY, STEPS, CHOOSING_ROWS, CHOOSING_STEPS = range(5)  # columns of demands
MAX_GROUPS = 4096  # of requests, that a bootstrap draws from
_FEW = 4096  # misses of a step: how many steps have each number below stands in an array
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
    """Hits of one policy at one capacity so far, by phase of step."""

    # int64 [phases, 7]: hits, missed bytes, accesses with a record, and those that agree with it, rows and steps whose
    # choices all hit, and accesses that hit by the record
    totals: np.ndarray
    group_hits: np.ndarray  # int64 [phases, groups]
    few_misses: np.ndarray  # int64 [phases, _FEW]: how many steps had each number of misses
    many_misses: list[Counter[int]]  # [phases]: the same from _FEW on

    def step_misses(self, phases: Sequence[int]) -> Counter[int]:
        """How many steps of some phases had each number of misses."""
        few = self.few_misses[list(phases)].sum(0)
        found = np.flatnonzero(few)
        counts = Counter(dict(zip(found.tolist(), few[found].tolist(), strict=True)))
        return sum((self.many_misses[phase] for phase in phases), counts)


class DemandCounts(NamedTuple):
    """Demand so far, by phase of step, the same for all policies."""

    counts: np.ndarray  # int64 [phases, 5]: accesses, first accesses, steps, rows and steps with a choice
    group_accesses: np.ndarray  # int64 [phases, groups]
    seen: np.ndarray  # uint8 [keys]: whether each was accessed


class Owners(NamedTuple):
    """Whose the accesses of a block are: of which steps, and of which groups of requests."""

    bounds: np.ndarray  # int64 [steps + 1]: step s has accesses bounds[s]:bounds[s + 1]
    phase: np.ndarray  # int64 [steps]
    single: np.ndarray  # uint8 [steps]: whether it is of one row
    of_step: np.ndarray  # int32 [steps]: the group of all its rows, -1 if they have several
    of_access: np.ndarray  # int32 [n]: the group of each; [0] if each step has one
    shared: np.ndarray  # int64 [steps + 1]: the accesses in steps of several rows, before each step


def requests_of(trace: Trace) -> RequestGroups:
    """Return the requests of a trace, from a pass over its rows that reads no ids."""
    number = np.zeros(0, np.int32)
    for part in trace.row_blocks():
        number = np.union1d(number, part.request)
    return RequestGroups(number, max(1, min(number.size, MAX_GROUPS)))


def no_tally(groups: int) -> HitTally:
    """Return the state before the first access."""
    phases = len(PHASE_NAMES)
    return HitTally(
        np.zeros((phases, _TOTALS), np.int64),
        np.zeros((phases, groups), np.int64),
        np.zeros((phases, _FEW), np.int64),
        [Counter() for _ in PHASE_NAMES],
    )


def no_demand(keys: int, groups: int) -> DemandCounts:
    """Return the state before the first access."""
    phases = len(PHASE_NAMES)
    return DemandCounts(np.zeros((phases, 5), np.int64), np.zeros((phases, groups), np.int64), np.zeros(keys, np.uint8))


def owners_of(block: Accesses, group: np.ndarray, layers: int) -> Owners:
    """Return whose the accesses of a block are; group int32 [rows] is that of each row's request."""
    first = np.cumsum(block.step_rows) - block.step_rows
    of_step = group[first]
    if block.row.size:
        differs = group != np.repeat(of_step, block.step_rows)
        of_step[np.logical_or.reduceat(differs, first)] = -1
    bounds = np.ascontiguousarray(block.bounds[::layers])
    single = (block.step_rows == 1).view(np.uint8)
    shared = np.concatenate(([0], np.cumsum(np.where(single, 0, np.diff(bounds)))))
    of_access = np.empty(block.row.size, np.int32)
    _take(group, block.row, of_access)
    return Owners(bounds, block.phase.astype(np.int64), single, of_step, of_access, shared)


def count_demand(demand: DemandCounts, block: Accesses, owners: Owners, num_experts: int) -> None:
    """Add the accesses of a block."""
    _count(owners, demand.counts, demand.group_accesses)
    new = block.fresh[demand.seen[block.key[block.fresh]] == 0]
    demand.seen[block.key[new]] = 1
    phase = owners.phase[np.searchsorted(owners.bounds, new, "right") - 1]
    demand.counts[:, COMPULSORY] += np.bincount(phase, minlength=len(PHASE_NAMES))
    if block.experts.size:
        _count_choosing(owners, block.step_rows, block.experts, num_experts, demand.counts)


def count_hits(tally: HitTally, block: Accesses, hit: np.ndarray, size: np.ndarray, owners: Owners) -> None:
    """Add the hits of a block: hit uint8 [n] of 0 and 1; size int64 [keys] in bytes, [1] if all are of the same."""
    misses = np.empty(block.phase.size, np.int64)
    most = _tally(owners, block.key, hit, size, misses, tally.totals, tally.group_hits, tally.few_misses)
    if block.recorded.size:
        _tally_recorded(owners, block.recorded, hit, tally.totals)
    if most >= _FEW:
        many = misses >= _FEW  # few steps of a block
        for phase, count in zip(owners.phase[many].tolist(), misses[many].tolist(), strict=True):
            tally.many_misses[phase][count] += 1


def mark_hits(bits: np.ndarray, owners: Owners, hit: np.ndarray, number: int) -> None:
    """Set the bit of cache `number`, and clear those above it, of the accesses that hit in steps of several rows.

    bits uint8 or uint64 [m] are of these accesses only, hit uint8 [n] of 0 and 1 of all.
    """
    _mark(bits, owners, hit, np.uint64(number))


def count_whole_rows(
    tallies: Sequence[HitTally],
    block: Accesses,
    owners: Owners,
    bits: np.ndarray,
    num_experts: int,
    sequential: bool,
) -> None:
    """Add, for each of the caches that `bits` are of, the rows of steps of several whose choices all hit.

    All caches at once, as a pass over the choices for each took as long as most of their replays.
    """
    whole = np.zeros((len(PHASE_NAMES), len(tallies)), np.int64)
    left = np.empty(int(block.step_rows.max(initial=0)), bits.dtype)
    held = np.zeros(num_experts, bits.dtype)
    steps = block.bounds, block.step_rows, owners
    _count_whole(steps, block.key, block.experts, bits, sequential, left, held, whole)
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
    """Return the 2.5 and 97.5 % quantiles of hit rates, float64 [n], if requests are resampled (a bootstrap).

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
def _take(values, places, found):
    """Fill found with the values at places, all int32 [n]: 0.5 ns each, and 2 by NumPy."""
    for i in range(places.size):
        found[np.uint64(i)] = values[np.uint64(places[np.uint64(i)])]


@kernel(inline=False)
def _count(owners, counts, group_accesses):
    """Add whole steps to counts int64 [phases, 5], without the fields of rows and first accesses, and to groups."""
    for step in range(owners.phase.size):
        phase, start, stop = owners.phase[step], owners.bounds[step], owners.bounds[step + 1]
        counts[phase, ACCESSED] += stop - start
        counts[phase, STEPS] += 1
        counts[phase, CHOOSING_STEPS] += stop > start
        counts[phase, CHOOSING_ROWS] += (stop > start) & (owners.single[step] > 0)
        if owners.of_step[step] >= 0:
            group_accesses[phase, owners.of_step[step]] += stop - start
        else:
            for i in range(start, stop):
                group_accesses[phase, owners.of_access[i]] += 1


@kernel(inline=False)
def _count_choosing(owners, step_rows, experts, num_experts, counts):
    """Add to counts int64 [phases, 5] the rows, of steps with several, that chose anything."""
    first = 0
    for step in range(step_rows.size):
        if step_rows[step] > 1:
            for row in range(first, first + step_rows[step]):
                counts[owners.phase[step], CHOOSING_ROWS] += _chose(experts, row, num_experts)
        first += step_rows[step]


@kernel
def _chose(experts, row, num_experts):
    """Whether a row chose an expert in any layer."""
    for layer in range(experts.shape[1]):
        for slot in range(experts.shape[2]):
            if experts[row, layer, slot] < num_experts:
                return 1
    return 0


@kernel(inline=False)
def _mark(bits, owners, hit, number):
    """Set bit ``number`` of bits [m] where hit uint8 [n] is 1, in steps of several rows."""
    for step in range(owners.phase.size):
        if not owners.single[step]:
            to = owners.shared[step] - owners.bounds[step]
            for i in range(owners.bounds[step], owners.bounds[step + 1]):
                before = np.uint64(bits[to + i]) if number else np.uint64(0)
                bits[to + i] = before | np.uint64(hit[i]) << number


@kernel(inline=False)
def _count_whole(steps, key, experts, bits, sequential, left, held, whole):
    """Add to whole int64 [phases, caches] the rows, of steps with several, whose choices all have the cache's bit.

    ``left`` [rows] is of a step: the caches in which all choices of a row hit so far; ``held`` [experts] of an event:
    those in which each hits. A row that has no cache left is looked at no more, which most are soon.
    """
    bounds, step_rows, owners = steps
    layers, num_experts = experts.shape[1], held.size
    caches = whole.shape[1]
    every = ~np.uint64(0) >> np.uint64(64 - caches)
    first = 0
    for step in range(step_rows.size):
        rows = step_rows[step]
        if rows > 1:
            phase, to = owners.phase[step], owners.shared[step] - owners.bounds[step]
            for row in range(rows):
                left[row] = every if _chose(experts, first + row, num_experts) else np.uint64(0)
            for layer in range(layers):
                start, stop = bounds[step * layers + layer], bounds[step * layers + layer + 1]
                if sequential:
                    _left_one_by_one(experts, layer, first, rows, num_experts, bits[to + start : to + stop], left)
                else:
                    for i in range(start, stop):
                        held[key[i] - layer * num_experts] = bits[to + i]
                    _left_together(experts, layer, first, rows, held, left)
            for row in range(rows):
                caches_left, cache = np.uint64(left[row]), 0
                while caches_left:
                    whole[phase, cache] += np.int64(caches_left & np.uint64(1))
                    caches_left, cache = caches_left >> np.uint64(1), cache + 1
        first += rows


@kernel
def _left_together(experts, layer, first, rows, held, left):
    """Take from ``left`` the caches in which a choice of an event at once does not hit."""
    for row in range(rows):
        if left[row]:
            for slot in range(experts.shape[2]):
                expert = np.int64(experts[first + row, layer, slot])
                if expert < held.size:
                    left[row] &= held[expert]


@kernel
def _left_one_by_one(experts, layer, first, rows, num_experts, bits, left):
    """The same of an event whose choices are accesses, one after another."""
    access, full = 0, bits.size == rows * experts.shape[2]
    for row in range(rows):
        if full and not left[row]:
            access += experts.shape[2]
            continue
        for slot in range(experts.shape[2]):
            if experts[first + row, layer, slot] < num_experts:
                left[row] &= bits[access]
                access += 1


@kernel
def _sum(hit):
    """Count the hits of uint8 [n], a view: 0.1 ns each, and 0.5 over a range of all, whose indices may be negative."""
    hits = 0
    for i in range(hit.size):
        hits += np.int64(hit[i])
    return hits


@kernel(inline=False)
def _tally(owners, key, hit, size, step_misses, totals, group_hits, few_misses):
    """Add the figures of a block to each phase's; fill step_misses int64 [steps], and return the most of a step."""
    most = 0
    for step in range(owners.phase.size):
        phase, start, stop = owners.phase[step], owners.bounds[step], owners.bounds[step + 1]
        hits, missed_bytes = _sum(hit[start:stop]), 0
        misses = stop - start - hits
        if size.size == 1:
            missed_bytes = misses * size[0]
        else:
            for i in range(start, stop):
                missed_bytes += (1 - hit[i]) * size[key[i]]
        whole = (misses == 0) & (stop > start)
        totals[phase, HITS] += hits
        totals[phase, MISSED_BYTES] += missed_bytes
        totals[phase, WHOLE_STEPS] += whole
        totals[phase, WHOLE_ROWS] += whole & (owners.single[step] > 0)
        step_misses[step] = misses
        most = max(most, misses)
        if misses < few_misses.shape[1]:
            few_misses[phase, misses] += 1
        if owners.of_step[step] >= 0:
            group_hits[phase, owners.of_step[step]] += hits
        else:
            for i in range(start, stop):
                group_hits[phase, owners.of_access[i]] += hit[i]
    return most


@kernel(inline=False)
def _tally_recorded(owners, recorded, hit, totals):
    """Add to totals int64 [phases, 7] the accesses that have a record, and those that agree with it or hit by it."""
    for step in range(owners.phase.size):
        known, agreeing, resident = 0, 0, 0
        for i in range(owners.bounds[step], owners.bounds[step + 1]):
            known += recorded[i] != NOT_RECORDED
            resident += recorded[i] != NOT_RECORDED and recorded[i] > 0
            agreeing += recorded[i] != NOT_RECORDED and (recorded[i] > 0) == (hit[i] > 0)
        totals[owners.phase[step], RECORDED] += known
        totals[owners.phase[step], AGREEING] += agreeing
        totals[owners.phase[step], RECORDED_HITS] += resident


class WholeRows:
    """Counts the rows of a block, of steps with several, whose choices all hit: for many caches at once."""

    def __init__(self, block: Accesses, owners: Owners, num_experts: int, sequential: bool, caches: int) -> None:
        self._block, self._owners, self._how = block, owners, (num_experts, sequential)
        self._caches: list[HitTally] = []
        self._bits = np.empty(owners.shared[-1], np.uint8 if caches <= 8 else np.uint64)  # a bit each

    def add(self, tally: HitTally, hit: np.ndarray) -> None:
        """Note which accesses hit in one cache, uint8 [n]."""
        if self._bits.size:
            mark_hits(self._bits, self._owners, hit, len(self._caches))
            self._caches.append(tally)
            if len(self._caches) == 8 * self._bits.itemsize:
                self.count()
                self._caches = []

    def count(self) -> None:
        """Add the rows to the tallies of the caches noted."""
        if self._caches:
            count_whole_rows(self._caches, self._block, self._owners, self._bits, *self._how)
