"""From what engines recorded to one trace file: name the model, cut rows into steps, check every id, write."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.importers.captured import Capture, Counts, Hints, Part
from moetrace.importers.formats import read_captures
from moetrace.importers.reading.decoding import LANES, decoding_passes, kept_passes, lanes, phase_after, steps_of
from moetrace.importers.reading.numbering import numbered
from moetrace.importers.reading.placeholders import Placeholders
from moetrace.importers.reading.router_rule import said_router
from moetrace.importers.told_source import TOLD_FILES, facts_of, said_by, source_of
from moetrace.spec import load_model
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.atomic import keep_inputs, real_path
from moetrace.trace.naming import model_name, other_bits
from moetrace.trace.ranges import Range
from moetrace.trace.schema import (
    DECODE,
    MIXED,
    PREFILL,
    as_dtype,
    check_alike,
    check_counts,
    check_ids,
    check_layers,
    row_dtype,
)
from moetrace.trace.writer import CountsWriter, Writer, append_parts

_SAY_STEPS = ": of passes that hold rows of several requests, say which decode, with --steps A:B instead of --prompt"
_ONE_ID = 0.9  # of the ids that stand in cells twice, if one of them stands for no expert
# Captures must have these in common to share a trace.
_ALIKE = ("num_experts", "top_k", "layer_index", "expert_bytes", "layer_experts", "optional")

Progress = Callable[[int], object]
PathLike = str | os.PathLike[str]


class _TraceRows(NamedTuple):
    """The rows and steps of a capture, as a trace has them."""

    request: np.ndarray  # int32 [rows]: 0, 1, ... in order of appearance
    position: np.ndarray  # int32 [rows]
    phase: np.ndarray  # uint8 [rows]
    step_rows: np.ndarray  # int64 [steps]
    step_phase: np.ndarray  # uint8 [steps]
    lanes: bool = False  # whether requests are made of the rows of passes


def import_traces(
    sources: PathLike | Sequence[PathLike],
    path: PathLike,
    *,
    format: str | None = None,
    model: str | None = None,
    hints: Hints | None = None,
    decode_after: int | None = None,
    decode_steps: Sequence[Range] | None = None,
    uncounted: Sequence[tuple[int, int]] = (),
    compress: str | None = None,
    writing: Progress | None = None,
) -> list[Path]:
    """Write one trace file from what engines recorded, one source after the other.

    docs/importing.md describes the formats. Requests get new numbers, in order of appearance. Where a source does not
    say its steps, consecutive prefill rows of a request are one step, and each decode row is a step of its own.

    Args:
        sources: Files, or folders whose files are of one format; one or several.
        path: The new trace file. It is whole, or nothing is written.
        format: Name of the format. By default each source is recognized.
        model: A preset's name or a TOML file: the model's name, and sizes that a source does not say. By default the
            source's own name decides.
        hints: Sizes that a source does not say.
        decode_after: How many rows of each request are its prompt; the rest is decode, even if the source says
            otherwise. By default the source decides. Passes that the source records stay steps, except for a text that
            was fed in at once.
        decode_steps: Ranges (start, stop) of the passes that the sources record which decode, a stop of None for all
            the rest; the others are prefill. By default `decode_after` or the source decides.
        uncounted: Ranges [start, stop) of rows of the trace that `decode_after` does not count; they are prefill.
        compress: "zstd" or "gzip". By default data is contiguous, so that it can be memory-mapped.
        writing: A function that gets the number of rows (of counts, steps) written since its last call.

    Returns:
        The files that were read.

    Raises:
        UsageError: The user's options contradict the sources, is missing, or is a prompt of counts.
        MoetraceError: A source is not what it claims, or the sources do not fit together.

    Examples:
        >>> import moetrace as mt
        >>> import numpy as np
        >>> np.save("request-0.npy", np.array([[[3, 1]], [[1, 2]], [[0, 1]]], np.uint8))  # tokens, layers, top_k
        >>> files = mt.import_traces("request-0.npy", "out.h5", hints=mt.Hints(num_experts=4), decode_after=2)
        >>> with mt.Trace.open("out.h5") as trace:
        ...     print(trace.rows, trace.steps, trace.source["format"])
        3 2 vllm
    """
    if decode_after is not None and decode_after < 0:
        raise UsageError(f"the prompt has {decode_after} rows, but must have 0 or more.")
    if decode_after is not None and decode_steps is not None:
        raise UsageError("which rows decode is said by the prompt's rows or by the steps, not by both.")
    given, path = [sources] if isinstance(sources, str | os.PathLike) else sources, Path(path)
    hints = hints_of(hints or Hints(), model, path)
    captures = read_captures(list(map(Path, given)), format, hints)
    options = {"model": model, "decode_after": decode_after, "decode_steps": decode_steps, "uncounted": uncounted}
    write_captures(captures, path, hints, **options, compress=compress, writing=writing)
    return [file for capture in captures for file in capture.sources]


def write_captures(
    captures: Sequence[Capture | Counts],
    path: Path,
    hints: Hints,
    *,
    model: str | None = None,
    decode_after: int | None = None,
    decode_steps: Sequence[Range] | None = None,
    uncounted: Sequence[tuple[int, int]] = (),
    compress: str | None = None,
    writing: Progress | None = None,
) -> None:
    """Write one trace file of captures that were read with `hints`; arguments and errors as of `import_traces`."""
    captures = [numbered(_checked(capture, hints), hints, model is not None) for capture in captures]
    bias = said_router(hints.router).bias if hints.router else None
    keep_inputs(path, [*(file for capture in captures for file in capture.sources), bias])
    first = captures[0]
    for other in captures[1:]:
        _check_alike(first, other)
    layers = first.layer_index.size
    sized = isinstance(first, Capture) and first.expert_bytes is not None
    part = hints.only_layers is not None or hints.first_layer is not None
    if decode_steps is not None:
        captures = _decoding(captures, decode_steps)
    tables = _tables([c for c in captures if isinstance(c, Capture)], decode_after, decode_steps, uncounted)
    source = source_of([facts_of(capture) for capture in captures], decode_after) | said_by(hints)
    if decode_steps is not None:
        source["decode_steps"] = [list(part) for part in decode_steps[:TOLD_FILES]]
    if any(rows.lanes for rows in tables):
        source["requests"] = LANES
    if decode_after is not None and tables and not any((rows.phase == DECODE).any() for rows in tables):
        passes = "" if all(c.step_rows is None for c in captures if isinstance(c, Capture)) else _SAY_STEPS
        hints.note(f"{_where(first)}: no request has more than {decode_after} rows, so none decodes{passes}.")
    if model is None and not sized and (why := other_bits(first.model, layers, first.num_experts)):
        hints.note(f"{_where(first)}: {why}")
    facts = {
        "model": model_name(_where(first), first.model, layers, first.num_experts, model, sized=sized, part=part),
        "num_experts": first.num_experts,
        "top_k": first.top_k,
        "layers": layers,
        "source": source,
        "layer_index": first.layer_index,
        "layer_experts": first.layer_experts,
        "compress": compress,
    }
    counts = [capture for capture in captures if isinstance(capture, Counts)]
    if counts and decode_after is not None:
        raise UsageError(f"{_where(counts[0])} holds only counts, which have no prompt: drop --as decode --prompt.")
    if counts:
        _write_counts(path, counts, facts, writing)
    else:
        rows = [c for c in captures if isinstance(c, Capture)]
        _write_rows(path, rows, tables, facts, writing)


def hints_of(hints: Hints, model: str | None, path: Path) -> Hints:
    """The sizes of `model`, unless the user gives them; temporary files lie beside the trace."""
    if model is not None:
        hints = hints.of_model(load_model(model))
    folder = real_path(path).parent
    return hints._replace(scratch=folder if folder.is_dir() else None)


def _where(capture: Capture | Counts) -> str:
    return str(capture.sources[0])


def _checked(capture: Capture | Counts, hints: Hints) -> Capture | Counts:
    """The capture in the dtypes of a trace; an error here names the source, one of the writer the trace.

    Raises UsageError if it has other sizes than the user says; a model's top_k may be more than was captured.
    """
    where = _where(capture)
    for name, what, option in (("num_experts", "layer", "--experts"), ("top_k", "token", "--top-k")):
        said, found = getattr(hints, name), getattr(capture, name)
        if said not in (None, found) and name not in hints.from_model:
            raise UsageError(f"{where} has {found} experts a {what}, but {option} says {said}.")
    layer_index = as_dtype(f"{where}: layer_index", capture.layer_index, np.dtype("<u2"))
    absent = hints.absent_from is not None or hints.absent_ids
    if isinstance(capture, Counts):
        if absent:
            raise UsageError(f"{where} holds only counts, without ids that could be absent: drop --absent.")
        check_layers(where, layer_index, None, capture.num_experts)
        return capture._replace(layer_index=layer_index)
    expert_bytes = capture.expert_bytes
    if expert_bytes is not None:
        expert_bytes = as_dtype(f"{where}: expert_bytes", expert_bytes, np.dtype("<i8"))
    check_layers(where, layer_index, expert_bytes, capture.num_experts)
    position = as_dtype(f"{where}: position", capture.position, np.dtype("<i4"))
    if position.min(initial=0) < 0:
        raise MoetraceError(f"{where}: position of row {int(np.argmin(position))} is negative.")
    parts = capture.parts
    if absent:  # ids beyond the experts are absent already
        marks = Placeholders(capture.num_experts, hints, marks=True)

        def parts() -> Iterator[Part]:
            for part in capture.parts():
                yield {**part, "experts": marks.narrow(part["experts"])}
            marks.told(where)

    return capture._replace(layer_index=layer_index, expert_bytes=expert_bytes, position=position, parts=parts)


def _check_alike(first: Capture | Counts, other: Capture | Counts) -> None:
    if type(first) is not type(other):
        raise MoetraceError(f"of {_where(first)} and {_where(other)}, one holds only counts: import them separately.")
    names = [name for name in _ALIKE if name in first._fields]
    check_alike(_where(first), first, _where(other), other, names)


def _write_counts(path: Path, captures: list[Counts], facts: dict[str, Any], writing: Progress | None) -> None:
    rows = sum(int(capture.rows.sum()) for capture in captures)
    steps = sum(capture.rows.size for capture in captures)
    with CountsWriter(path, rows=rows, steps=steps, **facts) as writer:
        for capture in captures:
            step = 0
            for counts in capture.parts():
                part = slice(step, step + len(counts))
                check_counts(_where(capture), step, counts, capture.rows[part])
                writer.append_counts(counts, capture.rows[part], capture.phase[part])
                step = part.stop
                if writing:
                    writing(len(counts))


def _write_rows(
    path: Path, captures: list[Capture], tables: list[_TraceRows], facts: dict[str, Any], writing: Progress | None
) -> None:
    first = captures[0]
    mixed = any((rows.step_phase == MIXED).any() for rows in tables)
    with Writer(
        path,
        rows=sum(rows.request.size for rows in tables),
        steps=sum(rows.step_rows.size for rows in tables),
        expert_bytes=first.expert_bytes,
        optional=(*first.optional, *(("row_phase",) if mixed else ())),
        **facts,
    ) as writer:
        requests = 0
        for capture, rows in zip(captures, tables, strict=True):
            shifted = rows._replace(request=rows.request + np.int32(requests))
            _append(writer, capture, shifted, mixed, writing or (lambda _: None))
            requests += int(rows.request.max()) + 1


def _append(writer: Writer, capture: Capture, rows: _TraceRows, mixed: bool, writing: Progress) -> None:
    """Append a capture in parts that end where a step ends."""
    where = _where(capture)
    ends = np.cumsum(rows.step_rows)
    done = step = 0  # rows and steps written
    held: list[dict[str, np.ndarray]] = []
    read = 0
    for part in capture.parts():
        part = {
            name: as_dtype(f"{where}: {name}", array, row_dtype(name, capture.num_experts))
            for name, array in part.items()
        }
        _check_ids(where, read, part["experts"], capture.num_experts, capture.layer_experts)
        read += len(part["experts"])
        held.append(part)
        stop = int(np.searchsorted(ends, read, side="right"))
        if stop == step:
            continue
        end = int(ends[stop - 1])
        rest = read - end
        first, parts = done, []
        *whole, last = held
        for piece in (*whole, {name: array[: len(array) - rest] for name, array in last.items()}):
            beside = {"request": rows.request, "position": rows.position} | ({"row_phase": rows.phase} if mixed else {})
            count = len(piece["experts"])
            parts.append(piece | {name: array[first : first + count] for name, array in beside.items()})
            first += count
        held = [{name: array[len(array) - rest :] for name, array in last.items()}] if rest else []
        append_parts(writer, parts, rows.step_rows[step:stop], rows.step_phase[step:stop])
        writing(end - done)
        done, step = end, stop


def _check_ids(
    where: str, first_row: int, experts: np.ndarray, num_experts: int, layer_experts: np.ndarray | None
) -> None:
    """`check_ids`, with what to do about a placeholder that is an expert's id as well."""
    try:
        check_ids(where, first_row, experts, num_experts, layer_experts)
    except MoetraceError as error:
        found = re.search(r"chooses expert (\d+) more than once\.$", str(error))
        if not found:
            raise
        twice, cells = _twice(experts, num_experts)
        if twice.size and np.bincount(twice).max() < _ONE_ID * twice.size:
            raise MoetraceError(
                f"{str(error)[:-1]}, as {cells:,} of {experts.shape[0] * experts.shape[1]:,} cells read with it do, "
                f"with {np.unique(twice).size:,} different ids, so these are no choices of one layer each: check the "
                f"axes, which must be [rows, layers, top_k], --top-k, and that ids did not wrap at 256."
            ) from None
        raise MoetraceError(
            f"{str(error)[:-1]}: the same choice stands there twice, so look for records that were written twice; "
            f"only if that id stands for no expert there, give --absent {found[1]}, which makes all of them absent."
        ) from None


def _twice(experts: np.ndarray, num_experts: int) -> tuple[np.ndarray, int]:
    """The ids that cells of `experts` [rows, layers, top_k] hold once more, each as often, and how many cells do."""
    ordered = np.sort(experts, axis=-1)
    equal = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < num_experts)
    return ordered[..., 1:][equal], int(np.count_nonzero(equal.any(axis=-1)))


def _decoding(captures: list[Capture | Counts], decode_steps: Sequence[Range]) -> list[Capture | Counts]:
    """The captures with the phases that the user says of their passes, which follow one another."""
    found, first = [], 0
    total = sum(_passes(capture).size for capture in captures)
    for capture in captures:
        sizes = _passes(capture)
        phase = np.where(decoding_passes(total, first, decode_steps)[: sizes.size], DECODE, PREFILL)
        first += sizes.size
        rows = phase if isinstance(capture, Counts) else np.repeat(phase, sizes)
        found.append(capture._replace(phase=rows.astype(np.uint8)))
    return found


def _passes(capture: Capture | Counts) -> np.ndarray:
    """Rows int64 [steps] of the passes that a source records."""
    sizes = capture.rows if isinstance(capture, Counts) else capture.step_rows
    if sizes is None:
        raise UsageError(f"{_where(capture)} does not record its passes: say --prompt P instead of --steps.")
    return sizes


def _tables(
    captures: list[Capture],
    decode_after: int | None,
    decode_steps: Sequence[Range] | None,
    uncounted: Sequence[tuple[int, int]],
) -> list[_TraceRows]:
    if not captures:
        return []
    rows = [capture.request.size for capture in captures]
    counted = np.ones(sum(rows), bool)
    for start, stop in uncounted:
        counted[start:stop] = False
    parts = np.split(counted, np.cumsum(rows)[:-1])
    said = decode_steps is not None
    return [_rows(capture, decode_after, said, part) for capture, part in zip(captures, parts, strict=True)]


def _rows(capture: Capture, decode_after: int | None, passes_said: bool, counted: np.ndarray) -> _TraceRows:
    """Number requests in order of appearance, and cut rows into steps where the source doesn't."""
    request, position, phase, step_rows = capture.request, capture.position, capture.phase, capture.step_rows
    made = None
    if passes_said and step_rows is not None:
        made = lanes(capture, request, phase[np.cumsum(step_rows) - step_rows] == DECODE)
        request, position = made or (request, position)
    _, first, inverse = np.unique(request, return_index=True, return_inverse=True)
    request = np.argsort(np.argsort(first))[inverse].astype(np.int32)
    if decode_after is not None:
        phase = phase_after(request, decode_after, counted)
        step_rows = None if step_rows is None else kept_passes(capture, request, phase)
    if step_rows is None:
        starts = np.flatnonzero(steps_of(request, phase))
        return _TraceRows(request, position, phase, np.diff(np.r_[starts, request.size]), phase[starts])
    starts = np.cumsum(step_rows) - step_rows
    low, high = (f.reduceat(phase, starts) for f in (np.minimum, np.maximum))
    step_phase = np.where(low == high, low, MIXED).astype(np.uint8)
    return _TraceRows(request, position.astype(np.int32), phase, step_rows, step_phase, made is not None)
