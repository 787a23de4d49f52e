"""libCacheSim's oracleGeneral: packed little-endian records of 24 bytes, one for each access to an expert.

Accesses are in the order of a server that runs a step layer by layer: step, layer, row, slot. `clock_time` is the step;
`obj_id` the layer's entry in the trace x experts a layer + expert; `obj_size` the expert's size in bytes if the trace
holds sizes, else 1; `next_access_vtime` the number of the next access to the same expert, the first access of the trace
being 1, as libCacheSim's own converter counts, or -1 for the last access.
"""

from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import numpy as np

from moetrace.exports.blocks import PART_CHOICES, check_objects, parts
from moetrace.spec.errors import MoetraceError
from moetrace.trace.format import Trace
from moetrace.trace.schema import absent_id

RECORD = np.dtype([("clock_time", "<u4"), ("obj_id", "<u8"), ("obj_size", "<u4"), ("next_access_vtime", "<i8")])
_UINT32 = np.iinfo(np.uint32)


class _Segment(NamedTuple):
    """Accesses that follow one another: whole steps, some layers of one, or some rows of one of its layers."""

    first_step: int
    stop_step: int
    first_layer: int
    stop_layer: int
    first_row: int
    stop_row: int


def write(trace: Trace, file: IO[bytes], progress: Callable[[int], object]) -> None:
    """Write `trace` to `file`, from the end, where the next accesses are known; ids are read twice."""
    check_objects(trace, trace.layers)
    size = _sizes(trace)
    end: int = 0
    for part in parts(trace):
        end += int(np.count_nonzero(part.experts != absent_id(trace.num_experts)))
    upcoming = np.full(trace.layers * trace.num_experts, -1, np.int64)
    for segment in reversed(list(_segments(trace))):
        step, chosen = _accesses(trace, segment)
        end -= chosen.size
        records = np.empty(chosen.size, RECORD)
        records["clock_time"] = step
        records["obj_id"] = chosen
        records["obj_size"] = size[chosen]
        records["next_access_vtime"] = _next_access(chosen, end + 1, upcoming)
        file.seek(end * RECORD.itemsize)
        file.write(records.data)
        progress(segment.stop_row - segment.first_row if segment.first_layer == 0 else 0)


def _sizes(trace: Trace) -> np.ndarray:
    """Size uint32 of each object."""
    shape = (trace.layers, trace.num_experts)
    if trace.expert_bytes is None:
        return np.ones(shape, np.uint32).ravel()
    if trace.expert_bytes.max() > _UINT32.max:
        raise MoetraceError("this format holds sizes below 4 GiB, but /layers/expert_bytes has larger ones.")
    return np.broadcast_to(trace.expert_bytes.reshape(trace.layers, -1), shape).astype(np.uint32).ravel()


def _segments(trace: Trace) -> Iterator[_Segment]:
    first, at_once = 0, max(1, PART_CHOICES // (trace.layers * trace.top_k))
    while first < trace.steps:
        stop = int(np.searchsorted(trace.offset, trace.offset[first] + at_once, side="right")) - 1
        stop = max(stop, first + 1)
        begin, end = int(trace.offset[first]), int(trace.offset[stop])
        layers = min(trace.layers, max(1, PART_CHOICES // ((end - begin) * trace.top_k)))
        rows = max(1, PART_CHOICES // trace.top_k) if layers == 1 and stop - first == 1 else end - begin
        for layer in range(0, trace.layers, layers):
            for row in range(begin, end, rows):
                yield _Segment(first, stop, layer, min(layer + layers, trace.layers), row, min(row + rows, end))
        first = stop


def _accesses(trace: Trace, segment: _Segment) -> tuple[np.ndarray, np.ndarray]:
    """Step and object of each access, in order."""
    offset = np.clip(trace.offset[segment.first_step : segment.stop_step + 1], segment.first_row, segment.stop_row)
    rows = np.diff(offset)
    layer = np.arange(segment.first_layer, segment.stop_layer)
    ids = trace.read("experts", int(offset[0]), int(offset[-1]))[:, segment.first_layer : segment.stop_layer]
    # Row r of a step of n rows takes place layer * n + r in it, counted in top-k choices.
    row_of_step = np.arange(len(ids)) - np.repeat(offset[:-1] - offset[0], rows)
    step_start = np.repeat((offset[:-1] - offset[0]) * layer.size, rows)
    place = (step_start + row_of_step)[:, None] + np.arange(layer.size) * np.repeat(rows, rows)[:, None]
    order = np.empty(place.size, np.int64)
    order[place.ravel()] = np.arange(place.size)
    ids = ids.reshape(-1, trace.top_k)[order]
    made = ids != absent_id(trace.num_experts)
    chosen = (ids + (layer[order % layer.size] * trace.num_experts)[:, None])[made]
    step = np.repeat(np.arange(segment.first_step, segment.stop_step), rows * layer.size)
    return np.repeat(step, made.sum(axis=1)), chosen


def _next_access(chosen: np.ndarray, first_time: int, upcoming: np.ndarray) -> np.ndarray:
    """Time of the next access after each of `chosen` [n], whose times count from `first_time`.

    `upcoming` holds for each object the time of its first access after these, and then of the first among these.
    """
    if not chosen.size:
        return chosen
    bits = chosen.size.bit_length()  # sorting keys that hold the place takes a third of argsort's time
    key = np.sort((chosen << bits) | np.arange(chosen.size))
    ordered, order = key >> bits, key & ((1 << bits) - 1)
    time = first_time + order
    changes = ordered[1:] != ordered[:-1]
    first, last = np.r_[True, changes], np.r_[changes, True]
    following = np.empty(chosen.size, np.int64)
    following[order] = np.where(last, upcoming[ordered], np.roll(time, -1))
    upcoming[ordered[first]] = time[first]
    return following
