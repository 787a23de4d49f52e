"""JSON lines of MoE-PolicyLang: a header, then a record for each token and MoE layer.

As `notebooks/01_trace_recording.ipynb` (emailpokora/MoE-Sched, commit 4b56cc4d) writes them and
`evaluation/workloads/README.md` (commit 1a02b37a) describes them: `model_name`, `num_layers`, `num_experts`, `top_k`
and `num_entries` in the header; `t`, `l` (layer), `e` (experts) and perhaps `s` (scores) in a record. `t` is the row
within a forward pass, whose layers follow one another; the description shows a token a pass. A pass ends where the
layer goes back, or where `t` does in one layer. Requests are not recorded: a pass of several rows after one of a single
row begins one.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from moetrace.importers.captured import Capture, Hints
from moetrace.importers.reading.passes import Lines, PassBlock, Passes, check_gates, half, whole_passes
from moetrace.importers.reading.text import json_lines
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import MAX_EXPERTS, MAX_LAYERS

_HEADER = (b'"num_experts"', b'"num_layers"', b'"top_k"', b'"num_entries"')
_Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_EXPERTS)]


class _PolicyHeader(msgspec.Struct):
    num_experts: _Size
    top_k: _Size
    num_layers: int | None = None  # all hidden layers of the model
    num_entries: int | None = None  # records
    model_name: str = ""


class _PolicyRecord(msgspec.Struct, gc=False):
    """A record; the header has none of its fields."""

    t: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0
    l: Annotated[int, msgspec.Meta(ge=0, lt=MAX_LAYERS)] = -1  # noqa: E741 - the name in the file
    e: list[int] = []
    s: list[float | None] | None = None


class _PolicyPlace(msgspec.Struct, gc=False):
    l: Annotated[int, msgspec.Meta(ge=0, lt=MAX_LAYERS)] = -1  # noqa: E741 - the name in the file


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes has such a header, and records."""
    header, _, rest = first.partition(b"\n")
    record = rest.split(b"\n", 1)[0].replace(b" ", b"")
    return (
        header.lstrip().startswith(b"{")
        and all(key in header for key in _HEADER)
        and all(key in record for key in (b'"t":', b'"l":', b'"e":['))
    )


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture a file."""
    return [_read(path, hints) for path in sources]


def _read(path: Path, hints: Hints) -> Capture:
    header, scored = _first(path)
    layers, count = _layers(path, hints)
    odd = _odd(header, layers, count)
    if odd and hints.strict:
        raise MoetraceError(f"{path}: {odd}.")
    passes = Passes(path, hints, (header.num_experts, header.top_k), layers, ("gates",) * scored)
    records = json_lines(path, _PolicyRecord, half(hints))
    for line, lines, starts in whole_passes(path, _lines(path, records, header.top_k, scored), _begins):
        sizes = np.diff(np.r_[starts, lines["token"].size])
        low, high = (f.reduceat(lines["token"], starts) for f in (np.minimum, np.maximum))
        step_rows = (high - low + 1).astype(np.int64)
        row = lines["token"] - np.repeat(low - (np.cumsum(step_rows) - step_rows), sizes)
        gates = lines.get("gates")
        passes.add(PassBlock(lambda i, at=line: at + i, step_rows, row, lines["layer"], lines["experts"], gates=gates))
    facts: dict[str, Any] = {
        "format": "moe-policylang",
        "engine": "Transformers",
        "phases": "not recorded: a pass of one row is decode, others are prefill",
    }
    if odd:
        facts["header"] = odd
        hints.note(f"{path}: {odd}; the file may be cut, or joined of several.")
    return passes.capture(facts, header.model_name[:200])


def _first(path: Path) -> tuple[_PolicyHeader, bool]:
    """The header, and whether records have scores."""
    with path.open("rb") as file:
        start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    line, _, rest = start.partition(b"\n")
    try:
        header = msgspec.json.decode(line, type=_PolicyHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MoetraceError(f"{path}: its first line is no header: {str(error).rstrip('.')[:200]}.") from None
    return header, b'"s"' in rest.split(b"\n", 1)[0]


def _odd(header: _PolicyHeader, layers: np.ndarray, count: int) -> str:
    """The fields in which the header differs from the records, as the beginning of a sentence; "" if nothing."""
    if header.num_entries not in (None, count):
        return f"the header says {header.num_entries:,} records, but there are {count:,}"
    if header.num_layers is not None and layers[-1] >= header.num_layers:
        return f"the header says {header.num_layers} layers, but there is a layer {layers[-1]}"
    return ""


def _layers(path: Path, hints: Hints) -> tuple[np.ndarray, int]:
    """The layers uint16 [layers] that records name, and how many records there are."""
    seen: set[int] = set()
    count = -1  # without the header
    for _, records in json_lines(path, _PolicyPlace, half(hints)):
        seen.update(record.l for record in records)
        count += len(records)
    seen.discard(-1)  # of the header
    if not seen:
        raise MoetraceError(f"{path} has no records.")
    return np.array(sorted(seen), np.uint16), count


def _lines(
    path: Path, found: Iterator[tuple[int, list[_PolicyRecord]]], top_k: int, scored: bool
) -> Iterator[tuple[int, Lines]]:
    """Records as arrays; they, not lines, are counted, since lines may be blank."""
    count = 0
    for _, records in found:
        if count == 0 and records:
            del records[0]  # the header
        for at, record in enumerate(records, count + 1):
            if len(record.e) != top_k or record.l < 0 or (scored and len(record.s or ()) != top_k):
                scores = " and scores" if scored else ""
                raise MoetraceError(f"{path}: record {at} holds not {top_k} experts{scores} of a layer.")
        if not records:
            continue
        try:
            ids = np.array(list(chain.from_iterable(record.e for record in records)), np.int32)
        except OverflowError:
            raise MoetraceError(f"{path}: one of the records from {count + 1} on holds an impossible id.") from None
        lines = {
            "layer": np.array([record.l for record in records], np.int32),
            "token": np.array([record.t for record in records], np.int64),
            "experts": ids.reshape(-1, top_k),
        }
        if scored:
            scores = np.array(list(chain.from_iterable(record.s or () for record in records)), np.float64)
            lines["gates"] = scores.reshape(-1, top_k)
            check_gates(path, lambda i, first=count + 1: first + i, lines["gates"])
        yield count + 1, lines
        count += len(records)
    if not count:
        raise MoetraceError(f"{path} has no records.")


def _begins(lines: Lines) -> np.ndarray:
    layer = np.diff(lines["layer"])
    return (layer < 0) | ((layer == 0) & (np.diff(lines["token"]) <= 0))
