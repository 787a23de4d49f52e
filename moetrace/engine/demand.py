"""Who is demanded: a block's routing as lists of active experts, in demand order, made once for all policies."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moetrace.jit.compile import kernel


class Demand(NamedTuple):
    """The active experts of each (step, layer) of a block: ``start[i]:start[i+1]`` for ``i = step * L + layer``.

    Demand order: rows descending, then id ascending.
    """

    start: np.ndarray  # int64 [steps * L + 1]
    expert: np.ndarray  # int32 [n]
    rows: np.ndarray  # int32 [n]: rows that chose it
    next_step: np.ndarray  # int32 [n]: step of its next demand, -1 = none; or [0] where no policy looks ahead
    gate_mass: np.ndarray  # float64 [n]: sum of its rows' gates; or [0] where no policy weighs them


class Popularity(NamedTuple):
    """The demand for each expert in a whole trace, independent of the policy."""

    rows: np.ndarray  # int64 [L, E]: rows that chose it
    steps: np.ndarray  # int64 [L, E]: steps in which it was active


FEW = 24  # ids of a step and layer up to which sorting by insertion is the faster way
AT_ONCE = 4  # layers counted in one walk over a step's rows: a row's ids of them share a line of the processor's cache
CHECKED = 4096  # ids that are compared in one go: some 64 at a time, and few are left at the end
PARTS = 4  # of a layer's experts, sorted side by side: each waits for its own last place only


def demand_of(experts: np.ndarray, offset: np.ndarray, num_experts: int) -> Demand | None:
    """Return a block's demand, or None if an id is wrong: no expert's and not absent, or twice in one choice.

    ``experts`` uint8 or uint16 [rows, L, k], 255 or 65535 is absent; ``offset`` int64 [steps + 1], rows of each step.
    """
    layers, top_k = experts.shape[1:]
    if _has_wrong(experts, num_experts):
        return None
    most = int(np.minimum(np.diff(offset) * top_k, num_experts).sum()) * layers
    start = np.zeros((len(offset) - 1) * layers + 1, np.int64)
    expert, count = np.empty((2, most + num_experts + PARTS), np.int32)  # sorting writes a little beyond the last
    _gather(experts, offset, num_experts, start, expert, count)
    return Demand(start, expert[: start[-1]], count[: start[-1]], np.zeros(0, np.int32), np.zeros(0))


def _has_wrong(experts: np.ndarray, num_experts: int) -> bool:
    """Return whether an id is neither an expert's nor absent, or is twice in one choice."""
    rows, layers, top_k = experts.shape
    at_once = max(1, min(CHECKED // (layers * top_k), rows))  # rows
    limits = np.array([num_experts - 1, np.iinfo(experts.dtype).max], experts.dtype)
    whole = rows // at_once * at_once
    return any(
        _is_wrong(part.reshape(-1, n * layers * top_k), limits, _together(n * layers * top_k, top_k))
        for part, n in ((experts[:whole], at_once), (experts[whole:], rows - whole))
        if len(part)
    )


@lru_cache(maxsize=4)
def _together(width: int, top_k: int) -> np.ndarray:
    """Return which ids are in one choice with the id n places behind them: bool [n, width]."""
    return np.arange(width) % top_k < top_k - np.arange(top_k)[:, None]


def without_ahead(demand: Demand, steps: int, layers: int) -> Demand:
    """Return a block's demand without the steps beyond its own ``steps``, which are only looked ahead at."""
    return demand._replace(start=demand.start[: steps * layers + 1])


def with_gates(demand: Demand, experts: np.ndarray, gates: np.ndarray | None, offset: np.ndarray) -> Demand:
    """Return a block's demand with the sums of gates of its first steps.

    ``experts`` [rows, L, k] as in ``demand_of``; ``gates`` float32 of the same shape, or None; ``offset`` int64
    [steps + 1]. A gate that is not finite is unknown, and counts as 1/k.
    """
    layers, top_k = experts.shape[1:]
    size = demand.start[(len(offset) - 1) * layers]
    if gates is None:
        return demand._replace(gate_mass=demand.rows[:size] / top_k)
    mass = np.empty(size)
    most = int(demand.expert.max(initial=0)) + 1
    _weigh(experts, gates, offset, demand.start, demand.expert, most, mass)
    return demand._replace(gate_mass=mass)


def new_popularity(layers: int, num_experts: int) -> Popularity:
    """Return counts of nothing yet."""
    return Popularity(np.zeros((layers, num_experts), np.int64), np.zeros((layers, num_experts), np.int64))


@kernel
def count_experts(demand, popularity):
    """Add a block's demand to the counts: 1 ns an active expert, once for all policies."""
    layers, at, first = popularity.rows.shape[0], 0, demand.start[0]
    for _ in range((demand.start.size - 1) // layers):
        for layer in range(layers):  # a remainder to find the layer by took longer than the counting
            at += 1
            stop = demand.start[at]
            for j in range(first, stop):
                expert = np.uint64(demand.expert[j])
                popularity.rows[layer, expert] += demand.rows[j]
                popularity.steps[layer, expert] += 1
            first = stop


@kernel
def _is_wrong(ids, limits, together):
    """Do the same for ids [n, whole rows]; ``together`` bool [k, whole rows] says which are in one choice.

    Apart from the counting, many are compared at a time: within, it took more than the counting itself.
    """
    highest, absent = limits[0], limits[1]
    wrong = False
    width = ids.shape[1]
    for row in range(ids.shape[0]):
        for i in range(width):
            wrong |= (ids[row, i] > highest) & (ids[row, i] != absent)
        for distance in range(1, together.shape[0]):
            for i in range(width - distance):
                same = (ids[row, i] == ids[row, i + distance]) & (ids[row, i] != absent)
                wrong |= same & together[distance, i]
    return wrong


@kernel
def see_gates(demand, first, size, active):
    """Give the active experts of a layer, which are ``first`` on in the demand, the sums of their rows' gates."""
    for i in range(size):
        active[i].gate_mass = demand.gate_mass[first + i]


@kernel(inline=False)
def _weigh(experts, gates, offset, start, expert, most, mass):
    """Sum the gates of each active expert's rows into ``mass`` float64 [n], in order; active ids are below ``most``."""
    layers, top_k = experts.shape[1:]
    sums = np.zeros(most)
    for s in range(offset.size - 1):
        for layer in range(layers):
            for row in range(offset[s], offset[s + 1]):
                for slot in range(top_k):
                    e = np.int64(experts[row, layer, slot])
                    gate = np.float64(gates[row, layer, slot])
                    if e < most:
                        sums[e] += gate if np.isfinite(gate) else 1.0 / top_k
            at = s * layers + layer
            for i in range(start[at], start[at + 1]):
                mass[i] = sums[expert[i]]
                sums[expert[i]] = 0.0


@kernel(inline=False)
def _gather(experts, offset, num_experts, start, expert, count):
    """Fill a block's demand (see ``demand_of``): start, expert and count; the ids are right."""
    layers, top_k = experts.shape[1:]
    size = PARTS
    while size <= num_experts:
        size *= 2  # the absent id is all ones, and so is the place where it is counted
    # For AT_ONCE layers, how many rows chose each expert; for one layer, how many experts have each number of rows.
    tokens = np.zeros((AT_ONCE, size), np.int32)
    most_rows = 0
    for s in range(offset.size - 1):
        most_rows = max(most_rows, offset[s + 1] - offset[s])
    with_count = np.zeros((most_rows + 1) * PARTS, np.int32)
    end, at = 0, 0
    for s in range(offset.size - 1):
        begin, stop = offset[s], offset[s + 1]
        for first in range(0, layers, AT_ONCE):
            last = min(first + AT_ONCE, layers)
            if stop - begin > 1:
                _count(experts, first, last, begin, stop, tokens)
            for layer in range(first, last):
                if stop - begin == 1:
                    end = _one_row(experts[begin, layer], num_experts, expert, count, end)
                elif (stop - begin) * top_k > FEW:
                    end = _by_counting(tokens[layer - first], num_experts, expert, count, end, with_count)
                else:
                    end = _by_insertion(experts, layer, begin, stop, tokens[layer - first], expert, count, end)
                at += 1
                start[at] = end


@kernel
def _one_row(ids, num_experts, expert, count, end):
    """List the experts of a step's only row by id, from ``end`` on; return the new end.

    An id's place is the number of smaller ones: k * k comparisons, but none that the processor could guess wrong.
    """
    found = 0
    for slot in range(ids.size):
        smaller = 0
        for other in range(ids.size):
            smaller += ids[other] < ids[slot]
        if ids[slot] < num_experts:
            expert[end + smaller] = ids[slot]
            count[end + found] = 1
            found += 1
    return end + found


@kernel
def _count(experts, first, last, begin, stop, tokens):
    """Count, in ``tokens`` [layers, places], the rows that chose each expert of the layers from first to last - 1."""
    mask, top_k = np.int64(tokens.shape[1] - 1), experts.shape[2]
    for row in range(begin, stop):
        for layer in range(first, last):
            for slot in range(top_k):
                tokens[layer - first, np.int64(experts[row, layer, slot]) & mask] += 1
    for layer in range(last - first):
        tokens[layer, mask] = 0


@kernel
def _by_insertion(experts, layer, begin, stop, tokens, expert, count, end):
    """List a layer's experts in demand order in front of ``end`` and leave ``tokens`` zero; return the new end."""
    first, mask = end, np.int64(tokens.size - 1)
    for row in range(begin, stop):
        for slot in range(experts.shape[2]):
            e = np.int64(experts[row, layer, slot]) & mask
            n = tokens[e]
            if n == 0:
                continue
            tokens[e] = 0
            j = end
            while j > first and (count[j - 1] < n or (count[j - 1] == n and expert[j - 1] > e)):
                expert[j], count[j] = expert[j - 1], count[j - 1]
                j -= 1
            expert[j], count[j] = e, n
            end += 1
    return end


@kernel
def _by_counting(tokens, num_experts, expert, count, end, with_count):
    """Do the same for many experts: their places by a count of the counts, which are then taken in order of id.

    Experts that nobody chose are listed behind the last, where the next layer's overwrite them: cheaper than a guess.
    """
    part = (num_experts + PARTS - 1) // PARTS
    most, stop = 0, end
    for e in range(num_experts):
        most = max(most, tokens[e])
    for e in range(part):
        for p in range(PARTS):
            with_count[tokens[p * part + e] * PARTS + p] += 1
    for n in range(most, -1, -1):
        if n == 0:
            stop = end
        for p in range(PARTS):
            here = with_count[n * PARTS + p]
            with_count[n * PARTS + p] = end
            end += here
    for e in range(part):
        for p in range(PARTS):
            n = tokens[p * part + e]
            place = with_count[n * PARTS + p]
            expert[place], count[place] = p * part + e, n
            with_count[n * PARTS + p] = place + 1
    for e in range(num_experts):
        tokens[e] = 0
    for n in range((most + 1) * PARTS):
        with_count[n] = 0
    return stop
