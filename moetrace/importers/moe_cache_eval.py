"""Event traces of moe-cache-eval: `events.safetensors` and, beside it, `manifest.json`.

An event is one layer in one forward cycle: which experts its tokens chose, in ascending order, how many each, and the
sum of their gates (`moe_controller/events.py` and `convert.py`, commit f7bacc2e): request_indices, scheduler_steps,
forward_cycles, phases (0 prefill, 1 decode), layer_ids, token_counts [events], offsets [events + 1] into expert_ids,
assignment_counts, gate_mass [accesses]. Where all events are of one token these are its choices, ordered by id instead
of gate, which give rows; else they are counts. Batched decode has no request (-1), which becomes one for all rows.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from moetrace.importers.captured import SPARSEST, Capture, Counts, Hints, Part
from moetrace.importers.reading.tensors import HEADER_BYTES, integers, is_header, shape_of, tensors
from moetrace.importers.reading.text import first_bytes
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import BLOCK_BYTES, DECODE, MAX_LAYERS, absent_id, check_sizes, expert_dtype

MANIFEST = "manifest.json"
_MANIFEST_BYTES = 16 << 20
_EVENT = ("request_indices", "scheduler_steps", "forward_cycles", "phases", "layer_ids", "token_counts")
_MAX = 2**31


class _Model(msgspec.Struct):
    id: str
    num_experts: int
    top_k: int


class _Manifest(msgspec.Struct):
    model: _Model


class _Events(NamedTuple):
    """The fields of each event, with its step and layer entry; all int32 [events] except `offsets`."""

    path: Path
    offsets: np.ndarray  # int64 [events + 1]
    step: np.ndarray  # 0, 1, ...
    entry: np.ndarray  # index of its layer among all layers
    request: np.ndarray
    phase: np.ndarray
    tokens: np.ndarray


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes has the tensors of an event trace."""
    head = first[HEADER_BYTES:]
    return is_header(first) and all(b'"%s":' % key.encode() in head for key in ("assignment_counts", "token_counts"))


def read(sources: Sequence[Path], hints: Hints) -> list[Capture | Counts]:
    """A capture, or counts, a file."""
    return [_read(path, hints) for path in sources]


def _read(path: Path, hints: Hints) -> Capture | Counts:
    hints.reading(path.stat().st_size)
    model, sources = None, (path,)
    manifest = path.parent / MANIFEST
    if manifest.is_file():
        model, sources = _model(manifest), (path, manifest)
    num_experts = model.num_experts if model else hints.need("num_experts", path)
    top_k = model.top_k if model else hints.need("top_k", path)
    events, layer_index = _events(path)
    check_sizes(str(path), num_experts, top_k, layer_index.size, 1, 1)
    facts: dict[str, Any] = {"format": "moe-cache-eval", "engine": "moe-cache-eval", "slots": "by id, not by gate"}
    found = _capture if (events.tokens == 1).all() else _counts
    return found(events, layer_index, num_experts, top_k)._replace(
        model=model.id if model else "", facts=facts, sources=sources
    )


def _model(manifest: Path) -> _Model:
    try:
        return msgspec.json.decode(first_bytes(manifest, _MANIFEST_BYTES), type=_Manifest).model
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MoetraceError(f"{manifest} is not as expected: {str(error).rstrip('.')[:200]}.") from None


def _events(path: Path) -> tuple[_Events, np.ndarray]:
    with tensors(path) as file:
        (count,) = shape_of(path, file, "layer_ids") or (0,)
        (accesses,) = shape_of(path, file, "expert_ids") or (0,)
        for name, size in (
            *((name, count) for name in _EVENT),
            ("offsets", count + 1),
            ("assignment_counts", accesses),
        ):
            if shape_of(path, file, name) != (size,):
                raise MoetraceError(f"{path}: {name} has shape {shape_of(path, file, name)}, but must have ({size},).")
        if shape_of(path, file, "gate_mass", ("F32", "F64", "F16")) != (accesses,):
            raise MoetraceError(f"{path}: gate_mass has another shape than expert_ids.")
        if not count:
            raise MoetraceError(f"{path} holds no events.")
        limits = {"request_indices": (-1, _MAX), "phases": (0, DECODE + 1), "layer_ids": (0, MAX_LAYERS)}
        limits["token_counts"] = (1, _MAX)
        request, scheduler, cycle, phase, layer, tokens = (
            integers(path, name, file.get_tensor(name), *limits.get(name, (0, _MAX))) for name in _EVENT
        )
        offsets = integers(path, "offsets", file.get_tensor("offsets"), 0, accesses + 1).astype(np.int64, copy=False)
    if offsets[0] != 0 or offsets[-1] != accesses or (np.diff(offsets) < 0).any():
        raise MoetraceError(f"{path}: offsets must increase from 0 to {accesses}.")
    new = (np.diff(scheduler) != 0) | (np.diff(cycle) != 0)
    if (~new & (np.diff(layer) <= 0)).any():
        raise MoetraceError(f"{path}: the layers of a forward cycle are not in ascending order.")
    step = np.r_[np.int32(0), np.cumsum(new, dtype=np.int32)]
    layer_index = np.unique(layer)
    if (int(step[-1]) + 1) * layer_index.size > SPARSEST * count + 2**16:
        raise MoetraceError(
            f"{path}: {count} events are too few for {step[-1] + 1} cycles of {layer_index.size} layers."
        )
    starts = np.flatnonzero(np.r_[True, new])
    for name, array in (("request_indices", request), ("phases", phase), ("token_counts", tokens)):
        if (array != array[starts][step]).any():
            raise MoetraceError(f"{path}: {name} differ between the layers of a forward cycle.")
    entry = np.searchsorted(layer_index, layer).astype(np.int32)
    return _Events(path, offsets, step, entry, request, phase, tokens), layer_index


def _firsts(events: _Events) -> np.ndarray:
    return np.flatnonzero(np.r_[True, np.diff(events.step) != 0])


def _capture(events: _Events, layer_index: np.ndarray, num_experts: int, top_k: int) -> Capture:
    starts = _firsts(events)
    request = events.request[starts]
    _, number = np.unique(request, return_inverse=True)
    order = np.argsort(number, kind="stable")
    begins = np.flatnonzero(np.r_[True, np.diff(number[order]) != 0])
    position = np.empty(starts.size, np.int64)
    position[order] = np.arange(starts.size) - np.repeat(begins, np.diff(np.r_[begins, starts.size]))
    width = np.diff(events.offsets)
    if width.max() > top_k:
        at = int(width.argmax())
        raise MoetraceError(f"{events.path}: event {at} is of one token, but has {width[at]} experts of {top_k}.")
    shape = (starts.size, layer_index.size, top_k)
    if math.prod(shape) > SPARSEST * int(events.offsets[-1]) + 2**16:
        raise MoetraceError(
            f"{events.path}: {events.offsets[-1]} accesses are too few for {shape} choices (tokens, layers, slots)."
        )
    return Capture(
        model="",
        num_experts=num_experts,
        top_k=top_k,
        layer_index=layer_index,
        expert_bytes=None,
        request=request,
        position=position,
        phase=events.phase[starts].astype(np.uint8),
        optional=("gates",),
        facts={},
        parts=lambda: _ids(events, layer_index.size, num_experts, top_k),
        step_rows=np.ones(starts.size, np.int64),
    )


def _blocks(events: _Events, steps_at_once: int) -> Iterator[tuple[slice, slice, int]]:
    """Events, accesses and number of some steps at a time."""
    starts = np.r_[_firsts(events), events.step.size]
    for first in range(0, starts.size - 1, steps_at_once):
        last = min(first + steps_at_once, starts.size - 1)
        some = slice(int(starts[first]), int(starts[last]))
        yield some, slice(int(events.offsets[some.start]), int(events.offsets[some.stop])), last - first


def _accesses(events: _Events, file: Any, some: slice, part: slice, num_experts: int):
    """Step (from the first here), layer entry, ids, counts and slot of the accesses of `some` events."""
    width = np.diff(events.offsets[some.start : some.stop + 1])
    of = np.repeat(np.arange(some.start, some.stop), width)
    ids = integers(events.path, "expert_ids", file.get_slice("expert_ids")[part], 0, num_experts)
    counts = integers(events.path, "assignment_counts", file.get_slice("assignment_counts")[part], 1, _MAX)
    slot = np.arange(part.start, part.stop) - events.offsets[of]
    return events.step[of] - events.step[some.start], events.entry[of], ids, counts, slot


def _ids(events: _Events, layers: int, num_experts: int, top_k: int) -> Iterator[Part]:
    with tensors(events.path) as file:
        for some, part, steps in _blocks(events, max(1, BLOCK_BYTES // (layers * top_k * 4))):
            step, entry, ids, counts, slot = _accesses(events, file, some, part, num_experts)
            if (counts != 1).any():
                raise MoetraceError(f"{events.path}: an event is of one token that chose an expert more than once.")
            experts = np.full((steps, layers, top_k), absent_id(num_experts), expert_dtype(num_experts))
            gates = np.zeros((steps, layers, top_k), np.float32)
            experts[step, entry, slot] = ids
            gates[step, entry, slot] = file.get_slice("gate_mass")[part]
            yield {"experts": experts, "gates": gates}


def _counts(events: _Events, layer_index: np.ndarray, num_experts: int, top_k: int) -> Counts:
    starts = _firsts(events)
    cells = starts.size * layer_index.size * num_experts
    if cells > SPARSEST * int(events.offsets[-1]) + 2**20:
        raise MoetraceError(f"{events.path} would take {cells} counts, far more than the accesses that it holds.")
    return Counts(
        model="",
        num_experts=num_experts,
        top_k=top_k,
        layer_index=layer_index,
        rows=events.tokens[starts],
        phase=events.phase[starts].astype(np.uint8),
        facts={},
        parts=lambda: _sums(events, layer_index.size, num_experts, top_k),
    )


def _sums(events: _Events, layers: int, num_experts: int, top_k: int) -> Iterator[np.ndarray]:
    most = events.tokens[_firsts(events)].astype(np.int64) * top_k  # choices of each step
    with tensors(events.path) as file:
        for some, part, steps in _blocks(events, max(1, BLOCK_BYTES // (layers * num_experts * 8))):
            step, entry, ids, counts, _ = _accesses(events, file, some, part, num_experts)
            block = np.zeros((steps, layers, num_experts), np.int64)
            np.add.at(block, (step, entry, ids), counts)
            first = int(events.step[some.start])
            if (block.sum(axis=2).max(axis=1) > most[first : first + steps]).any():
                raise MoetraceError(f"{events.path}: an event has more assignments than its tokens times top_k.")
            yield block
