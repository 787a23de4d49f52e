"""From what engines recorded to one trace file: name the model, cut rows into steps, check every id, write."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrace import __version__
from moetrace.spec import list_presets, load_model
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.engines import read_capture
from moetrace.trace.engines.capture import Capture
from moetrace.trace.schema import DECODE, PREFILL, as_dtype, check_ids, check_layers, row_dtype
from moetrace.trace.writer import Writer


def import_traces(
    sources: Sequence[Path],
    path: Path,
    *,
    format: str | None = None,
    model: str | None = None,
    decode_after: int | None = None,
    compress: str | None = None,
) -> None:
    """Write one trace file from the captures at `sources`, one after the other; requests are numbered anew.

    Consecutive prefill rows of a request become one step, each decode row a step of its own. With `decode_after` P,
    whatever the capture says, the first P rows of each request are its prompt and the rest is decode.
    `model` names the model (a preset or a TOML file); else the source's own name decides.
    Raises MoetraceError if a source is not what it claims or the sources don't fit together; then nothing is written.
    """
    if decode_after is not None and decode_after < 0:
        raise UsageError(f"the prompt has {decode_after} rows, but must have 0 or more.")
    captures = [_checked(source, read_capture(source, format)) for source in sources]
    for source, capture in zip(sources[1:], captures[1:], strict=True):
        _check_alike(sources[0], captures[0], source, capture)
    first = captures[0]
    rows = [_rows(capture, decode_after) for capture in captures]
    steps = [_steps(request, phase) for request, _, phase in rows]
    facts = [_facts(source, capture) for source, capture in zip(sources, captures, strict=True)]
    with Writer(
        path,
        model=fitting_model(str(sources[0]), first.model, first.layer_index.size, first.num_experts, model),
        num_experts=first.num_experts,
        top_k=first.top_k,
        layers=first.layer_index.size,
        rows=sum(request.size for request, _, _ in rows),
        steps=sum(step_rows.size for step_rows, _ in steps),
        source=_source(facts, decode_after),
        layer_index=first.layer_index,
        expert_bytes=first.expert_bytes,
        optional=first.optional,
        compress=compress,
    ) as writer:
        requests = 0
        for source, capture, row_arrays, step_arrays in zip(sources, captures, rows, steps, strict=True):
            _append(writer, source, capture, (row_arrays[0] + np.int32(requests), *row_arrays[1:]), step_arrays)
            requests += int(row_arrays[0].max()) + 1


def _checked(source: Path, capture: Capture) -> Capture:
    """The capture in the dtypes of a trace; an error here names the source, one of the writer the trace."""
    layer_index = as_dtype(f"{source}: layer_index", capture.layer_index, np.dtype("<u2"))
    expert_bytes = capture.expert_bytes
    if expert_bytes is not None:
        expert_bytes = as_dtype(f"{source}: expert_bytes", expert_bytes, np.dtype("<i8"))
    check_layers(str(source), layer_index, expert_bytes, capture.num_experts)
    position = as_dtype(f"{source}: position", capture.position, np.dtype("<i4"))
    if position.min() < 0:
        raise MoetraceError(f"{source}: position of row {int(np.argmin(position))} is negative.")
    return capture._replace(layer_index=layer_index, expert_bytes=expert_bytes, position=position)


def _append(writer: Writer, source: Path, capture: Capture, rows: tuple, steps: tuple) -> None:
    """Append a capture in parts that end where a step ends."""
    request, position, _ = rows
    step_rows, step_phase = steps
    ends = np.cumsum(step_rows)
    done = step = 0  # rows and steps written
    held: list[dict[str, np.ndarray]] = []
    read = 0
    for part in capture.parts():
        part = {
            name: as_dtype(f"{source}: {name}", array, row_dtype(name, capture.num_experts))
            for name, array in part.items()
        }
        check_ids(str(source), read, part["experts"], capture.num_experts)
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
        writer.append(
            now.pop("experts"),
            request[done:end],
            position[done:end],
            step_rows[step:stop],
            step_phase[step:stop],
            **now,
        )
        done, step = end, stop


def _rows(capture: Capture, decode_after: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Request int32 (0, 1, ... in order of appearance), position int32 and phase uint8 of each row."""
    _, first, inverse = np.unique(capture.request, return_index=True, return_inverse=True)
    request = np.argsort(np.argsort(first))[inverse].astype(np.int32)
    if decode_after is None:
        return request, capture.position, capture.phase
    order = np.argsort(request, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(request[order])) + 1]
    number = np.empty(request.size, np.int64)  # of each row within its request
    number[order] = np.arange(request.size) - np.repeat(starts, np.diff(np.r_[starts, request.size]))
    return request, capture.position, np.where(number < decode_after, PREFILL, DECODE).astype(np.uint8)


def _steps(request: np.ndarray, phase: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and phase of each step: runs of prefill rows of one request, and single decode rows."""
    begins = np.r_[True, (phase[1:] == DECODE) | (phase[:-1] == DECODE) | (request[1:] != request[:-1])]
    starts = np.flatnonzero(begins)
    return np.diff(np.r_[starts, request.size]), phase[starts]


def _check_alike(source: Path, first: Capture, other_source: Path, other: Capture) -> None:
    for what in ("num_experts", "top_k", "layer_index", "expert_bytes", "optional"):
        if not np.array_equal(getattr(first, what), getattr(other, what)):
            raise MoetraceError(f"{other_source} and {source} differ in {what}, so they can't share a trace.")


def fitting_model(where: str, said: str, layers: int, num_experts: int, model: str | None) -> str:
    """The preset that is meant: the one given as `model`, or the longest whose name is part of `said` and that fits.

    Fits `layers` of `num_experts`, that is. If none does, it is what the source `said`. Raises UsageError, beginning
    with `where`, if `model` does not fit.
    """
    shape = (layers, num_experts)
    if model is not None:
        spec = load_model(model)
        if (spec.moe_layers, spec.experts) != shape:
            raise UsageError(
                f"{where} has {shape[0]} layers of {shape[1]} experts, but model {spec.name} has {spec.moe_layers} of "
                f"{spec.experts}."
            )
        return spec.name
    plain = _plain(said)
    for name in sorted(list_presets("models"), key=len, reverse=True):
        if _plain(name) in plain:
            spec = load_model(name)
            if (spec.moe_layers, spec.experts) == shape:
                return name
    return said[:200]


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.lower())


def _facts(source: Path, capture: Capture) -> dict[str, Any]:
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return capture.facts | {"recorded_model": capture.model[:300], "sha256": digest}


def _source(facts: list[dict[str, Any]], decode_after: int | None) -> dict[str, Any]:
    """What all sources share, then what differs, one by one."""
    shared = {key: value for key, value in facts[0].items() if all(other.get(key) == value for other in facts)}
    source: dict[str, Any] = {"importer": f"moetrace {__version__}"} | shared
    if len(facts) > 1:
        source["files"] = [{key: value for key, value in own.items() if key not in shared} for own in facts]
    if decode_after is not None:
        source["decode_after"] = decode_after
    return source
