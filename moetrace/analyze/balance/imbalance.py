"""How even the units' work is under a plan, in each step and layer, in rows and in seconds, and could be at best."""

from typing import NamedTuple

import numpy as np

from moetrace.engine.cost import varied_s
from moetrace.engine.eplb import sink
from moetrace.jit.compile import kernel
from moetrace.jit.random import drawn

PARTS = 4096  # of the logarithm of the number of bins, for percentiles: exact to 0.1 % for 64 units
# Sums over the steps of a layer, where it has an active expert.
SUMS = ("steps", "imbalance", "jain", "max_rows", "time_imbalance", "busy_s", "balancedness")
_STEPS, _IMBALANCE, _JAIN, _MAX_ROWS, _TIME_IMBALANCE, _BUSY_S, _BALANCEDNESS = range(len(SUMS))
# Sums over the steps in which some layer has an active expert, over all layers.
STEP_SUMS = ("steps", "balancedness_vllm", "balancedness_sglang")
COPY_RULES = ("even", "row", "random")  # which copy of its expert a row goes to


class Cost(NamedTuple):
    """Times that keep a bin busy (timing model, section 2); all zeros where no system is given."""

    s_per_row: float
    s_per_byte: float
    is_serial: float
    each_s: float
    layer_s: float
    expert_bytes: np.ndarray  # float64 [L, E]


class ImbalanceTally(NamedTuple):
    """The sums of the steps so far, of each layer."""

    sums: np.ndarray  # float64 [L, len(SUMS)]
    worst: np.ndarray  # float64 [L], greatest imbalance in rows
    histogram: np.ndarray  # int64 [L, PARTS + 1], steps by logarithm of their imbalance in rows
    highest: np.ndarray  # float64 [L, PARTS + 1], the greatest imbalance among these
    over_time: np.ndarray  # float64 [periods, L, 2]: steps, and the sum of their imbalances
    step_sums: np.ndarray  # float64 [len(STEP_SUMS)]
    pass_sums: np.ndarray  # float64 [4]: of the step at hand: layers, their mean rows, most rows, and ratios of these


class Least(NamedTuple):
    """The lower bounds of the steps so far: sums over the steps of each layer, float64 [L]."""

    imbalance: np.ndarray  # of max / mean in rows
    busy_s: np.ndarray  # of the busiest bin's seconds


class _Heap(NamedTuple):
    """Heap to give out copies: least key first, then least number, that of an active expert with its copies."""

    key: np.ndarray  # float64 [E]
    number: np.ndarray  # int64 [E]
    copies: np.ndarray  # int64 [E]


class _Active(NamedTuple):
    """The active experts of one step and layer: ``number`` of them, in the loads from ``first`` on."""

    layer: int
    first: int
    number: int


def new_tally(layers: int, periods: int) -> ImbalanceTally:
    """Return a tally of no steps."""
    return ImbalanceTally(
        np.zeros((layers, len(SUMS))),
        np.zeros(layers),
        np.zeros((layers, PARTS + 1), np.int64),
        np.zeros((layers, PARTS + 1)),
        np.zeros((periods, layers, 2)),
        np.zeros(len(STEP_SUMS)),
        np.zeros(4),
    )


def percentile(tally: ImbalanceTally, share: float) -> np.ndarray:
    """Return the least imbalance in rows that ``share`` of each layer's steps do not exceed, float64 [L]; NaN if none.

    It is that of a step, but may be a higher one's: by a factor of bins ** (1 / PARTS) at most.
    """
    so_far = np.cumsum(tally.histogram, axis=1)
    total = so_far[:, -1]
    part = np.argmax(so_far >= np.maximum(1, np.ceil(share * total))[:, None], axis=1)
    return np.where(total > 0, tally.highest[np.arange(total.size), part], np.nan)


@kernel(inline=False)
def judge(loads, copies, bins, turn, period, cost, tally):
    """Add to ``tally`` what ``bins`` bins have to do under a plan.

    A row of an expert goes to one of its copies, as evenly as whole rows go; those left over go to one copy after
    another, beginning with another one each step (``turn`` is the number of the first). ``period`` int64 [steps] is
    the period of each step in the tally's ``over_time``.
    """
    layers = len(copies.start)
    rows, busy_s = np.zeros(bins, np.int64), np.zeros(bins)
    for i in range(loads.steps * layers):
        layer = i % layers
        if layer == 0:
            _note_step(tally)
        if loads.start[i] == loads.start[i + 1]:
            continue
        rows[:], busy_s[:] = 0, 0.0
        for j in range(loads.start[i], loads.start[i + 1]):
            expert, n = loads.expert[j], loads.rows[j]
            first = copies.start[layer, expert]
            number = np.int64(copies.start[layer, expert + 1] - first)
            weight_bytes = cost.expert_bytes[layer, expert]
            each, left = (n, 0) if number == 1 else (n // number, n % number)
            shift = 0 if number == 1 else (turn + i // layers) % number
            for copy in range(number):
                own = each + ((copy + shift) % number < left if left else 0)
                if own:
                    b = copies.bin[layer, first + copy]
                    if cost.layer_s > 0.0 and rows[b] == 0:
                        busy_s[b] += cost.layer_s
                    busy_s[b] += varied_s(cost, own, weight_bytes, cost.each_s)
                    rows[b] += own
        _note(layer, rows, busy_s, period[i // layers], tally)
    _note_step(tally)


@kernel(inline=False)
def judge_rows(choices, copies, bins, seed, turn, period, cost, tally):
    """Add to ``tally`` as `judge`, but each row goes to the copy that its place in the step chooses.

    It goes to the copy of number ``place % c`` of c or, if ``seed`` is not negative, to one drawn from the seed, the
    step, the layer, the place and the expert.
    """
    layers, top_k = choices.experts.shape[1:]
    absent = np.int64((1 << (8 * choices.experts.itemsize)) - 1)
    rows, busy_s = np.zeros(bins, np.int64), np.zeros(bins)
    of_copy = np.zeros(copies.bin.shape[1], np.int64)
    for step in range(choices.begin.size):
        _note_step(tally)
        for layer in range(layers):
            start, begin, some = copies.start[layer], choices.begin[step], False
            for row in range(begin, choices.end[step]):
                for slot in range(top_k):
                    expert = np.int64(choices.experts[row, layer, slot])
                    if expert == absent:
                        continue
                    number, place, some = np.int64(start[expert + 1] - start[expert]), row - begin, True
                    if number > 1 and seed >= 0:
                        place = drawn(seed, turn + step, layer, place, expert)
                    of_copy[start[expert] + place % number] += 1
            if not some:
                continue
            rows[:], busy_s[:] = 0, 0.0
            for expert in range(start.size - 1):
                for copy in range(start[expert], start[expert + 1]):
                    own = of_copy[copy]
                    if own:
                        b = copies.bin[layer, copy]
                        if cost.layer_s > 0.0 and rows[b] == 0:
                            busy_s[b] += cost.layer_s
                        busy_s[b] += varied_s(cost, own, cost.expert_bytes[layer, expert], cost.each_s)
                        rows[b] += own
                        of_copy[copy] = 0
            _note(layer, rows, busy_s, period[step], tally)
    _note_step(tally)


@kernel
def _note_step(tally):
    """Add the step that has ended to the tally's sums over the steps, and begin another."""
    of = tally.pass_sums
    if of[0] > 0:
        tally.step_sums[0] += 1
        tally.step_sums[1] += of[1] / of[2]
        tally.step_sums[2] += of[3] / of[0]
        of[:] = 0.0


@kernel
def _note(layer, rows, busy_s, period, tally):
    """Add a step of a layer to ``tally``: rows int64 [bins] and busy_s float64 [bins] are what its bins have to do."""
    total, most, squares, total_s, most_s = 0, 0, 0.0, 0.0, 0.0
    for b in range(rows.size):
        total += rows[b]
        most = max(most, rows[b])
        squares += np.float64(rows[b]) * rows[b]
        total_s += busy_s[b]
        most_s = max(most_s, busy_s[b])
    imbalance = most * rows.size / total
    sums, of = tally.sums[layer], tally.pass_sums
    of[0] += 1
    of[1] += total / rows.size
    of[2] += most
    of[3] += 1 / imbalance
    sums[_BALANCEDNESS] += 1 / imbalance
    sums[_STEPS] += 1
    sums[_IMBALANCE] += imbalance
    sums[_JAIN] += np.float64(total) * total / (rows.size * squares)
    sums[_MAX_ROWS] += most
    sums[_TIME_IMBALANCE] += most_s * rows.size / total_s if total_s > 0 else 0.0
    sums[_BUSY_S] += most_s
    tally.worst[layer] = max(tally.worst[layer], imbalance)
    part = min(np.int64(np.log(imbalance) / np.log(rows.size) * PARTS), PARTS) if rows.size > 1 else 0
    tally.histogram[layer, part] += 1
    tally.highest[layer, part] = max(tally.highest[layer, part], imbalance)
    tally.over_time[period, layer, 0] += 1
    tally.over_time[period, layer, 1] += imbalance


@kernel(inline=False)
def bound(loads, experts, bins, slots, cost, least):
    """Add to ``least`` bounds that no plan of ``slots`` copies on ``bins`` bins beats, even if re-made for every step.

    experts and slots are int64 [L].

    Let expert e have n_e rows. One copy that runs x of them costs c_e(x), which is x, or seconds: then 0 for x = 0,
    else max(x * a, b_e) + t, or x * a + b_e + t (what a bin starts with once is left out). In all cases c_e does not
    decrease and c_e(x) + c_e(y) >= c_e(x + y). So

    1. all copies of e together cost c_e(n_e) at least, however the rows are split: the bins' sum is at least that of
       all c_e(n_e), and the greatest of ``bins`` numbers is at least their mean;
    2. if e has r_e copies, one of them gets n_e / r_e rows or more and costs c_e(n_e / r_e) at least. The plan has
       r_e >= 1 with a sum of ``slots``, so its costliest copy is at least the minimum over all such r of
       max_e c_e(n_e / r_e). Giving each further copy to the expert that is then costliest attains it: were r' with a
       lower maximum, some e would have more copies here than r'_e, so that e was the costliest when it had r'_e. The
       maximum then, c_e(n_e / r'_e), was at least the one at the end, as no copy makes anything costlier. But it is at
       most the maximum of r': a contradiction;
    3. at most R = ``slots - experts`` experts have more than one copy. Leave out the R costliest experts: the k-th
       costliest of the experts with one copy costs at least as much as the k-th that is left. Some bin holds j + 1 or
       more of the j * bins + 1 costliest with one copy (pigeonhole), so the busiest bin has at least the sum of the j +
       1 cheapest of these.

    Rows are whole, so the bound in rows is rounded up. Point 2 divides by real numbers, below which no whole number
    of rows can get.
    """
    layers, most_experts = len(least.busy_s), experts.max()
    heap = _Heap(np.empty(most_experts), np.empty(most_experts, np.int64), np.empty(most_experts, np.int64))
    weight, order = np.empty(most_experts), np.empty(most_experts, np.int64)
    for i in range(loads.steps * layers):
        layer, first, active = i % layers, loads.start[i], loads.start[i + 1] - loads.start[i]
        if active == 0:
            continue
        further = slots[layer] - experts[layer]
        meet = active - further > bins  # where an expert with one copy must share its bin with another
        total = 0
        for j in range(active):
            order[j] = loads.rows[first + j] << 16 | j
            total += loads.rows[first + j]
        if meet:
            order[:active].sort()
        for j in range(active):
            weight[j] = order[j] >> 16
        most = _costliest_copy(loads, _Active(layer, first, active), further, False, cost, total / bins, heap)
        most = max(most, _pigeonhole(weight, active - further, bins) if meet else 0.0)
        least.imbalance[layer] += np.ceil(most * (1 - 1e-12)) * bins / total
        if cost.s_per_byte == 0.0:
            continue
        total_s, sorted_too = 0.0, True  # experts of equal size stay in order
        for j in range(active):
            weight[j] = _copy_cost(loads, layer, first + (order[j] & 0xFFFF), 1, True, cost)
            total_s += weight[j]
            sorted_too &= j == 0 or weight[j] >= weight[j - 1]
        if meet and not sorted_too:
            weight[:active].sort()
        most = _costliest_copy(loads, _Active(layer, first, active), further, True, cost, total_s / bins, heap)
        most = max(most, _pigeonhole(weight, active - further, bins) if meet else 0.0)
        least.busy_s[layer] += most * (1 - 1e-12)  # sums in another order may differ in the last bit


@kernel
def _costliest_copy(loads, experts, further, timed, cost, floor, heap):
    """Least cost of the costliest copy, over all ways to have ``further`` more copies than experts; or ``floor``."""
    key, number, copies = heap
    layer, first, active = experts
    most = floor
    for j in range(active):
        copies[j], number[j] = 1, j
        key[j] = -_copy_cost(loads, layer, first + j, 1, timed, cost)
        most = max(most, -key[j])
    if most == floor or further == 0:
        return most
    for j in range(active // 2 - 1, -1, -1):
        sink(key, number, active, j)
    for _ in range(further):
        j = number[0]
        copies[j] += 1
        less = -_copy_cost(loads, layer, first + j, copies[j], timed, cost)
        if less == key[0] or -key[0] <= floor:
            break  # a copy costs no less than its weights take
        key[0] = less
        sink(key, number, active, 0)
    return max(-key[0], floor)


@kernel
def _copy_cost(loads, layer, at, copies, timed, cost):
    """Return the cost of one of ``copies`` copies of an expert: rows or, if ``timed``, seconds."""
    rows = loads.rows[at] / copies
    if not timed:
        return rows
    return varied_s(cost, rows, cost.expert_bytes[layer, loads.expert[at]], cost.each_s)


@kernel
def _pigeonhole(weight, size, bins):
    """The most that must meet in one bin, of the ``size`` least of weights in increasing order: more than ``bins``."""
    most = 0.0
    for j in range(1, (size - 1) // bins + 1):
        together = 0.0
        for k in range(j + 1):
            together += weight[size - 1 - j * bins + k]
        most = max(most, together)
    return most
