"""Recordings of colibri: routing traces (ROUTE_TRACE), and histories of how often each expert was chosen (.coli_usage).

Both are text without a header (`c/route_trace.h`, commit 003a0b9b). A trace has a line `<call> <row> <layer>
<id>:<gate> ...` for each row of each call of a MoE layer, gates with four decimals. One pass through the layers is one
step: prefill if its calls have several rows, else decode (tokens that are drafted and then verified together count as
prefill). Requests are not recorded: a file is one request, whose positions count the rows.

A history has lines `<layer> <expert> <count>`, only counts above 0, after a line `-1 <layers> <experts>` and one `-2
<version> <engine>`, which older ones lack. It becomes one step of counts, whose tokens are deduced from top_k.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from moetrace.importers.captured import Capture, Counts, Hints, rows_of_counts
from moetrace.importers.reading.passes import Lines, PassBlock, Passes, check_gates, half, layers_of, whole_passes
from moetrace.importers.reading.table import numbers, tables
from moetrace.importers.reading.text import chunks
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import MAX_LAYERS, MIXED, check_sizes

_TRACE_LINE = re.compile(rb"\d{1,9} \d{1,9} \d{1,5}( -?\d{1,9}:-?(\d{1,9}\.\d{4}|nan|inf))+")
_USAGE_LINE = re.compile(rb"(\d{1,5}|-[12]) \d{1,9} \d{1,10}")
_LINES_SEEN = 8
ENGINES = ("glm_moe_dsa", "inkling", "olmoe", "kimi_k3", "glm53")
USAGE_VERSION = 1
# A history may name any layer and expert; every existing model needs fewer counters.
MAX_COUNTERS = 1 << 24


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is a trace or a history."""
    lines = first.split(b"\n")
    lines = [line.removesuffix(b"\r") for line in (lines[:-1] or lines)[:_LINES_SEEN]]
    return any(all(map(kind.fullmatch, lines)) for kind in (_TRACE_LINE, _USAGE_LINE))


def read(sources: Sequence[Path], hints: Hints) -> list[Capture | Counts]:
    """A capture a trace, counts a history."""
    return [_read(path, hints) for path in sources]


def _read(path: Path, hints: Hints) -> Capture | Counts:
    with path.open("rb") as file:
        first = file.readline(1 << 16)
    return _trace(path, hints) if b":" in first else _usage(path, hints)


def _trace(path: Path, hints: Hints) -> Capture:
    num_experts = hints.need("num_experts", path)
    widest = max((_colons(data) for _, data in chunks(path, half(hints))), default=0)
    top_k = hints.top_k or widest
    if widest > top_k:
        raise MoetraceError(f"{path} has {widest} experts in a line, but top_k should be {top_k}.")
    if top_k > num_experts:
        raise MoetraceError(f"{path} has {top_k} experts in a line, but the model has {num_experts} experts.")
    pairs = [name for slot in range(widest) for name in (f"e{slot}", f"g{slot}")]
    columns: dict[str, type[pl.DataType] | None] = dict.fromkeys(("call", "row", "layer"), pl.Int32)
    columns |= {name: pl.Int32 if name[0] == "e" else pl.Float32 for name in pairs}
    only = {name: pl.Int32 if name == "layer" else None for name in columns}
    layer_index = layers_of(path, tables(path, only, abs, separator=" ", ragged=True))
    passes = Passes(path, hints, (num_experts, top_k), layer_index, ("gates",), prompts=False)
    found = tables(path, columns, half(hints), separator=" ", ragged=True)
    for block in _blocks(path, ((line, _lines(path, line, table)) for line, table in found), top_k):
        passes.add(block)
    return passes.capture({"format": "colibri", "engine": "colibri", "layout": "ROUTE_TRACE"})


def _colons(data: bytes) -> int:
    """The most colons that a line has."""
    letters = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(letters == ord("\n"))
    colons = np.searchsorted(np.flatnonzero(letters == ord(":")), np.r_[0, ends, letters.size])
    return int(np.diff(colons).max(initial=0))


def _lines(path: Path, line: int, table: pl.DataFrame) -> Lines:
    """The columns of a table whose lines may have fewer pairs than others: absent ids, gates 0."""
    if (bad := table.select(pl.any_horizontal(pl.col("row", "layer", "e0").is_null())).to_series()).any():
        raise MoetraceError(f"{path}: line {line + (bad.arg_max() or 0)} is incomplete.")
    lines = numbers(table.select(pl.all().fill_null(-1)))
    for slot in range(sum(name[0] == "g" for name in lines)):
        halved = table[f"e{slot}"].is_null() != table[f"g{slot}"].is_null()
        if halved.any():
            raise MoetraceError(f"{path}: line {line + (halved.arg_max() or 0)} lacks the gate of an expert.")
        lines[f"g{slot}"] = np.where(lines[f"e{slot}"] < 0, np.float32(0), lines[f"g{slot}"])
    return lines


def _begins(lines: Lines) -> np.ndarray:
    """A pass begins where the layer does not increase from one call to the next, or call numbers restart."""
    call, layer = np.diff(lines["call"]), np.diff(lines["layer"])
    return (call < 0) | ((call != 0) & (layer <= 0))


def _blocks(path: Path, found: Iterator[tuple[int, Lines]], top_k: int) -> Iterator[PassBlock]:
    """The passes of a trace."""
    last = -1
    for line, lines, starts in whole_passes(path, found, _begins):
        call, row, layer = (lines[name] for name in ("call", "row", "layer"))
        same = np.diff(call) == 0
        wrong = np.r_[row[:1] != 0, np.where(same, np.diff(row) != 1, row[1:] != 0)]
        wrong[1:] |= same & (np.diff(layer) != 0)
        if wrong.any():
            at = int(wrong.argmax())
            raise MoetraceError(
                f"{path}: line {line + at}: row {row[at]} of call {call[at]} does not follow the row before it."
            )
        step_rows = np.maximum.reduceat(row, starts).astype(np.int64) + 1
        count = np.diff(np.r_[starts, row.size])
        ids, gates = (
            np.stack([lines[name] for name in lines if name[0] == kind and name[1:].isdigit()], axis=1) for kind in "eg"
        )
        check_gates(path, lambda at, line=line: line + at, gates)
        if (missing := top_k - ids.shape[1]) > 0:
            ids, gates = (np.pad(a, ((0, 0), (0, missing)), constant_values=v) for a, v in ((ids, -1), (gates, 0)))
        anew = np.diff(np.r_[last, call[starts]]) < 0  # the engine was started again
        last = int(call[-1])
        row = row + np.repeat(np.cumsum(step_rows) - step_rows, count)
        yield PassBlock(lambda at, line=line: line + at, step_rows, row, layer, ids, None, anew, gates)


def _usage(path: Path, hints: Hints) -> Counts:
    columns = {"layer": pl.Int32, "expert": pl.Int64, "count": pl.Int64}
    said: dict[int, tuple[int, int]] = {}
    tables_seen: list[pl.DataFrame] = []
    lines = 0
    for line, table in tables(path, columns, hints.reading, separator=" "):
        wrong = table.select(
            (pl.col("layer") >= MAX_LAYERS) | (pl.col("expert") < 0) | (pl.col("count") < 0)
        ).to_series()
        if wrong.any():
            raise MoetraceError(f"{path}: line {line + (wrong.arg_max() or 0)} holds a number that is impossible.")
        for layer, expert, count in table.filter(pl.col("layer") < 0).head(9).rows():
            said[layer] = (expert, count)
        lines += table.height
        data = table.filter(pl.col("layer") >= 0)
        tables_seen.append(data.group_by("layer", "expert").agg(pl.col("count").sum()))
        if sum(part.height for part in tables_seen) > MAX_COUNTERS:
            raise MoetraceError(f"{path} has more than {MAX_COUNTERS} counts.")
    counts = (
        pl.concat(tables_seen or [pl.DataFrame(schema=columns)]).group_by("layer", "expert").agg(pl.col("count").sum())
    )
    if counts["count"].sum() == 0:
        raise MoetraceError(f"{path} counts no choices.")
    if said.get(-2, (USAGE_VERSION, 0))[0] > USAGE_VERSION:
        raise MoetraceError(f"{path} is of version {said[-2][0]}, but only version {USAGE_VERSION} is known.")
    return _usage_counts(path, counts, said, hints)


def _usage_counts(path: Path, counts: pl.DataFrame, said: dict[int, tuple[int, int]], hints: Hints) -> Counts:
    num_experts, top_k = said[-1][1] if -1 in said else hints.need("num_experts", path), hints.need("top_k", path)
    layer_index = np.unique(counts["layer"].to_numpy())
    check_sizes(str(path), num_experts, top_k, layer_index.size, 1, 1)
    expert = counts["expert"].to_numpy()
    if expert.max() >= num_experts:
        raise MoetraceError(f"{path} counts expert {expert.max()}, but the model has {num_experts} experts.")
    array = np.zeros((1, layer_index.size, num_experts), np.int64)
    array[0, np.searchsorted(layer_index, counts["layer"].to_numpy()), expert] = counts["count"].to_numpy()
    facts: dict[str, str | int] = {"format": "colibri", "engine": "colibri", "layout": "usage"}
    if -2 in said:
        facts["written_by"] = {_hash(name): name for name in ENGINES}.get(said[-2][1], said[-2][1])
    return Counts(
        model="",
        num_experts=num_experts,
        top_k=top_k,
        layer_index=layer_index,
        rows=rows_of_counts(array, top_k),
        phase=np.array([MIXED], np.uint8),
        facts=facts,
        parts=lambda: iter([array]),
        sources=(path,),
    )


def _hash(name: str) -> int:
    """FNV-1a of 32 bits, which names the engine that wrote a history."""
    value = 2166136261
    for letter in name.encode():
        value = ((value ^ letter) * 16777619) & 0xFFFFFFFF
    return value
