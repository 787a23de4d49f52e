"""From what engines recorded to one trace file: name the model, cut rows into steps, check every id, write."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.importers.captured import Capture, Counts, Hints, Part
from moetrace.importers.formats import read_captures
from moetrace.importers.reading.placeholders import Placeholders
from moetrace.spec import load_model
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.atomic import keep_inputs, real_path
from moetrace.trace.naming import model_name
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
from moetrace.trace.writer import CountsWriter, Writer
from moetrace.version import __version__

# Of more files than these, `source` tells one hash of all their hashes instead of each.
_TOLD_FILES = 32
# What captures must have in common to share a trace.
_ALIKE = ("num_experts", "top_k", "layer_index", "expert_bytes", "optional")

Progress = Callable[[int], object]
PathLike = str | os.PathLike[str]


class _TraceRows(NamedTuple):
    """The rows and steps of a capture, as a trace has them."""

    request: np.ndarray  # int32 [rows]: 0, 1, ... in order of appearance
    position: np.ndarray  # int32 [rows]
    phase: np.ndarray  # uint8 [rows]
    step_rows: np.ndarray  # int64 [steps]
    step_phase: np.ndarray  # uint8 [steps]


def import_traces(
    sources: PathLike | Sequence[PathLike],
    path: PathLike,
    *,
    format: str | None = None,
    model: str | None = None,
    hints: Hints | None = None,
    decode_after: int | None = None,
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
            otherwise. By default the source decides.
        uncounted: Ranges [start, stop) of rows of the trace that `decode_after` does not count; they are prefill.
        compress: "zstd" or "gzip". By default data is contiguous, so that it can be memory-mapped.
        writing: A function that gets the number of rows (of counts, steps) written since its last call.

    Returns:
        The files that were read.

    Raises:
        UsageError: What the user says contradicts the sources, is missing, or is a prompt of counts.
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
    given, path = [sources] if isinstance(sources, str | os.PathLike) else sources, Path(path)
    hints = hints_of(hints or Hints(), model, path)
    captures = read_captures(list(map(Path, given)), format, hints)
    options = {"model": model, "decode_after": decode_after, "uncounted": uncounted, "compress": compress}
    write_captures(captures, path, hints, **options, writing=writing)
    return [file for capture in captures for file in capture.sources]


def write_captures(
    captures: Sequence[Capture | Counts],
    path: Path,
    hints: Hints,
    *,
    model: str | None = None,
    decode_after: int | None = None,
    uncounted: Sequence[tuple[int, int]] = (),
    compress: str | None = None,
    writing: Progress | None = None,
) -> None:
    """Write one trace file of captures that were read with `hints`; arguments and errors as of `import_traces`."""
    captures = [_checked(capture, hints) for capture in captures]
    keep_inputs(path, [file for capture in captures for file in capture.sources])
    first = captures[0]
    for other in captures[1:]:
        _check_alike(first, other)
    layers = first.layer_index.size
    sized = isinstance(first, Capture) and first.expert_bytes is not None
    facts = {
        "model": model_name(_where(first), first.model, layers, first.num_experts, model, sized=sized),
        "num_experts": first.num_experts,
        "top_k": first.top_k,
        "layers": layers,
        "source": _source([_facts(capture) for capture in captures], decode_after) | _said(hints),
        "layer_index": first.layer_index,
        "compress": compress,
    }
    counts = [capture for capture in captures if isinstance(capture, Counts)]
    if counts and decode_after is not None:
        raise UsageError(f"{_where(counts[0])} holds counts alone, which have no prompt: do without --as decode.")
    if counts:
        _write_counts(path, counts, facts, writing)
    else:
        rows = [c for c in captures if isinstance(c, Capture)]
        _write_rows(path, rows, _tables(rows, decode_after, uncounted), facts, writing)


def hints_of(hints: Hints, model: str | None, path: Path) -> Hints:
    """What `model` says of sizes, unless the user says it himself; temporary files lie beside the trace."""
    if model is not None:
        hints = hints.of_model(load_model(model))
    folder = real_path(path).parent
    return hints._replace(scratch=folder if folder.is_dir() else None)


def _said(hints: Hints) -> dict[str, Any]:
    """What `source` says of the user's wishes that change rows or choices."""
    said: dict[str, Any] = {"cached_rows": "kept"} if hints.keep_cached else {}
    if hints.absent_from is not None:
        said["absent_from"] = hints.absent_from
    return said | ({"absent_ids": list(hints.absent_ids)} if hints.absent_ids else {})


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
            raise UsageError(f"{where} holds counts alone, of which no id can be absent: do without --absent.")
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
            return ({**part, "experts": marks.narrow(part["experts"])} for part in capture.parts())

    return capture._replace(layer_index=layer_index, expert_bytes=expert_bytes, position=position, parts=parts)


def _check_alike(first: Capture | Counts, other: Capture | Counts) -> None:
    if type(first) is not type(other):
        raise MoetraceError(f"of {_where(first)} and {_where(other)}, one holds counts alone: import them apart.")
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
        _check_ids(where, read, part["experts"], capture.num_experts)
        read += len(part["experts"])
        held.append(part)
        stop = int(np.searchsorted(ends, read, side="right"))
        if stop == step:
            continue
        joined = {
            name: np.concatenate([part[name] for part in held]) if len(held) > 1 else held[0][name] for name in part
        }
        end = int(ends[stop - 1])
        now = {name: array[: end - done] for name, array in joined.items()}
        held = [{name: array[end - done :] for name, array in joined.items()}]
        if mixed:
            now["row_phase"] = rows.phase[done:end]
        writer.append(
            now.pop("experts"),
            rows.request[done:end],
            rows.position[done:end],
            rows.step_rows[step:stop],
            rows.step_phase[step:stop],
            **now,
        )
        writing(end - done)
        done, step = end, stop


def _check_ids(where: str, first_row: int, experts: np.ndarray, num_experts: int) -> None:
    """`check_ids`, with what to do about a placeholder that is an expert's id as well."""
    try:
        check_ids(where, first_row, experts, num_experts)
    except MoetraceError as error:
        found = re.search(r"chooses expert (\d+) more than once\.$", str(error))
        if not found:
            raise
        raise MoetraceError(
            f"{str(error)[:-1]}: if that id stands for no expert there, give --absent {found[1]}, which makes all of "
            f"them absent."
        ) from None


def _tables(
    captures: list[Capture], decode_after: int | None, uncounted: Sequence[tuple[int, int]]
) -> list[_TraceRows]:
    rows = [capture.request.size for capture in captures]
    counted = np.ones(sum(rows), bool)
    for start, stop in uncounted:
        counted[start:stop] = False
    parts = np.split(counted, np.cumsum(rows)[:-1])
    return [_rows(capture, decode_after, part) for capture, part in zip(captures, parts, strict=True)]


def _rows(capture: Capture, decode_after: int | None, counted: np.ndarray) -> _TraceRows:
    """Number requests in order of appearance, and cut rows into steps where the source doesn't."""
    _, first, inverse = np.unique(capture.request, return_index=True, return_inverse=True)
    request = np.argsort(np.argsort(first))[inverse].astype(np.int32)
    phase, step_rows = capture.phase, capture.step_rows
    if decode_after is not None:
        phase, step_rows = _phase_after(request, decode_after, counted), None
    if step_rows is None:
        return _TraceRows(request, capture.position, phase, *_steps(request, phase))
    starts = np.cumsum(step_rows) - step_rows
    low, high = (f.reduceat(phase, starts) for f in (np.minimum, np.maximum))
    return _TraceRows(request, capture.position, phase, step_rows, np.where(low == high, low, MIXED).astype(np.uint8))


def _phase_after(request: np.ndarray, decode_after: int, counted: np.ndarray) -> np.ndarray:
    """Phase uint8 [rows] where the first `decode_after` `counted` (bool [rows]) rows of each request are its prompt."""
    order = np.argsort(request, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(request[order])) + 1]
    before = np.cumsum(counted[order]) - counted[order]
    number = np.empty(request.size, np.int64)  # of each row among the counted ones of its request
    number[order] = before - np.repeat(before[starts], np.diff(np.r_[starts, request.size]))
    return np.where(~counted | (number < decode_after), PREFILL, DECODE).astype(np.uint8)


def _steps(request: np.ndarray, phase: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and phase of each step: runs of prefill rows of one request, and single decode rows."""
    begins = np.r_[True, (phase[1:] == DECODE) | (phase[:-1] == DECODE) | (request[1:] != request[:-1])]
    starts = np.flatnonzero(begins)
    return np.diff(np.r_[starts, request.size]), phase[starts]


def _facts(capture: Capture | Counts) -> dict[str, Any]:
    """What `source` says of one capture: its own facts, and hashes of its files."""
    hashes = []
    for source in capture.sources:
        with source.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    named: dict[str, Any] = {"recorded_model": capture.model[:300]} if capture.model else {}
    if len(hashes) == 1:
        named["sha256"] = hashes[0]
    elif len(hashes) <= _TOLD_FILES:
        named["sha256"] = hashes
    else:
        named |= {"merged_files": len(hashes), "sha256": _hash_of(hashes)}
    return capture.facts | named


def _source(facts: list[dict[str, Any]], decode_after: int | None) -> dict[str, Any]:
    """What all captures share, then what differs, one by one if they are few."""
    shared = {key: value for key, value in facts[0].items() if all(other.get(key) == value for other in facts)}
    source: dict[str, Any] = {"importer": f"moetrace {__version__}"} | shared
    if len(facts) > _TOLD_FILES:
        source |= {"captures": len(facts), "sha256": _hash_of([str(own.get("sha256")) for own in facts])}
    elif len(facts) > 1:
        source["files"] = [{key: value for key, value in own.items() if key not in shared} for own in facts]
    if decode_after is not None:
        source["decode_after"] = decode_after
    return source


def _hash_of(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
