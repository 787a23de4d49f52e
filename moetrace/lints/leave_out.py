"""A trace without what `lint` says may go: the rows of an engine's warm-up, layers that did not route."""

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
from moetrace.lints.ids import DuplicateIds
from moetrace.lints.layers import DenseLayers
from moetrace.lints.piece import pieces, shape_of
from moetrace.lints.repeats import RepeatedRows, run_rows
from moetrace.spec import load_model
from moetrace.spec.errors import MoetraceError
from moetrace.trace.atomic import keep_inputs, real_path
from moetrace.trace.format import Trace
from moetrace.trace.naming import model_name
from moetrace.trace.select import copy_without

_TOLD_LAYERS = 256  # of more, `source` tells the number


class LeftOut(NamedTuple):
    """The parts that a copy leaves out: the number of warm-up rows, and the absolute indices of dense layers."""

    rows: int
    layers: list[int]


def leave_out(
    trace: Trace,
    path: Path,
    *,
    warmup: bool = False,
    dense: bool = False,
    model: str | None = None,
    compress: str | None = None,
) -> LeftOut:
    """Copy a trace without the rows of `warm-up` and the layers of `dense-layer`, as lint finds them.

    Steps lose those rows, and go if they lose all. Requests and positions stay as they are. Layers are judged by the
    rows that stay. `source` says under "left_out" what went. Memory does not grow with the trace.

    Args:
        trace: The trace.
        path: The new file.
        warmup: Leave out the warm-up.
        dense: Leave out dense layers.
        model: Names the model of the copy. By default, if layers go, the name that was recorded decides.
        compress: "zstd" or "gzip". By default data is contiguous.

    Returns:
        How many rows and which layers went.

    Raises:
        MoetraceError: The trace differs from its sha256s, nothing would be left, or the rest holds an impossible value.
    """
    where = trace.shown
    keep_inputs(path, [trace.path])
    trace.verify_hashes()
    ranges = _warm_up_rows(trace) if warmup and "counts" not in trace.has else []
    gone = _dense_layers(trace, ranges) if dense else np.zeros(trace.layers, bool)
    rows = sum(stop - start for start, stop in ranges)
    if rows == trace.rows:
        raise MoetraceError(f"{where}: every row is warm-up, so nothing would be left of it.")
    if gone.all():
        raise MoetraceError(f"{where}: no layer routes, so nothing would be left of it.")
    left_out = LeftOut(rows, trace.layer_index[gone].tolist())
    name = trace.model
    if model is not None or gone.any():
        said = str(trace.source.get("recorded_model") or trace.model)
        name = model_name(
            where, said, int(np.count_nonzero(~gone)), trace.num_experts, model, sized=trace.expert_bytes is not None
        )
    source = _source(trace.source, left_out)
    copy_without(trace, path, rows=ranges, layers=gone, model=name, source=source, compress=compress)
    return left_out


def import_and_leave_out(
    sources: Sequence[Path],
    path: Path,
    *,
    warmup: bool = False,
    dense: bool = False,
    model: str | None = None,
    hints: Hints | None = None,
    compress: str | None = None,
    **options: Any,
) -> LeftOut:
    """`import_traces`, then `leave_out`; `model` is that of the copy. Nothing is written unless both go well.

    A prompt (`decode_after`) begins after the warm-up: where there is some, the sources are imported twice.
    """
    hints = hints or Hints()
    if model is not None and dense:  # the source may hold layers that the model's MoE layers don't count
        hints = hints.of_model(load_model(model))
    if not real_path(path).parent.is_dir():
        raise MoetraceError(f"{path} could not be written: there is no such folder; nothing was changed.")
    whole = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        options |= {"model": None if dense else model, "hints": hints}
        keep_inputs(path, import_traces(sources, whole, **options))
        if warmup and options.get("decode_after") is not None and (ranges := _found_warm_up(whole)):
            options["hints"] = hints._replace(reading=_quiet, note=_quiet)  # the first import has printed its notes
            import_traces(sources, whole, uncounted=ranges, **options)
        with Trace.open(whole) as trace:
            return leave_out(trace, path, warmup=warmup, dense=dense, model=model, compress=compress)
    except MoetraceError as error:
        raise type(error)(str(error).replace(str(whole), str(path))) from error
    finally:
        whole.unlink(missing_ok=True)


def _quiet(_: object) -> None:
    pass


def _found_warm_up(path: Path) -> list[tuple[int, int]]:
    with Trace.open(path) as trace:
        return _warm_up_rows(trace)


def _warm_up_rows(trace: Trace) -> list[tuple[int, int]]:
    repeated = RepeatedRows(shape_of(trace))
    for piece in pieces(trace):
        repeated.see(piece)
    repeated.finish()
    return repeated.warm_up()


def _dense_layers(trace: Trace, ranges: list[tuple[int, int]]) -> np.ndarray:
    """bool [layers]: the dense ones, judged by the rows outside `ranges`."""
    if "counts" in trace.has:
        chosen = np.zeros(trace.layers, bool)
        for block in trace.count_blocks():
            chosen |= (block.counts != 0).any((0, 2))
        return ~chosen
    shape = shape_of(trace)
    layers, duplicates = DenseLayers(shape), DuplicateIds(shape)
    for piece in pieces(trace):
        kept = piece.only(~run_rows(piece, ranges))
        if kept.rows:
            layers.see(kept)
            duplicates.see(kept)
    return layers.dense(duplicates.zero_layers())


def _source(source: dict[str, Any], left_out: LeftOut) -> dict[str, Any]:
    before = source.get("left_out")
    said = dict(before) if isinstance(before, dict) else {}
    if left_out.rows:
        earlier = said.get("warm_up_rows")
        said["warm_up_rows"] = left_out.rows + (earlier if isinstance(earlier, int) else 0)
    if left_out.layers:
        earlier = said.get("dense_layers")
        layers = [*(earlier if isinstance(earlier, list) else []), *left_out.layers]
        said["dense_layers"] = layers if len(layers) <= _TOLD_LAYERS else len(layers)
    return source | ({"left_out": said} if said else {})
