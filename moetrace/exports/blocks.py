"""A trace's choices as exports need them: checked, and in parts whose size does not depend on its steps."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.trace.format import Trace
from moetrace.trace.schema import check_ids

# Rows of a step that is larger come in several parts. A choice takes up to some 100 bytes on its way.
PART_CHOICES = 1 << 19
MAX_OBJECTS = 1 << 24  # experts of all layers; of the largest models there are some 20,000


class Part(NamedTuple):
    """Successive rows: number of the first, and of each row its ids, step, request, position and phase."""

    first: int
    experts: np.ndarray  # uint8 | uint16 [rows, layers, top_k]
    step: np.ndarray  # int64 [rows]
    request: np.ndarray  # int32 [rows]
    position: np.ndarray  # int32 [rows]
    phase: np.ndarray  # uint8 [rows]


def parts(trace: Trace) -> Iterator[Part]:
    """Yield all rows; raise MoetraceError on an impossible id, request, position or phase, or if there are no ids."""
    at_once = max(1, PART_CHOICES // (trace.layers * trace.top_k))
    where = trace.shown
    for block in trace.blocks(rows=at_once):
        first = int(trace.offset[block.first_step])
        step = block.first_step + np.repeat(np.arange(block.steps), np.diff(block.offset))
        for start in range(0, step.size, at_once):
            rows = slice(start, start + at_once)
            check_ids(where, first + start, block.experts[rows], trace.num_experts)
            columns = (array[rows] for array in (block.experts, step, block.request, block.position, block.phase))
            yield Part(first + start, *columns)


def check_objects(trace: Trace, layers: int) -> None:
    """Raise MoetraceError if `layers` of the trace's experts are more than any model has: an array is made of them."""
    if layers * trace.num_experts > MAX_OBJECTS:
        raise MoetraceError(f"{layers} layers of {trace.num_experts} experts are more than this format is made for.")
