"""Part of a trace: its rows, steps, requests, layers or one phase, kept or left out."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.atomic import keep_inputs
from moetrace.trace.format import Trace
from moetrace.trace.naming import model_name
from moetrace.trace.opening import accepts_path
from moetrace.trace.ranges import Range, inside, merged, named_layers
from moetrace.trace.schema import ATTRIBUTE_BYTES, MAX_LAYERS, MIXED, OPTIONAL, PER_CHOICE, PHASE_NAMES, check_ids
from moetrace.trace.writer import CountsWriter, Writer
from moetrace.version import __version__

_TOLD_RANGES = 64  # of more, `source` tells the number
_TOLD_BYTES = ATTRIBUTE_BYTES - 4096


class _Wish(NamedTuple):
    """The selected part; ranges are merged, None is all."""

    rows: np.ndarray | None  # int64 [ranges, 2]
    steps: np.ndarray | None
    requests: np.ndarray | None
    phase: int | None
    out: bool

    @property
    def of_rows(self) -> bool:
        return any(part is not None for part in self[:4])


class _Numbers:
    """New numbers of requests, in order of appearance, and positions that count up in each."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}
        self.rows = np.zeros(0, np.int64)  # rows so far of each new number

    def renumber(self, request: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The new requests and positions of the next rows."""
        kinds, first, inverse = np.unique(request, return_index=True, return_inverse=True)
        for kind in kinds[np.argsort(first)].tolist():
            self.of.setdefault(kind, len(self.of))
        new = np.array([self.of[kind] for kind in kinds.tolist()], np.int64)[inverse]
        self.rows = np.concatenate([self.rows, np.zeros(len(self.of) - self.rows.size, np.int64)])
        order = np.argsort(new, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(new[order]) != 0])
        lengths = np.diff(np.r_[starts, new.size])
        position = np.empty(new.size, np.int64)
        position[order] = np.arange(new.size) - np.repeat(starts - self.rows[new[order[starts]]], lengths)
        self.rows[new[order[starts]]] += lengths
        return new, position


@accepts_path
def select(
    trace: Trace,
    path: str | os.PathLike[str],
    *,
    rows: Sequence[Range] | None = None,
    steps: Sequence[Range] | None = None,
    requests: Sequence[Range] | None = None,
    layers: Sequence[Range] | None = None,
    phase: str | None = None,
    out: bool = False,
    renumber: bool = False,
    first_layer: int | None = None,
    compress: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Copy a part of a trace: the rows that fit all that is said, in the layers that are said.

    A step keeps its other rows, and goes if none is left. The selection is in the `source` of the copy, under
    "selected". The same trace and wishes give the same bytes. Memory does not grow with the trace.

    Args:
        trace: A trace or the path of its file.
        path: The new file.
        rows: Ranges (start, stop) of rows, a stop of None for all the rest. By default all.
        steps: Ranges of steps.
        requests: Ranges of requests, by the numbers of the trace.
        layers: Ranges of layers, by their numbers in the model.
        phase: "prefill" or "decode".
        out: Whether the rows that fit all that is said, and the layers that are said, are left out instead.
        renumber: Whether requests are numbered from 0 in order of appearance, and positions of each from 0.
        first_layer: Number in the model of the first layer of the copy; the others keep their distance. By default all
            keep their numbers.
        compress: "zstd" or "gzip". By default data is contiguous.
        progress: A function that gets the number of rows (of counts, steps) copied since its last call.

    Raises:
        UsageError: A range is empty or lies outside the trace, or a trace of counts has no such thing.
        MoetraceError: The trace differs from its sha256s, or nothing would be left.

    Examples:
        >>> import moetrace as mt
        >>> mt.select("traces/tiny-olmoe.h5", "part.h5", requests=[(0, 4)], layers=[(1, 3)], phase="decode")
        >>> with mt.Trace.open("part.h5") as trace:
        ...     print(trace.rows, trace.layer_index)
        400 [1 2]
    """
    path = Path(path)
    keep_inputs(path, [trace.path])
    if phase not in (None, "prefill", "decode"):
        raise UsageError(f"phase is {phase!r}, but must be prefill or decode.")
    wish = _Wish(
        merged("rows", rows, trace.rows),
        merged("steps", steps, trace.steps),
        merged("requests", requests, None),
        None if phase is None else PHASE_NAMES.index(phase),
        out,
    )
    kept_layers = _kept_layers(trace, layers, out)
    if not wish.of_rows and layers is None and first_layer is None:
        raise UsageError("say which rows, steps, requests, layers or phase are meant.")
    index = trace.layer_index[kept_layers].astype(np.int64)
    index += 0 if first_layer is None else first_layer - index[0]
    if not 0 <= index[0] <= index[-1] <= MAX_LAYERS:
        raise UsageError(f"layers would have the numbers {index[0]} to {index[-1]}; 0 to {MAX_LAYERS} are possible.")
    trace.verify_hashes()
    said = {"rows": rows, "steps": steps, "requests": requests, "layers": layers, "phase": phase}
    said |= {} if first_layer is None else {"first_layer": first_layer}
    facts: dict[str, Any] = {
        "layer_index": index.astype(np.uint16),
        "model": trace.model if kept_layers.all() else _model(trace, int(kept_layers.sum())),
        "source": _source(trace, said | {"out": out, "renumber": renumber}),
        "compress": compress,
    }
    _copy(trace, path, wish, kept_layers, facts, renumber, progress)


def copy_without(
    trace: Trace,
    path: Path,
    *,
    rows: Sequence[tuple[int, int]],
    layers: np.ndarray,
    model: str,
    source: Mapping[str, Any],
    compress: str | None = None,
) -> None:
    """Copy a trace to a file without some rows and layers, block by block in constant memory.

    A step loses its rows, and goes if it loses all; requests and positions stay as they are.

    Args:
        trace: what is copied, of ids or of counts.
        path: the new file.
        rows: ranges [start, stop) of rows to leave out, in order and apart; none if the trace holds counts.
        layers: bool [layers], true for a layer to leave out; not all.
        model: the name of the model in the copy.
        source: where the copy is from.
        compress: as the Writer takes it.

    Raises:
        MoetraceError: an id in the copied part is impossible, nothing would be left, or the file cannot be written.
    """
    wish = _Wish(np.array(rows, np.int64) if rows else None, None, None, None, out=True)
    _copy(trace, path, wish, ~layers, {"model": model, "source": source, "compress": compress})


def _copy(
    trace: Trace,
    path: Path,
    wish: _Wish,
    layers: np.ndarray,
    facts: dict[str, Any],
    renumber: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write the rows that a wish means, in the layers that are true in bool [layers]; `facts` are the Writer's own."""
    facts = {"layer_index": trace.layer_index[layers]} | facts
    facts["layer_experts"] = None if trace.layer_experts is None else trace.layer_experts[layers]
    facts |= {"num_experts": trace.num_experts, "top_k": trace.top_k, "layers": int(layers.sum())}
    if "counts" in trace.has:
        _copy_counts(trace, path, wish, layers, renumber, facts, progress)
        return
    step_rows, step_phase = _steps_left(trace, wish)
    left = step_rows > 0
    if not left.any():
        raise MoetraceError(f"{trace.shown}: no row fits, so nothing would be left.")
    optional = [name for name in OPTIONAL if name in trace.has]
    if MIXED in trace.phase and MIXED not in step_phase[left]:  # only mixed steps needed phases of rows
        optional = [name for name in optional if name != "row_phase"]
    facts |= {
        "rows": int(step_rows.sum()),
        "steps": int(np.count_nonzero(left)),
        "expert_bytes": None if trace.expert_bytes is None else trace.expert_bytes[layers],
        "optional": optional,
    }
    numbers = _Numbers() if renumber else None
    with Writer(path, **facts) as writer:
        for first, steps_here, mask in _masks(trace, wish):
            if mask.any():
                append = _rows_of(trace, first, mask, layers, optional, numbers)
                lengths = step_rows[steps_here]
                writer.append(**append, steps=lengths[lengths > 0], phase=step_phase[steps_here][lengths > 0])
            if progress:
                progress(mask.size)


def _rows_of(
    trace: Trace, first: int, mask: np.ndarray, layers: np.ndarray, optional: list[str], numbers: _Numbers | None
) -> dict[str, np.ndarray]:
    """The data of rows that are true in `mask` [rows], the first of which is row `first`."""
    names = ["experts", "request", "position", *optional]
    data = {name: trace.read(name, first, first + mask.size)[mask] for name in names}
    data |= {name: data[name][:, layers] for name in PER_CHOICE if name in data}
    check_ids(trace.shown, first, data["experts"], trace.num_experts)
    if numbers:
        data["request"], data["position"] = numbers.renumber(data["request"])
    return data


def _masks(trace: Trace, wish: _Wish) -> Iterator[tuple[int, slice, np.ndarray]]:
    """Yield whole steps, some MiB of ids at a time: the first row, the steps, and which rows stay, bool [rows]."""
    for block in trace.blocks():
        first = int(trace.offset[block.first_step])
        yield first, slice(block.first_step, block.first_step + block.steps), _fits(wish, first, block)


def _steps_left(trace: Trace, wish: _Wish) -> tuple[np.ndarray, np.ndarray]:
    """How many rows each step keeps, int64 [steps], and its phase then, uint8 [steps]."""
    step_rows, phase = np.zeros(trace.steps, np.int64), trace.phase.copy()
    for part in trace.row_blocks():
        mask = _fits(wish, int(trace.offset[part.first_step]), part)
        here, starts = slice(part.first_step, part.first_step + part.steps), part.offset[:-1]
        step_rows[here] = np.add.reduceat(mask, starts, dtype=np.int64)
        decode = np.add.reduceat(mask & (part.phase == 1), starts, dtype=np.int64)
        one = np.where(decode == 0, 0, np.where(decode == step_rows[here], 1, MIXED))
        phase[here] = np.where(phase[here] == MIXED, one, phase[here])
    return step_rows, phase


def _fits(wish: _Wish, first: int, part: Any) -> np.ndarray:
    """bool [rows]: the rows of a block or part, the first of which is row `first`, that stay."""
    fits = np.ones(part.request.size, bool)
    if wish.rows is not None:
        fits &= inside(np.arange(first, first + fits.size), wish.rows)
    if wish.steps is not None:
        steps = inside(np.arange(part.first_step, part.first_step + part.offset.size - 1), wish.steps)
        fits &= np.repeat(steps, np.diff(part.offset))
    if wish.requests is not None:
        fits &= inside(part.request, wish.requests)
    if wish.phase is not None:
        fits &= part.phase == wish.phase
    return ~fits if wish.out and wish.of_rows else fits


def _copy_counts(
    trace: Trace,
    path: Path,
    wish: _Wish,
    layers: np.ndarray,
    renumber: bool,
    facts: dict[str, Any],
    progress: Callable[[int], object] | None,
) -> None:
    if wish.rows is not None or wish.requests is not None or renumber:
        raise UsageError(f"{trace.shown} holds only counts: only its steps, layers and phases can be selected.")
    kept = np.ones(trace.steps, bool)
    if wish.steps is not None:
        kept &= inside(np.arange(trace.steps), wish.steps)
    if wish.phase is not None:
        kept &= trace.phase == wish.phase
    if wish.out and wish.of_rows:
        kept = ~kept
    if not kept.any():
        raise MoetraceError(f"{trace.shown}: no step fits, so nothing would be left.")
    rows = int(np.diff(trace.offset)[kept].sum())
    with CountsWriter(path, rows=rows, steps=int(np.count_nonzero(kept)), **facts) as writer:
        for block in trace.count_blocks():
            here = kept[block.first_step : block.first_step + len(block.counts)]
            if here.any():
                writer.append_counts(block.counts[here][:, layers], block.rows[here], block.phase[here])
            if progress:
                progress(len(block.counts))


def _kept_layers(trace: Trace, ranges: Sequence[Range] | None, out: bool) -> np.ndarray:
    """bool [layers]. Raises if a range names no layer of the trace, or none would be left."""
    index = trace.layer_index.astype(np.int64)
    if ranges is None:
        return np.ones(index.size, bool)
    kept = named_layers(trace.shown, index, ranges) != out
    if not kept.any():
        raise MoetraceError(f"{trace.shown}: no layer would be left.")
    return kept


def _model(trace: Trace, layers: int) -> str:
    said = str(trace.source.get("recorded_model") or trace.model)
    return model_name(trace.shown, said, layers, trace.num_experts, sized=trace.expert_bytes is not None)


def _source(trace: Trace, wishes: dict[str, Any]) -> dict[str, Any]:
    """The source of the trace, and the part selected of it."""
    told: dict[str, Any] = {"by": f"moetrace {__version__}", "rows_before": trace.rows}
    for name, wish in wishes.items():
        if isinstance(wish, list | tuple):
            told[name] = [list(part) for part in wish] if len(wish) <= _TOLD_RANGES else len(wish)
        elif wish is not None and wish is not False:
            told[name] = wish
    if (sha256 := trace.content_sha256) is not None:
        told["content_sha256"] = sha256
    before = trace.source.get("selected")
    source = trace.source | {"selected": [*(before if isinstance(before, list) else []), told]}
    return source if len(json.dumps(source, ensure_ascii=False).encode()) <= _TOLD_BYTES else {"selected": [told]}
