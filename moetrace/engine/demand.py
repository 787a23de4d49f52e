"""Who is demanded: a block's routing as lists of active experts, in demand order, made once for all policies."""

from typing import NamedTuple

import numpy as np

from moetrace.engine.compile import kernel


class Demand(NamedTuple):
    """The active experts of each (step, layer) of a block: ``start[i]:start[i+1]`` for ``i = step * L + layer``.

    Demand order: rows descending, then id ascending.
    """

    start: np.ndarray  # int64 [steps * L + 1]
    expert: np.ndarray  # int32 [n]
    rows: np.ndarray  # int32 [n]: rows that chose it
    next_step: np.ndarray  # int32 [n]: step of its next demand, -1 = none; or [0] where no policy looks ahead


FINE, NOT_AN_EXPERT, TWICE = 0, 1, 2
FEW = 24  # active experts up to which sorting by insertion is the faster way


def demand_of(experts: np.ndarray, offset: np.ndarray, num_experts: int) -> tuple[Demand, int, int]:
    """Return a block's demand, what is wrong with its ids (0 = nothing) and the first row that it is wrong in.

    ``experts`` uint8 or uint16 [rows, L, k]: 255 or 65535 is absent; ``offset`` int64 [steps + 1]: the rows of each
    step. An id is wrong if it is no expert's and not absent, or stands twice in one choice.
    """
    rows, layers, top_k = experts.shape
    most = int(np.minimum(np.diff(offset) * top_k, num_experts).sum()) * layers
    start = np.zeros((len(offset) - 1) * layers + 1, np.int64)
    expert, count = np.empty(most, np.int32), np.empty(most, np.int32)
    wrong, row = _gather(experts, offset, num_experts, start, expert, count)
    return Demand(start, expert, count, np.zeros(0, np.int32)), wrong, row


@kernel(allocates=True)
def _gather(experts, offset, num_experts, start, expert, count):
    layers = experts.shape[1]
    tokens = np.zeros(num_experts, np.int32)  # rows of the layer at hand that chose each expert
    last_cell = np.full(num_experts, -1)
    most_rows = 0
    for s in range(offset.size - 1):
        most_rows = max(most_rows, offset[s + 1] - offset[s])
    with_count = np.zeros(most_rows + 2, np.int32)
    end, at = 0, 0
    for s in range(offset.size - 1):
        for l in range(layers):
            first = end
            end, wrong, row = _count(experts, l, offset[s], offset[s + 1], tokens, last_cell, expert, end)
            if wrong != FINE:
                return wrong, row
            if end - first > FEW:
                _by_counting(expert[first:end], count[first:end], tokens, with_count)
            else:
                _by_insertion(expert[first:end], count[first:end], tokens)
            at += 1
            start[at] = end
    return FINE, -1


@kernel
def _count(experts, layer, begin, stop, tokens, last_cell, expert, end):
    """Count the rows of each expert and list the experts at ``expert[end:]`` as they come up."""
    absent = (1 << (8 * experts.itemsize)) - 1
    for row in range(begin, stop):
        cell = row * experts.shape[1] + layer
        for slot in range(experts.shape[2]):
            e = np.int64(experts[row, layer, slot])
            if e >= tokens.size:
                if e == absent:
                    continue
                return end, NOT_AN_EXPERT, row
            if last_cell[e] == cell:
                return end, TWICE, row
            last_cell[e] = cell
            if tokens[e] == 0:
                expert[end] = e
                end += 1
            tokens[e] += 1
    return end, FINE, -1


@kernel
def _by_insertion(expert, count, tokens):
    """Put a layer's experts in demand order, fill their counts and leave ``tokens`` zero for the next layer."""
    for i in range(expert.size):
        e = expert[i]
        n = tokens[e]
        tokens[e] = 0
        j = i
        while j > 0 and (count[j - 1] < n or (count[j - 1] == n and expert[j - 1] > e)):
            expert[j], count[j] = expert[j - 1], count[j - 1]
            j -= 1
        expert[j], count[j] = e, n


@kernel
def _by_counting(expert, count, tokens, with_count):
    """Do the same for many experts: ids in order by a scan, their places by a count of the counts."""
    most = 0
    for e in range(tokens.size):
        with_count[tokens[e]] += 1
        most = max(most, tokens[e])
    place = 0
    for n in range(most, -1, -1):
        here = with_count[n]
        with_count[n] = place
        place += here
    for e in range(tokens.size):
        n = tokens[e]
        if n > 0:
            expert[with_count[n]], count[with_count[n]] = e, n
            with_count[n] += 1
            tokens[e] = 0
    for n in range(most + 1):
        with_count[n] = 0
