"""Loads: how many rows chose each expert, for each step and layer, from ids or from counts, some steps at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moetrace.jit.compile import kernel
from moetrace.spec.errors import MoetraceError
from moetrace.trace.format import Trace
from moetrace.trace.schema import PHASE_NAMES, check_ids, check_step_bytes

AT_ONCE = 1 << 20  # ids, or counts, that are looked at together
MAX_ROWS = 1 << 40  # sums of loads stay exact, also as float64


class Loads(NamedTuple):
    """The active experts of some steps: those of ``i = step * L + layer`` are ``start[i]:start[i + 1]``, by id."""

    steps: int
    start: np.ndarray  # int64 [steps * L + 1]
    expert: np.ndarray  # int32 [n]
    rows: np.ndarray  # int64 [n], 1 or more
    all_rows: int  # token rows of the steps


class StepChoices(NamedTuple):
    """The choices behind some loads: those of their step s are rows ``begin[s]:end[s]`` of ``experts``."""

    experts: np.ndarray  # uint8 or uint16 [rows, L, k]; the greatest number is an absent one
    begin: np.ndarray  # int64 [steps]
    end: np.ndarray  # int64 [steps]


def steps_of_phase(trace: Trace, phase: str) -> np.ndarray:
    """Return the steps of the trace that are of ``phase`` ("all": any), int64, increasing."""
    if phase == "all":
        return np.arange(trace.steps)
    return np.flatnonzero(trace.phase == PHASE_NAMES.index(phase))


def loads_of(trace: Trace, steps: np.ndarray) -> Iterator[Loads]:
    """Yield the loads of the given steps (int64, increasing), in parts of bounded size; raises as `choices_of`."""
    return (loads for loads, _ in choices_of(trace, steps))


def choices_of(trace: Trace, steps: np.ndarray) -> Iterator[tuple[Loads, StepChoices | None]]:
    """Yield the loads of the given steps as `loads_of`, and the choices that they count; None where only counts are.

    Raises MoetraceError (file, dataset, row) if an id is impossible, or a count is negative or more than the rows of
    its step. That a row chooses no expert twice is not checked here.
    """
    if trace.rows > MAX_ROWS:
        raise MoetraceError(f"{trace.shown} has {trace.rows} rows, more than can be summed.")
    counts = "counts" in trace.has
    for first, stop in _parts(trace, steps, counts):
        part = steps[first:stop]
        loads, choices = (_from_counts(trace, part), None) if counts else _from_ids(trace, part)
        _check_own_experts(trace, loads, part)
        yield loads, choices


def summed(trace: Trace, steps: np.ndarray) -> np.ndarray:
    """Sum the loads of the given steps: int64 [layers, experts]."""
    total = np.zeros((trace.layers, trace.num_experts), np.int64)
    for part in loads_of(trace, steps):
        add(part, total)
    return total


@kernel(inline=False)
def add(loads, total):
    """Add loads to total, int64 [layers, experts]."""
    layers = len(total)
    for i in range(loads.steps * layers):
        own = total[i % layers]
        for j in range(loads.start[i], loads.start[i + 1]):
            own[loads.expert[j]] += loads.rows[j]


def _parts(trace: Trace, steps: np.ndarray, counts: bool) -> Iterator[tuple[int, int]]:
    """Cut steps into runs whose span in the file is of bounded size, or of one step."""
    per_step = trace.layers * trace.num_experts  # counts, or active experts at most
    most_steps = max(1, AT_ONCE // per_step) if counts else AT_ONCE
    most_rows = max(1, AT_ONCE // (trace.layers * trace.top_k))
    first = 0
    while first < steps.size:
        begin = steps[first]
        if counts:
            stop = int(np.searchsorted(steps, begin + most_steps))
        else:
            last = np.searchsorted(trace.offset, trace.offset[begin] + most_rows, side="right") - 1
            stop = int(np.searchsorted(steps, last))
        stop = max(stop, first + 1)
        yield first, stop
        first = stop


def _check_own_experts(trace: Trace, loads: Loads, steps: np.ndarray) -> None:
    """Raise MoetraceError if a layer with fewer experts than the others has a load of one that it lacks."""
    if trace.layer_experts is None:
        return
    layer = np.repeat(np.arange(loads.start.size - 1), np.diff(loads.start)) % trace.layers
    wrong = np.flatnonzero(loads.expert >= trace.layer_experts[layer])
    if wrong.size:
        at = int(wrong[0])
        step = steps[(np.searchsorted(loads.start, at, side="right") - 1) // trace.layers]
        raise MoetraceError(
            f"{trace.shown}: step {step}, layer entry {layer[at]} chooses expert {loads.expert[at]}, but that layer "
            f"has {trace.layer_experts[layer[at]]} experts."
        )


def _from_ids(trace: Trace, steps: np.ndarray) -> tuple[Loads, StepChoices]:
    check_step_bytes(trace.shown, trace.offset, int(steps[0]), int(steps[-1]) + 1, trace.id_bytes)
    first, stop = int(trace.offset[steps[0]]), int(trace.offset[steps[-1] + 1])
    experts = trace.read("experts", first, stop)
    begin, end = trace.offset[steps] - first, trace.offset[steps + 1] - first
    most = int(np.minimum((end - begin) * trace.top_k, trace.num_experts).sum()) * trace.layers
    start = np.zeros(steps.size * trace.layers + 1, np.int64)
    expert, rows = np.empty(most, np.int32), np.empty(most, np.int64)
    if not count_ids(experts, begin, end, trace.num_experts, start, expert, rows):
        check_ids(trace.shown, first, experts, trace.num_experts)  # says which
        raise MoetraceError(f"{trace.shown}: /experts changed while it was read.")
    loads = Loads(steps.size, start, expert[: start[-1]], rows[: start[-1]], int((end - begin).sum()))
    return loads, StepChoices(experts, begin, end)


def _from_counts(trace: Trace, steps: np.ndarray) -> Loads:
    counts = np.ascontiguousarray(trace.read("counts", steps[0], steps[-1] + 1)[steps - steps[0]])
    all_rows = trace.offset[steps + 1] - trace.offset[steps]
    wrong = (counts < 0) | (counts > all_rows[:, None, None])
    if wrong.any():
        step, layer, expert = (int(i) for i in np.argwhere(wrong)[0])
        raise MoetraceError(
            f"{trace.shown}: /counts of step {steps[step]}, layer entry {layer}, expert {expert} is "
            f"{counts[step, layer, expert]}, but must be 0 to the {all_rows[step]} rows of the step."
        )
    of, expert = np.nonzero(counts.reshape(-1, trace.num_experts))
    start = np.searchsorted(of, np.arange(steps.size * trace.layers + 1))
    return Loads(steps.size, start, expert.astype(np.int32), counts[counts > 0], int(all_rows.sum()))


@kernel(inline=False)
def count_ids(experts, begin, end, num_experts, start, expert, rows):
    """Fill ``Loads``' arrays from experts [rows, L, k], of steps ``begin[s]:end[s]``; return 0 if an id is no expert's.

    Rows come outside, layers inside: reads stream, and successive increments go to different counters.
    """
    layers, top_k = experts.shape[1:]
    absent = np.int64((1 << (8 * experts.itemsize)) - 1)
    tally = np.zeros((layers, num_experts + 1), np.int32)
    wrong, last = False, 0
    for step in range(begin.size):
        for row in range(begin[step], end[step]):
            for layer in range(layers):
                for slot in range(top_k):
                    e = np.int64(experts[row, layer, slot])
                    wrong |= (e >= num_experts) & (e != absent)
                    tally[layer, min(e, num_experts)] += 1
        for layer in range(layers):
            tally[layer, num_experts] = 0
            for e in range(num_experts):
                if tally[layer, e]:
                    expert[last], rows[last] = e, tally[layer, e]
                    tally[layer, e] = 0
                    last += 1
            start[step * layers + layer + 1] = last
    return not wrong
