"""libCacheSim's oracleGeneral as `moetrace export` writes it: the accesses of a server that runs a step layer by layer.

Records of 24 bytes without a header: clock_time uint32 (the step), obj_id uint64 (entry of the layer x experts +
expert), obj_size uint32, next_access_vtime int64. Accesses stand by step, layer, row, slot. With the numbers of experts
and of choices, rows come out as they were, as long as no choice was absent: each layer of a step then has `top_k`
accesses a row. Requests, positions, phases, gates and the layers' numbers in the model are not in it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.importers.captured import FIRST_BYTES, Capture, Hints
from moetrace.importers.reading.spool import Spool
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import MAX_ROWS, PREFILL, check_sizes, expert_dtype

_RECORD = np.dtype([("clock_time", "<u4"), ("obj_id", "<u8"), ("obj_size", "<u4"), ("next_access_vtime", "<i8")])
_AT_ONCE = 1 << 18  # records
_MOST_HELD = 1 << 25  # of one step: 32,768 rows through 94 layers at 8 choices are 25 million
_OTHER = "export the trace as .npz or .parquet instead"


class _WholeSteps(NamedTuple):
    """Whole steps."""

    experts: np.ndarray  # [rows, layers, top_k]
    rows: np.ndarray  # int64 [steps]


def recognize(first: bytes, name: str) -> bool:
    """Whether these bytes are such records: clocks from 0 on, and the next accesses that they tell are there."""
    if (len(first) < FIRST_BYTES and len(first) % _RECORD.itemsize) or len(first) < _RECORD.itemsize:
        return False
    records = np.frombuffer(first, _RECORD, len(first) // _RECORD.itemsize)
    clock, told = records["clock_time"], records["next_access_vtime"]
    if clock[0] or (clock[1:] < clock[:-1]).any() or not records["obj_size"].all():
        return False
    order = np.argsort(records["obj_id"], kind="stable")
    same = records["obj_id"][order][1:] == records["obj_id"][order][:-1]
    found = np.full(records.size, -1)
    found[order[:-1][same]] = order[1:][same] + 1  # accesses count from 1
    unknown = found < 0
    return bool((found == told)[~unknown].all() and ((told > records.size) | (told == -1))[unknown].all())


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture a file."""
    return [_read(path, hints) for path in sources]


def _read(path: Path, hints: Hints) -> Capture:
    if path.stat().st_size % _RECORD.itemsize or not path.stat().st_size:
        raise MoetraceError(f"{path} has {path.stat().st_size} bytes, which are not records of {_RECORD.itemsize}.")
    num_experts, top_k = hints.need("num_experts", path), hints.need("top_k", path)
    check_sizes(str(path), num_experts, top_k, 1, 1, 1)
    spool: Spool | None = None
    sizes = np.zeros(0, np.int64)
    step_rows: list[np.ndarray] = []
    for first, records in _whole_steps(path, hints):
        if spool is None:  # all layers are in the first step, or it would not be whole
            layers = hints.layers or int(records["obj_id"].max()) // num_experts + 1
            check_sizes(str(path), num_experts, top_k, layers, 1, 1)
            spool = Spool(hints, num_experts, layers, top_k)
            sizes = np.zeros(layers * num_experts, np.int64)
        _note_sizes(path, first, records, sizes)
        steps = _arranged(path, records, (sizes.size // num_experts, num_experts, top_k))
        spool.append(experts=steps.experts)
        step_rows.append(steps.rows)
        if spool.rows > MAX_ROWS:
            raise MoetraceError(f"{path} has more rows than a trace may have.")
    assert spool is not None
    rows = np.concatenate(step_rows)
    facts: dict[str, Any] = {
        "format": "oracle-general",
        "phase": "not recorded: every row is taken as prefill unless --as decode --steps A:B says otherwise",
        "requests": "not recorded: all rows are of one, and positions count up",
    }
    return Capture(
        model="",
        num_experts=num_experts,
        top_k=top_k,
        layer_index=np.arange(sizes.size // num_experts),
        expert_bytes=_expert_bytes(path, sizes.reshape(-1, num_experts), hints),
        request=np.zeros(spool.rows, np.int32),
        position=np.arange(spool.rows, dtype=np.int64),
        phase=np.full(spool.rows, PREFILL, np.uint8),
        optional=(),
        facts=facts,
        parts=spool.parts,
        sources=(path,),
        step_rows=rows,
    )


def _whole_steps(path: Path, hints: Hints) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of the first record (from 0) and records of whole steps."""
    held, first = np.zeros(0, _RECORD), 0
    with path.open("rb") as file:
        while data := file.read(_AT_ONCE * _RECORD.itemsize):
            hints.reading(len(data))
            records = np.concatenate([held, np.frombuffer(data, _RECORD, len(data) // _RECORD.itemsize)])
            clock = records["clock_time"]
            changes = np.flatnonzero(clock[1:] != clock[:-1]) + 1
            if (clock[1:] < clock[:-1]).any():
                at = first + int((clock[1:] < clock[:-1]).argmax()) + 1
                raise MoetraceError(f"{path}: record {at} is of an earlier step than the one before: {_OTHER}.")
            cut = int(changes[-1]) if changes.size else 0
            if cut:
                yield first, records[:cut]
            held, first = records[cut:], first + cut
            if held.size > _MOST_HELD:
                raise MoetraceError(f"{path}: the step from record {first} on has more than {_MOST_HELD:,} accesses.")
    if held.size:
        yield first, held


def _note_sizes(path: Path, first: int, records: np.ndarray, sizes: np.ndarray) -> None:
    """Put the size of each object into `sizes`, 0 as long as it is not known."""
    objects = records["obj_id"]
    if objects.max() >= sizes.size:
        at = int(objects.argmax())
        raise MoetraceError(
            f"{path}: record {first + at} is of object {objects[at]}, but the layers have only {sizes.size:,} experts "
            f"together: check --experts and --model."
        )
    objects = objects.astype(np.int64)
    before = sizes[objects]
    sizes[objects] = records["obj_size"]
    other = (sizes[objects] != records["obj_size"]) | ((before > 0) & (before != records["obj_size"]))
    if other.any():
        at = int(other.argmax())
        raise MoetraceError(f"{path}: record {first + at}: object {objects[at]} has another size than elsewhere.")


def _arranged(path: Path, records: np.ndarray, shape: tuple[int, int, int]) -> _WholeSteps:
    """The ids of whole steps by row, of layers, experts and choices as `shape` says."""
    layers, num_experts, top_k = shape
    clock, objects = records["clock_time"].astype(np.int64), records["obj_id"].astype(np.int64)
    begins = np.r_[True, clock[1:] != clock[:-1]]
    step, layer = np.cumsum(begins) - 1, objects // num_experts
    cell = step * layers + layer
    count = np.bincount(cell, minlength=(int(step[-1]) + 1) * layers).reshape(-1, layers)
    odd = (count != count[:, :1]) | (count % top_k != 0)
    if odd.any() or (cell[1:] < cell[:-1]).any():
        where, entry = np.argwhere(odd)[0].tolist() if odd.any() else (int(step[1:][cell[1:] < cell[:-1]][0]), 0)
        raise MoetraceError(
            f"{path}: step {clock[begins][where]} has {count[where, entry]} accesses in layer {entry} and "
            f"{count[where, 0]} in layer 0, which do not make rows of {top_k} a layer: choices that were absent leave "
            f"no mark here, so check --experts and --top-k, or {_OTHER}."
        )
    rows = count[:, 0] // top_k
    place = np.arange(cell.size) - np.repeat(np.cumsum(count.ravel()) - count.ravel(), count.ravel())
    row = (np.cumsum(rows) - rows)[step] + place // top_k
    experts = np.empty((int(rows.sum()), layers, top_k), expert_dtype(num_experts))
    experts[row, layer, place % top_k] = objects % num_experts
    return _WholeSteps(experts, rows)


def _expert_bytes(path: Path, sizes: np.ndarray, hints: Hints) -> np.ndarray | None:
    """Bytes of an expert, int64 [layers] or [layers, experts]; None if they are not known, as sizes of 1 say."""
    if sizes.max() <= 1:
        return None
    by_layer = sizes.max(axis=1)
    if ((sizes == by_layer[:, None]) | (sizes == 0)).all():
        return by_layer
    if sizes.all():
        return sizes
    hints.note(f"{path}: experts that nobody chose have no size, so the sizes of the others were left out.")
    return None
