"""A trace as accesses to experts: which key comes after which, block by block.

A key is one expert of one layer, `layer * E + expert`. Accesses come step by step, within a step layer by layer, within
a layer row by row and slot by slot; absent choices are none. One (step, layer) is an *event*. Sequentially every choice
is an access. At once, an event demands each of its experts one time, however many rows chose it, in the order of their
last choices.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moetrace.jit.compile import kernel
from moetrace.spec.errors import MoetraceError
from moetrace.trace.format import Trace
from moetrace.trace.schema import NOT_RECORDED, Block, absent_id, check_ids, check_recorded


class Accesses(NamedTuple):
    """The accesses of whole steps: event `i = step * L + layer` has `bounds[i]:bounds[i + 1]` of them."""

    first: int  # number of accesses before these
    key: np.ndarray  # int32 [n]
    bounds: np.ndarray  # int64 [steps * L + 1]
    # What the engine recorded for each (at once: for the first row that chose it), 255 = nothing; [0] if not asked for.
    recorded: np.ndarray  # uint8 [n]
    phase: np.ndarray  # uint8 [steps]: 0 prefill, 1 decode, 2 mixed
    rows: int
    row: np.ndarray  # int32 [n]: the row of these that made each choice (at once: the last one); [0] if not asked for
    request: np.ndarray  # int32 [rows]
    step_rows: np.ndarray  # int64 [steps]
    # At once, how many rows chose each; [0] if not asked for.
    chosen_by: np.ndarray  # int32 [n]
    row_choices: int  # how many, all different, each row made in each layer, one after another; 0 if some made fewer
    # Which of these each choice of a step of several rows is, -1 if absent; [0, ...] if not asked for, or no such step.
    choice: np.ndarray  # int32 [rows, L, k]


class _Asked(NamedTuple):
    """What of a block is brought beside its keys."""

    rows: bool = False
    chosen_by: bool = False
    choices: bool = False


class _Room(NamedTuple):
    """Room for the accesses of a block, which kernels fill; what is not asked for has a size of 0."""

    bounds: np.ndarray  # int64 [events + 1]
    key: np.ndarray  # int32 [choices]
    recorded: np.ndarray  # uint8 [choices]
    row: np.ndarray  # int32 [choices]
    chosen_by: np.ndarray  # int32 [choices]
    choice: np.ndarray  # int32 [rows, L, k]


def accesses(
    trace: Trace,
    *,
    sequential: bool,
    recorded: bool = False,
    rows: bool = False,
    chosen_by: bool = False,
    choices: bool = False,
    block_rows: int | None = None,
) -> Iterator[Accesses]:
    """Yield the accesses of a trace in parts.

    Args:
        trace: The trace.
        sequential: One access at a time instead of together.
        recorded: Bring what the engine recorded of its own residency.
        rows: Bring the row of each access.
        chosen_by: Bring how many rows chose it, if not `sequential`.
        choices: Bring which access each choice is, where steps have several rows.
        block_rows: About how many rows a part has, in whole steps. By default some MB.

    Raises:
        MoetraceError: An id or a recorded residency is impossible. The message names file, dataset and row.
    """
    done = 0
    for block in trace.blocks(block_rows):
        first = int(trace.offset[block.first_step])
        record = np.zeros((0, 0, 0), np.uint8)
        if recorded:
            record = trace.read("recorded", first, first + len(block.request))
            check_recorded(trace.shown, first, record, block.experts)
        part = _accesses(trace, block, record, sequential, _Asked(rows, chosen_by, choices))._replace(first=done)
        done += part.key.size
        yield part


def layer_accesses(
    trace: Trace, block: Block, part: tuple[int, int], *, sequential: bool, buffer: np.ndarray
) -> Accesses:
    """Return the accesses of layers part[0] up to part[1] in a block of the trace, as of a trace that has no others.

    Their keys lie in `buffer`, int32 with room for every choice, until it is used again.

    Raises MoetraceError as `accesses` does.
    """
    return _accesses(trace, block, np.zeros((0, 0, 0), np.uint8), sequential, _Asked(), part, buffer)


def _accesses(
    trace: Trace,
    block: Block,
    record: np.ndarray,
    sequential: bool,
    asked: _Asked,
    part: tuple[int, int] | None = None,
    buffer: np.ndarray | None = None,
) -> Accesses:
    first, stop = (0, trace.layers) if part is None else part
    most = len(block.experts) * (stop - first) * trace.top_k
    key = np.empty(most, np.int32) if buffer is None else buffer[:most]
    offset = np.ascontiguousarray(block.offset, np.int64)
    several = asked.choices and block.steps < len(block.experts)
    room = _Room(
        np.empty(block.steps * (stop - first) + 1, np.int64),
        key,
        np.full(key.size if record.size else 0, NOT_RECORDED, np.uint8),
        np.empty(key.size if asked.rows else 0, np.int32),
        np.empty(0 if sequential or not asked.chosen_by else key.size, np.int32),
        np.full(block.experts.shape if several else (0, 0, 0), -1, np.int32),
    )
    fill = _all_choices if sequential else _distinct_choices
    absent = absent_id(trace.num_experts)
    if not fill(block.experts, record, offset, (first, stop), trace.num_experts, absent, room):
        where = trace.shown
        check_ids(where, int(trace.offset[block.first_step]), block.experts, trace.num_experts)  # says which
        raise MoetraceError(f"{where}: /experts changed while it was read.")
    phase = trace.phase[block.first_step : block.first_step + block.steps]
    end = room.bounds[-1]
    request = np.ascontiguousarray(block.request, np.int32)
    row_choices = trace.top_k if sequential and end == key.size else 0
    return Accesses(
        first=0,
        key=key[:end],
        bounds=room.bounds,
        recorded=room.recorded[:end],
        phase=phase,
        rows=request.size,
        row=room.row[:end],
        request=request,
        step_rows=np.diff(offset),
        chosen_by=room.chosen_by[:end],
        row_choices=row_choices,
        choice=room.choice,
    )


@kernel(inline=False)
def _all_choices(experts, record, offset, part, num_experts, absent, room):
    """Fill room with every choice of experts [rows, L, k] in order; return 0 if an id is no expert's or twice in a row.

    Indices are unsigned, as a signed one may be negative, which is tested for each time: 0.8 ns a choice, not 1.0.
    """
    bounds, key, recorded, rows, _, choice = room
    layers = experts.shape[1]
    last_cell = np.full(num_experts, -1)  # of each expert: the last (row, layer) that chose it
    event = end = bounds[0] = 0
    for step in range(offset.size - 1):
        for layer in range(part[0], part[1]):
            first = (layer - part[0]) * num_experts
            for row in range(offset[step], offset[step + 1]):
                cell = row * layers + layer
                for slot in range(experts.shape[2]):
                    expert = np.int64(experts[np.uint64(row), np.uint64(layer), np.uint64(slot)])
                    if expert == absent:
                        continue
                    if expert >= num_experts or last_cell[np.uint64(expert)] == cell:
                        return 0
                    last_cell[np.uint64(expert)] = cell
                    key[np.uint64(end)] = first + expert
                    if recorded.size:
                        recorded[end] = record[row, layer, slot]
                    if rows.size:
                        rows[end] = row
                    if choice.size:
                        choice[row, layer, slot] = end
                    end += 1
            event += 1
            bounds[event] = end
    return 1


@kernel(inline=False)
def _distinct_choices(experts, record, offset, part, num_experts, absent, room):
    """Fill room with the distinct experts of each event; return 0 if an id is no expert's or twice."""
    bounds, key, recorded, rows, chosen_by, choice = room
    layers, top_k = experts.shape[1:]
    access = np.zeros(num_experts, np.int32)  # of each expert of the event
    # Of each expert: the last (row, layer), event and choice that were its own, and the record of its event's first.
    last_cell, last_event = np.full(num_experts, -1), np.full(num_experts, -1)
    last_choice, first_record = np.full(num_experts, -1), np.zeros(num_experts, np.uint8)
    count = np.zeros(num_experts, np.int32)  # of the rows of the event that chose it, as long as it is not emitted
    event = end = bounds[0] = 0
    for step in range(offset.size - 1):
        for layer in range(part[0], part[1]):
            for row in range(offset[step], offset[step + 1]):
                for slot in range(top_k):
                    expert = np.int64(experts[np.uint64(row), np.uint64(layer), np.uint64(slot)])
                    at = np.uint64(expert)
                    if expert == absent:
                        continue
                    if expert >= num_experts or last_cell[at] == row * layers + layer:
                        return 0
                    last_cell[at] = row * layers + layer
                    last_choice[at] = row * top_k + slot
                    count[at] += 1
                    if recorded.size and last_event[at] != event:
                        first_record[at] = record[row, layer, slot]
                    last_event[at] = event
            for row in range(offset[step], offset[step + 1]):
                for slot in range(top_k):
                    expert = np.int64(experts[np.uint64(row), np.uint64(layer), np.uint64(slot)])
                    at = np.uint64(expert)
                    if expert != absent and last_choice[at] == row * top_k + slot:
                        key[np.uint64(end)] = (layer - part[0]) * num_experts + expert
                        if recorded.size:
                            recorded[end] = first_record[at]
                        if rows.size:
                            rows[end] = row
                        if chosen_by.size:
                            chosen_by[end] = count[at]
                        count[at] = 0
                        access[at] = end
                        end += 1
            if choice.size:
                for row in range(offset[step], offset[step + 1]):
                    for slot in range(top_k):
                        expert = np.int64(experts[np.uint64(row), np.uint64(layer), np.uint64(slot)])
                        if expert != absent:
                            choice[row, layer, slot] = access[np.uint64(expert)]
            event += 1
            bounds[event] = end
    return 1
