"""A trace as accesses to experts: which key comes after which, block by block.

A key is one expert of one layer, `layer * E + expert`. Accesses come step by step, within a step layer by layer, within
a layer row by row and slot by slot; absent choices are not accesses. One (step, layer) is an *event*. Sequentially
every choice is an access. At once, an event demands each of its experts one time, however many rows chose it, in the
order of their last choices.
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
    # The record of each access (at once: of the first row that chose it), 255 = nothing; [0] if not asked for.
    recorded: np.ndarray  # uint8 [n]
    phase: np.ndarray  # uint8 [steps]: 0 prefill, 1 decode, 2 mixed
    rows: int
    # The row of these that made each choice (at once: the last one); [0] if not asked for, or no step has rows of
    # several requests.
    row: np.ndarray  # int32 [n]
    request: np.ndarray  # int32 [rows]
    step_rows: np.ndarray  # int64 [steps]
    # At once, how many rows chose each; [0] if not asked for.
    chosen_by: np.ndarray  # int32 [n]
    row_choices: int  # how many, all different, each row made in each layer, one after another; 0 if some made fewer
    fresh: np.ndarray  # int32 [<= keys]: which of these are the first of their key, in no order
    experts: np.ndarray  # the ids [rows, L, k]; [0, 0, 0] if each step is of one row


class _Asked(NamedTuple):
    """The columns of a block that come with its keys."""

    rows: bool = False
    chosen_by: bool = False


class _Room(NamedTuple):
    """Room for the accesses of a block, which kernels fill; columns not asked for have a size of 0."""

    bounds: np.ndarray  # int64 [events + 1]
    key: np.ndarray  # int32 [choices]
    recorded: np.ndarray  # uint8 [choices]
    row: np.ndarray  # int32 [choices]
    chosen_by: np.ndarray  # int32 [choices]
    fresh: np.ndarray  # int32 [keys]
    last_row: np.ndarray  # int32 [keys]: the last row that chose each key, -1 at first
    # For an event at once: its experts, last first, and the last row of each; by expert, how many rows chose it, and
    # the record of the first.
    own: np.ndarray  # int32 [4, experts + 1]


def accesses(
    trace: Trace,
    *,
    sequential: bool,
    recorded: bool = False,
    rows: bool = False,
    chosen_by: bool = False,
    block_rows: int | None = None,
) -> Iterator[Accesses]:
    """Yield the accesses of a trace in parts.

    Args:
        trace: The trace.
        sequential: One access at a time instead of together.
        recorded: Bring what the engine recorded of its own residency.
        rows: Bring the row of each access, where a step has rows of several requests.
        chosen_by: Bring how many rows chose it, if not `sequential`.
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
        part = _accesses(trace, block, record, sequential, _Asked(rows, chosen_by))._replace(first=done)
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
    keys = (stop - first) * trace.num_experts
    most = len(block.experts) * (stop - first) * trace.top_k
    key = np.empty(most, np.int32) if buffer is None else buffer[:most]
    offset = np.ascontiguousarray(block.offset, np.int64)
    request = np.ascontiguousarray(block.request, np.int32)
    room = _Room(
        bounds=np.empty(block.steps * (stop - first) + 1, np.int64),
        key=key,
        recorded=np.full(key.size if record.size else 0, NOT_RECORDED, np.uint8),
        row=np.empty(key.size if asked.rows and _mixes_requests(request, offset) else 0, np.int32),
        chosen_by=np.empty(0 if sequential or not asked.chosen_by else key.size, np.int32),
        fresh=np.empty(keys, np.int32),
        last_row=np.full(keys, -1, np.int32),
        own=np.empty((4, trace.num_experts + 1), np.int32),
    )
    fill = _all_choices if sequential else _distinct_choices
    ids = block.experts, record, trace.num_experts, absent_id(trace.num_experts)
    fresh = fill(ids, offset, (first, stop), room)
    if fresh < 0:
        where = trace.shown
        check_ids(where, int(trace.offset[block.first_step]), block.experts, trace.num_experts)  # says which
        raise MoetraceError(f"{where}: /experts changed while it was read.")
    end = room.bounds[-1]
    return Accesses(
        first=0,
        key=key[:end],
        bounds=room.bounds,
        recorded=room.recorded[:end],
        phase=trace.phase[block.first_step : block.first_step + block.steps],
        rows=request.size,
        row=room.row[:end],
        request=request,
        step_rows=np.diff(offset),
        chosen_by=room.chosen_by[:end],
        row_choices=trace.top_k if sequential and end == key.size else 0,
        fresh=room.fresh[:fresh],
        experts=block.experts if block.steps < request.size else block.experts[:0, :0, :0],
    )


def _mixes_requests(request: np.ndarray, offset: np.ndarray) -> bool:
    """Whether a step has rows, int32 [rows], of several requests."""
    changes = np.flatnonzero(np.diff(request)) + 1
    starts = np.zeros(request.size + 1, bool)
    starts[offset] = True
    return not starts[changes].all()


@kernel(inline=False)
def _all_choices(ids, offset, part, room):
    """Fill room with every choice, in order; ids: experts and record [rows, L, k], how many experts, the absent id.

    Return how many keys occur; -1 if an id is no expert's or twice in a row.
    """
    event = end = fresh = room.bounds[0] = 0
    for step in range(offset.size - 1):
        for layer in range(part[0], part[1]):
            where = (layer, offset[step], offset[step + 1], (layer - part[0]) * ids[2])
            end, fresh = _one_by_one(ids, where, room, end, fresh)
            if end < 0:
                return -1
            event += 1
            room.bounds[event] = end
    return fresh


@kernel(inline=False)
def _distinct_choices(ids, offset, part, room):
    """Fill room with the distinct experts of each event; the rest is as of `_all_choices`."""
    event = end = fresh = room.bounds[0] = 0
    for step in range(offset.size - 1):
        for layer in range(part[0], part[1]):
            where = (layer, offset[step], offset[step + 1], (layer - part[0]) * ids[2])
            if offset[step + 1] - offset[step] == 1:
                end, fresh = _one_by_one(ids, where, room, end, fresh)
            else:
                end, fresh = _together(ids, where, room, end, fresh)
            if end < 0:
                return -1
            event += 1
            room.bounds[event] = end
    return fresh


@kernel
def _one_by_one(ids, where, room, end, fresh):
    """Append the choices of an event (its layer, first row, last row + 1, first key); return the new ends, or -1.

    Indices are unsigned, as a signed one may be negative, which is tested for each time: 0.8 ns a choice, not 1.0.
    """
    experts, record, num_experts, absent = ids
    layer, start, stop, first = where
    asks = room.recorded.size + room.row.size + room.chosen_by.size > 0
    for row in range(start, stop):
        for slot in range(experts.shape[2]):
            expert = np.int64(experts[np.uint64(row), np.uint64(layer), np.uint64(slot)])
            if expert >= num_experts:
                if expert == absent:
                    continue
                return -1, fresh
            own, at = np.uint64(first + expert), np.uint64(end)
            before = room.last_row[own]
            if np.uint32(before) >= np.uint32(row):  # seldom: one branch
                if before == row:
                    return -1, fresh
                room.fresh[np.uint64(fresh)] = end
                fresh += 1
            room.last_row[own] = row
            room.key[at] = first + expert
            if asks:
                if room.recorded.size:
                    room.recorded[at] = record[row, layer, slot]
                if room.row.size:
                    room.row[at] = row
                if room.chosen_by.size:
                    room.chosen_by[at] = 1
            end += 1
    return end, fresh


@kernel
def _together(ids, where, room, end, fresh):
    """Append the distinct experts of an event of several rows.

    One pass, from the last choice back to the first: an expert's first place in it is its last choice. Whether it does
    is no branch, as a processor would often guess wrong: 2.3 ns a choice at 32 rows, not 4.8.
    """
    experts, record, num_experts, absent = ids
    layer, start, stop, first = where
    found, found_row = room.own[0], room.own[1]
    number, fresh_before = 0, fresh
    for back in range(1, stop - start + 1):
        row = stop - back
        for turn in range(1, experts.shape[2] + 1):
            slot = experts.shape[2] - turn
            expert = np.int64(experts[np.uint64(row), np.uint64(layer), np.uint64(slot)])
            if expert >= num_experts:
                if expert == absent:
                    continue
                return -1, fresh
            own, at = np.uint64(first + expert), np.uint64(expert)
            before = room.last_row[own]
            if before == row:
                return -1, fresh
            found[np.uint64(number)], found_row[np.uint64(number)] = expert, row  # if it is not in this event yet
            if before < 0:
                room.fresh[np.uint64(fresh)] = number  # from the end, until their number is known
                fresh += 1
            number += before < start
            room.last_row[own] = row
            if room.chosen_by.size:
                room.own[2, at] = (room.own[2, at] if before >= start else 0) + 1
            if room.recorded.size:
                room.own[3, at] = record[row, layer, slot]
    for i in range(number):
        at, expert = np.uint64(end + number - 1 - i), found[np.uint64(i)]
        room.key[at] = first + expert
        if room.recorded.size:
            room.recorded[at] = room.own[3, expert]
        if room.row.size:
            room.row[at] = found_row[np.uint64(i)]
        if room.chosen_by.size:
            room.chosen_by[at] = room.own[2, expert]
    for i in range(fresh_before, fresh):
        room.fresh[i] = end + number - 1 - room.fresh[i]
    return end + number, fresh
