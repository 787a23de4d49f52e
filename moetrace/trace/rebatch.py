"""Rebatch: the requests of captures, recombined into the steps of a server that runs several at once.

A request is its rows in time order, wherever in the capture they are: runs of prompt rows, and output rows. `_plan`
admits at most `batch` requests at a time, in order; one that has no rows left leaves, and the next takes its place at
the next step. Content of a step:

- whole prompts (`chunk` None): while an admitted request is at prompt rows, that run of rows is a step of its own, the
  earliest admitted first. Otherwise the step has one output row of each admitted request.
- chunked prompts: one row of each admitted request that is at output rows, then up to `chunk` prompt rows of those that
  are not, the earliest admitted first. With rows of both kinds the step is mixed.

Rows of a step are in order of admission, output rows before prompt rows.

`verify` makes steps of speculative decoding: wherever a step has an output row of a request it has up to `verify`
successive ones, a *window* (`trace.speculation`). Rows are laid out again for that, also those that the next window
reuses, before `_plan` sees them.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import schema
from moetrace.trace.atomic import keep_inputs
from moetrace.trace.format import Trace
from moetrace.trace.schema import DECODE, MIXED, PREFILL
from moetrace.trace.speculation import is_rejected, kept_thousandths, rows_of_windows
from moetrace.trace.writer import CHUNK_ROWS, Writer
from moetrace.version import __version__

ORDERS = ("arrival", "shuffle")
# Ids gathered at a time. The rows of a block may lie anywhere in a capture, and of a compressed one whole chunks are
# read for them, so larger blocks read less.
GATHER_BYTES = 32 << 20
GATHER_ROWS = 1 << 17
MAX_ROWS = 1 << 27  # of all captures: 40 bytes of memory each
_KEPT = ("gates", "token")  # optional arrays of a trace that are copied; row_phase is computed for the new steps
_TOLD_BYTES = schema.ATTRIBUTE_BYTES - 4096  # what `source` says of the inputs, if it fits

TraceLike = Trace | str | os.PathLike[str]


class _Rows(NamedTuple):
    """All rows of all captures, sorted by request, then by time: 13 bytes a row."""

    source: np.ndarray  # int64 [rows]: number of the row, captures counted through
    phase: np.ndarray  # uint8 [rows]
    request: np.ndarray  # int32 [rows]: new number, in order of admission
    run_end: np.ndarray  # int64 [runs]: where runs of one phase of one request end, increasing
    request_end: np.ndarray  # int64 [requests]


class _Kind(NamedTuple):
    """Properties that traces must have in common."""

    num_experts: int
    top_k: int
    layer_index: np.ndarray
    expert_bytes: np.ndarray | None
    layer_experts: np.ndarray | None
    optional: tuple[str, ...]


class _Steps(NamedTuple):
    """`steps` alike: of each admitted request the next row in `_Rows`, the rows each step takes, if these are prompt.

    int64 [admitted], int64 [admitted], bool [admitted], in order of admission.
    """

    steps: int
    row: np.ndarray
    take: np.ndarray
    prompt: np.ndarray

    @property
    def phase(self) -> int:
        """Phase of each step."""
        taken = self.prompt[self.take > 0]
        return PREFILL if taken.all() else MIXED if taken.any() else DECODE


def rebatch(
    traces: TraceLike | Sequence[TraceLike],
    path: str | os.PathLike[str],
    *,
    batch: int,
    chunk: int | None = None,
    verify: int | None = None,
    accept: float | None = None,
    order: str = "arrival",
    seed: int = 0,
    compress: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the requests of one or more traces as the steps of a server that runs up to `batch` of them at a time.

    docs/rebatch.md says what a step holds. Requests are numbered in the order of admission. Experts, gates, tokens,
    phases and positions stay with their row. Recorded residency belongs to the old order and is left out. Memory is
    about 40 bytes a row; for ids it is constant.

    Args:
        traces: A trace or the path of its file, or a sequence of these.
        path: The new trace file. It is whole, or nothing is written.
        batch: The most requests that run at a time.
        chunk: The most prompt rows of a step, which also has the output rows of the other requests. By default a prompt
            is a step of its own.
        verify: Output rows of a request that a step verifies together, as in speculative decoding: a token and
            `verify` - 1 drafts. Drafts that the traces themselves rejected are left out first. By default one row a
            step, and every row stays.
        accept: Tokens that such a step keeps in the mean, from 1 to `verify`, to the nearest thousandth. The rows of
            the others come again in the next step. By default all.
        order: "arrival" admits requests as they first appear in the traces, one trace after the other; "shuffle" draws
            the order from `seed`.
        seed: Seed of "shuffle", from 0.
        compress: "zstd" or "gzip". By default data is contiguous, so that it can be memory-mapped.
        progress: A function that gets the number of rows written since its last call.

    Raises:
        UsageError: A parameter makes no sense, there is no trace, or `path` is one of the traces.
        MoetraceError: Traces differ in shape or in what they hold, have only counts, hold an impossible id, or differ
            from their sha256s; they have more than 2^27 rows, or a step would be too large; or the file cannot be
            written.

    Examples:
        >>> import moetrace as mt
        >>> mt.rebatch("traces/tiny-olmoe.h5", "batched.h5", batch=16)
        >>> with mt.Trace.open("batched.h5") as trace:
        ...     print(trace.rows, trace.steps)
        16414 597
    """
    _check(batch, chunk, verify, order, seed)
    kept = kept_thousandths(verify, accept)
    given = [traces] if isinstance(traces, Trace | str | os.PathLike) else traces
    with contextlib.ExitStack() as stack:
        opened = [t if isinstance(t, Trace) else stack.enter_context(Trace.open(t)) for t in given]
        if not opened:
            raise UsageError("there is no trace to rebatch.")
        keep_inputs(Path(path), (trace.path for trace in opened))
        parameters = {"batch": batch, "chunk": chunk, "order": order} | ({"seed": seed} if order == "shuffle" else {})
        parameters |= {} if verify is None else {"verify": verify, "accept": kept / 1000}
        first, kinds = opened[0], [_kind(trace) for trace in opened]
        for trace, kind in zip(opened[1:], kinds[1:], strict=True):
            schema.check_alike(first.shown, kinds[0], trace.shown, kind, _Kind._fields)
        if (total := sum(trace.rows for trace in opened)) > MAX_ROWS:
            raise MoetraceError(f"the traces have {total:,} rows, but at most {MAX_ROWS:,} can be put in order.")
        for trace in opened:
            trace.verify_hashes()
        rows, hashes, rejected = _read_rows(opened, order, seed, verify is not None)
        parameters |= {"rejected_rows_left_out": rejected} if rejected else {}
        if verify is not None:
            rows = _with_windows(rows, verify, kept)
        steps, mixed = 0, False
        for plan in _plan(rows, batch, chunk, verify or 1):
            steps += plan.steps
            mixed |= plan.phase == MIXED
            _check_step(first, int(plan.take.sum()))
        with Writer(
            path,
            model=first.model,
            num_experts=first.num_experts,
            top_k=first.top_k,
            layers=first.layers,
            rows=rows.source.size,
            steps=steps,
            source=_source(opened, hashes, parameters),
            layer_index=first.layer_index,
            expert_bytes=first.expert_bytes,
            layer_experts=first.layer_experts,
            optional=(*kinds[0].optional, *(("row_phase",) if mixed else ())),
            compress=compress,
        ) as writer:
            for part, step_rows, phase in _parts(_plan(rows, batch, chunk, verify or 1), _block_rows(first)):
                optional = _gather(opened, rows.source[part], ("position", "experts", *kinds[0].optional))
                if mixed:
                    optional["row_phase"] = rows.phase[part]
                writer.append(request=rows.request[part], steps=step_rows, phase=phase, **optional)
                if progress:
                    progress(part.size)


def _check(batch: int, chunk: int | None, verify: int | None, order: str, seed: int) -> None:
    for name, value, least in (("batch", batch, 1), ("chunk", chunk, 1), ("verify", verify, 1), ("seed", seed, 0)):
        if value is not None and not least <= value < 2**63:
            raise UsageError(f"{name} is {value}: give a whole number from {least} to {2**63 - 1}.")
    if order not in ORDERS:
        raise UsageError(f"order is {order!r}, but must be {' or '.join(ORDERS)}.")


def _kind(trace: Trace) -> _Kind:
    optional = tuple(name for name in _KEPT if name in trace.has)
    layers = trace.layer_index, trace.expert_bytes, trace.layer_experts
    return _Kind(trace.num_experts, trace.top_k, *layers, optional)


def _block_rows(trace: Trace) -> int:
    row_bytes = trace.layers * trace.top_k * schema.expert_dtype(trace.num_experts).itemsize
    return min(max(1, GATHER_BYTES // row_bytes), GATHER_ROWS)


def _check_step(trace: Trace, rows: int) -> None:
    """Raise if a new step of the rows would be too large to be replayed, or to be put together."""
    row_bytes = schema.ROW_BYTES + trace.layers * trace.top_k * schema.expert_dtype(trace.num_experts).itemsize
    if rows * row_bytes > schema.STEP_BYTES:
        raise MoetraceError(
            f"a step would have {rows:,} rows, which take more than the {schema.STEP_BYTES >> 20} MiB of a step: cut "
            f"prompts with --chunk."
        )


def _read_rows(traces: Sequence[Trace], order: str, seed: int, without_rejected: bool) -> tuple[_Rows, list[str], int]:
    """Sort all rows by request, and check every id; also return the sha256 of each trace's ids.

    And the number of rows of rejected drafts that were left out.
    """
    requests: list[np.ndarray] = []
    phases: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    hashes, known = [], 0
    for trace in traces:
        digest, parts = hashlib.sha256(), []
        for part in trace.parts():
            schema.check_ids(trace.shown, part.first, part.experts, trace.num_experts)
            digest.update(part.experts.data)
            parts.append(part.request)
            phases.append(part.phase)
            positions.append(part.position if without_rejected else part.position[:0])
        hashes.append(digest.hexdigest())
        requests.append(_by_appearance(np.concatenate(parts)) + np.int32(known))
        known = int(requests[-1].max()) + 1
    request, phase = np.concatenate(requests), np.concatenate(phases)
    if order == "shuffle":
        # Raw bits, the same in any version of NumPy.
        drawn = np.argsort(np.random.PCG64(seed).random_raw(known), kind="stable")
        place = np.empty(known, np.int32)
        place[drawn] = np.arange(known)
        request = place[request]
    source = np.argsort(request, kind="stable")
    request, phase = request[source], phase[source]
    rejected = 0
    if without_rejected:
        rows_of = np.concatenate([np.diff(trace.offset) for trace in traces])
        step = np.repeat(np.arange(rows_of.size), rows_of)[source]
        stays = ~is_rejected(request, phase, step, np.concatenate(positions)[source])
        rejected = int(np.count_nonzero(~stays))
        source, request, phase = source[stays], request[stays], phase[stays]
    ends = request[1:] != request[:-1]
    run_end = np.r_[np.flatnonzero(ends | (phase[1:] != phase[:-1])) + 1, request.size]
    return _Rows(source, phase, request, run_end, np.r_[np.flatnonzero(ends) + 1, request.size]), hashes, rejected


def _with_windows(rows: _Rows, verify: int, kept: int) -> _Rows:
    """Rows as verified steps take them: those of rejected drafts come again."""
    row, run_end = rows_of_windows(rows.run_end, rows.phase, verify, kept, MAX_ROWS)
    request = rows.request[row]
    request_end = np.r_[np.flatnonzero(request[1:] != request[:-1]) + 1, row.size]
    return _Rows(rows.source[row], rows.phase[row], request, run_end, request_end)


def _by_appearance(request: np.ndarray) -> np.ndarray:
    """Number requests int32 [rows] 0, 1, ... as they first appear."""
    _, first, inverse = np.unique(request, return_index=True, return_inverse=True)
    number = np.empty(first.size, np.int32)
    number[np.argsort(first)] = np.arange(first.size)
    return number[inverse]


def _plan(rows: _Rows, batch: int, chunk: int | None, verify: int) -> Iterator[_Steps]:
    """Yield all steps in time order, equal ones together: some 20 µs for each time that a run ends."""
    starts = np.concatenate(([0], rows.request_end[:-1]))
    first_run = np.searchsorted(rows.run_end, starts, side="right")
    # The admitted requests, in order of admission: next row, number of the run that holds it, end.
    row, run, end = (np.empty(0, np.int64) for _ in range(3))
    admitted = 0
    while admitted < starts.size or row.size:
        if admitted < starts.size and row.size < batch:
            new = slice(admitted, admitted + batch - row.size)
            row, run = np.concatenate((row, starts[new])), np.concatenate((run, first_run[new]))
            end = np.concatenate((end, rows.request_end[new]))
            admitted = min(new.stop, starts.size)
        left, prompt = rows.run_end[run] - row, rows.phase[row] == PREFILL
        take = _take(left, prompt, chunk, verify)
        taking = take > 0
        steps = int((left[taking] // take[taking]).min())
        yield _Steps(steps, row, take, prompt)
        row = row + steps * take
        run = run + (row == rows.run_end[run])
        alive = row < end
        if not alive.all():
            row, run, end = row[alive], run[alive], end[alive]


def _take(left: np.ndarray, prompt: np.ndarray, chunk: int | None, verify: int) -> np.ndarray:
    """How many rows the next step takes of each admitted request: int64 like `left`, the rows of its present run."""
    if not prompt.any():
        return np.minimum(left, verify)
    if chunk is None:
        take = np.zeros_like(left)
        first = np.argmax(prompt)
        take[first] = left[first]
        return take
    prompt_left = np.where(prompt, left, 0)
    return np.where(prompt, np.clip(chunk - (np.cumsum(prompt_left) - prompt_left), 0, left), np.minimum(left, verify))


def _parts(plans: Iterator[_Steps], rows: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield whole steps, about `rows` rows at a time: places in `_Rows`, rows of each step, phase of each step."""
    held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    size = 0
    for plan in plans:
        turn = np.argsort(plan.prompt, kind="stable")  # output rows first
        take = plan.take[turn]
        stride = np.repeat(take, take)
        first = np.repeat(plan.row[turn] - np.cumsum(take) + take, take) + np.arange(stride.size)
        at_once = max(1, rows // stride.size)
        for start in range(0, plan.steps, at_once):
            step = np.arange(start, min(start + at_once, plan.steps))[:, None]
            place = (first + step * stride).ravel()
            held.append((place, np.full(step.size, stride.size), np.full(step.size, plan.phase, np.uint8)))
            size += place.size
            if size >= rows:
                yield _joined(held)
                held, size = [], 0
    if held:
        yield _joined(held)


def _joined(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    place, step_rows, phase = (np.concatenate(column) for column in zip(*parts, strict=True))
    return place, step_rows, phase


def _gather(traces: Sequence[Trace], source: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read rows [n] by their number in `source`, in any order: a window of up to CHUNK_ROWS of a trace at a time."""
    order = np.argsort(source, kind="stable")
    base = np.cumsum([0, *(trace.rows for trace in traces)])
    owner = np.searchsorted(base, source[order], side="right") - 1
    row = source[order] - base[owner]
    kind, found = traces[0], {}
    row_bytes = kind.layers * kind.top_k * schema.expert_dtype(kind.num_experts).itemsize
    window = row // min(CHUNK_ROWS, max(1, GATHER_BYTES // row_bytes))
    cuts = np.flatnonzero((owner[1:] != owner[:-1]) | (window[1:] != window[:-1])) + 1
    for name in names:
        shape = schema.row_shape(name, source.size, kind.layers, kind.top_k)
        found[name] = np.empty(shape, schema.row_dtype(name, kind.num_experts))
    for begin, end in itertools.pairwise([0, *cuts.tolist(), source.size]):
        trace, first, stop = traces[owner[begin]], int(row[begin]), int(row[end - 1]) + 1
        for name, array in found.items():
            array[order[begin:end]] = trace.read(name, first, stop)[row[begin:end] - first]
    return found


def _source(traces: Sequence[Trace], hashes: Sequence[str], parameters: dict[str, Any]) -> dict[str, Any]:
    """The operation and its inputs; one hash of all hashes instead of the inputs if they are many."""
    inputs: list[dict[str, Any]] = [
        {"model": trace.model, "experts_sha256": sha256, "source": trace.source}
        for trace, sha256 in zip(traces, hashes, strict=True)
    ]
    source: dict[str, Any] = {"rebatch": f"moetrace {__version__}", "parameters": parameters}
    if len(json.dumps(inputs, ensure_ascii=False).encode()) <= _TOLD_BYTES:
        return source | {"inputs": inputs}
    joined = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return source | {"inputs": len(inputs), "experts_sha256": joined}
