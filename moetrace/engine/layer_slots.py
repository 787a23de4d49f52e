"""How many slots each layer has, where not all have the same (`budget`)."""

from collections.abc import Callable

import numpy as np

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.load import AUTO, data_lines
from moetrace.trace.format import Trace
from moetrace.trace.schema import DECODE

FIRST_STEPS = 64  # of a trace that begins with a decode step, which `auto` counts instead of the prompts


def layer_slots(budget: str, counts: Callable[[], np.ndarray], slots: int, exists: np.ndarray) -> np.ndarray:
    """Return the slots of each layer, int64 [L], by a file or by what the first prompts chose.

    Args:
        budget: The path of a CSV file with a number a line, or "auto".
        counts: The result of `first_counts` for the trace; needed for `auto` only.
        slots: The most that a file may give to all layers together; `auto` shares out the slots of equal layers.
        exists: bool [L, E], the experts of each layer.

    Raises:
        UsageError: The file gives more slots than there are, or a layer more than it has experts.
        MoetraceError: The file cannot be read, or does not have a whole number for each layer.
    """
    most, layers = exists.sum(1), len(exists)
    if budget == AUTO:
        return by_marginal_gain(counts(), most, slots // layers * layers)
    given = []
    for number, cells in data_lines(budget):
        try:
            (count,) = map(int, cells)
        except ValueError:
            raise MoetraceError(f"{budget}, line {number}: wants one whole number, the slots of a layer.") from None
        if len(given) < layers and not 0 <= count <= most[len(given)]:
            raise UsageError(
                f"{budget}, line {number}: must be 0 to {most[len(given)]} slots, since layer {len(given)} has no more "
                f"experts, not {count}."
            )
        given.append(count)
    if len(given) != layers:
        raise MoetraceError(f"{budget}: {len(given)} numbers, but the trace has {layers} MoE layers.")
    if sum(given) > slots:
        raise UsageError(f"{budget} gives {sum(given)} slots to the layers together, but there are {slots}.")
    return np.array(given, np.int64)


def by_marginal_gain(count: np.ndarray, most: np.ndarray, slots: int) -> np.ndarray:
    """Share out slots, each to the layer that it helps most: whose next expert was chosen most often.

    Ties go to the lower layer. Slots left when every chosen expert has one go to the layers with the fewest.

    Args:
        count: int64 [L, E], how often each expert was chosen.
        most: int64 [L], experts of each layer.
        slots: How many; all layers together have no more than their experts.

    Returns:
        int64 [L].
    """
    gains = -np.sort(-count, axis=1)
    order = np.argsort(-gains, axis=None, kind="stable")[: min(slots, np.count_nonzero(gains))]
    shared = np.bincount(order // count.shape[1], minlength=len(count))
    for _ in range(min(slots, int(most.sum())) - int(shared.sum())):
        shared[np.argmin(np.where(shared < most, shared, np.iinfo(np.int64).max))] += 1
    return shared


def first_steps(phase: np.ndarray) -> int:
    """Return how many steps there are before the first decode step; 64 if that is the first. Phase of each [steps]."""
    decodes = np.flatnonzero(phase == DECODE)
    return (int(decodes[0]) if len(decodes) else len(phase)) or min(FIRST_STEPS, len(phase))


def first_counts(trace: Trace, steps: int | None = None) -> np.ndarray:
    """Return how many rows of a trace's first steps (`first_steps` by default) chose each expert, int64 [L, E]."""
    rows = int(trace.offset[first_steps(trace.phase) if steps is None else min(steps, trace.steps)])
    count = np.zeros((trace.layers, trace.num_experts), np.int64)
    done = 0
    for block in trace.blocks():
        ids = block.experts[: rows - done]
        for layer in range(trace.layers):
            count[layer] += np.bincount(ids[:, layer].ravel(), minlength=trace.num_experts)[: trace.num_experts]
        done += len(block.experts)
        if done >= rows:
            break
    return count
