"""Who is demanded: a block's routing as lists of active experts, in demand order, made once for all policies."""

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
    """How much each expert was wanted in a whole trace, whatever the policy."""

    rows: np.ndarray  # int64 [L, E]: rows that chose it
    steps: np.ndarray  # int64 [L, E]: steps in which it was active


FEW = 24  # ids of a step and layer up to which sorting by insertion is the faster way


def demand_of(experts: np.ndarray, offset: np.ndarray, num_experts: int) -> Demand | None:
    """Return a block's demand, or None if an id is wrong: no expert's and not absent, or twice in one choice.

    ``experts`` uint8 or uint16 [rows, L, k], 255 or 65535 is absent; ``offset`` int64 [steps + 1], rows of each step.
    """
    layers, top_k = experts.shape[1:]
    most = int(np.minimum(np.diff(offset) * top_k, num_experts).sum()) * layers
    start = np.zeros((len(offset) - 1) * layers + 1, np.int64)
    expert, count = np.empty(most, np.int32), np.empty(most, np.int32)
    if not _gather(experts, offset, num_experts, start, expert, count):
        return None
    return Demand(start, expert[: start[-1]], count[: start[-1]], np.zeros(0, np.int32), np.zeros(0))


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
    layers = popularity.rows.shape[0]
    for i in range(demand.start.size - 1):
        rows, steps = popularity.rows[i % layers], popularity.steps[i % layers]
        for j in range(demand.start[i], demand.start[i + 1]):
            rows[demand.expert[j]] += demand.rows[j]
            steps[demand.expert[j]] += 1


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
    """Fill a block's demand (see ``demand_of``): start, expert and count; return False if an id is wrong."""
    layers = experts.shape[1]
    # Of each expert: how many rows chose it in the layer at hand, and the last (row, layer) that did; then no expert.
    tokens = np.zeros(num_experts + 1, np.int32)
    last_choice = np.full(num_experts + 1, -1)
    most_rows = 0
    for s in range(offset.size - 1):
        most_rows = max(most_rows, offset[s + 1] - offset[s])
    with_count = np.zeros(most_rows + 2, np.int32)
    end, at = 0, 0
    for s in range(offset.size - 1):
        begin, stop = offset[s], offset[s + 1]
        for layer in range(layers):
            if stop - begin == 1:
                end, wrong = _one_row(experts[begin, layer], num_experts, expert, count, end)
            else:
                wrong = _count(experts, layer, begin, stop, tokens, last_choice)
                if (stop - begin) * experts.shape[2] > FEW:
                    end = _by_counting(tokens, expert, count, end, with_count)
                else:
                    end = _by_insertion(experts, layer, begin, stop, tokens, expert, count, end)
            if wrong:
                return False
            at += 1
            start[at] = end
    return True


@kernel
def _absent(experts):
    """Return the id that means no choice: the largest of its integer type."""
    return np.int64((1 << (8 * experts.itemsize)) - 1)


@kernel
def _one_row(ids, num_experts, expert, count, end):
    """List the experts of a step's only row by id, from ``end`` on; return the new end and whether ids are wrong.

    An id's place is the number of smaller ones: k * k comparisons, but none that the processor could guess wrong.
    """
    found, wrong = 0, False
    for slot in range(ids.size):
        e = ids[slot]
        smaller, same = 0, 0
        for other in range(ids.size):
            smaller += ids[other] < e
            same += ids[other] == e
        if e < num_experts:
            wrong |= same > 1
            expert[end + smaller] = e
            count[end + found] = 1
            found += 1
        else:
            wrong |= np.int64(e) != _absent(ids)
    return end + found, wrong


@kernel
def _count(experts, layer, begin, stop, tokens, last_choice):
    """Count the rows that chose each expert; return whether an id is wrong. Without branches: 1.7 ns an id, not 4."""
    num_experts = tokens.size - 1
    absent = _absent(experts)
    wrong = False
    for row in range(begin, stop):
        choice = row * experts.shape[1] + layer
        for slot in range(experts.shape[2]):
            e = np.int64(experts[row, layer, slot])
            place = min(e, num_experts)
            wrong |= (e >= num_experts) & (e != absent)
            wrong |= (last_choice[place] == choice) & (e < num_experts)
            last_choice[place] = choice
            tokens[place] += 1
    tokens[num_experts] = 0
    return wrong


@kernel
def _by_insertion(experts, layer, begin, stop, tokens, expert, count, end):
    """List a layer's experts in demand order in front of ``end`` and leave ``tokens`` zero; return the new end."""
    first = end
    for row in range(begin, stop):
        for slot in range(experts.shape[2]):
            e = min(np.int64(experts[row, layer, slot]), tokens.size - 1)
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
def _by_counting(tokens, expert, count, end, with_count):
    """Do the same for many experts: ids in order by a scan, their places by a count of the counts."""
    most = 0
    for e in range(tokens.size - 1):
        with_count[tokens[e]] += 1
        most = max(most, tokens[e])
    for n in range(most, 0, -1):
        here = with_count[n]
        with_count[n] = end
        end += here
    for e in range(tokens.size - 1):
        n = tokens[e]
        if n > 0:
            place = with_count[n]
            expert[place], count[place] = e, n
            with_count[n] = place + 1
            tokens[e] = 0
    for n in range(most + 1):
        with_count[n] = 0
    return end
