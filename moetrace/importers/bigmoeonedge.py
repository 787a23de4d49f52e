"""BigMoeOnEdge route traces, version 1: a CSV line for each routed expert.

Layout as its documents state it (`docs/telemetry.md`, `core/src/metrics/route_trace_sink.cpp`, commit 2d4f2b11 and
later): `# model= arch= n_layer= n_expert= n_expert_used=`, a line `# layer= expert_bytes= dense_bytes=` for each layer,
then columns by name: turn, phase (0 prefill, 1 decode), step (position of the token), layer, slot, expert, weight,
residency (0 miss, 1 hit, 2 hit on a prefetch), expert_bytes, and in later versions `dropped`.

Lines are ordered by layer before token within a prefill. Its last layer routes only the last prompt token: the others
are absent there. A dropped routing (a miss that the engine skipped) is kept, since the router chose it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import polars as pl

from moetrace.importers.captured import MAX_WEIGHT, SPARSEST, Capture, Hints
from moetrace.importers.reading.passes import half
from moetrace.importers.reading.placeholders import Placeholders
from moetrace.importers.reading.spool import Spool
from moetrace.importers.reading.table import CutLines, tables
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import MAX_LAYERS, PREFETCHED, check_sizes

FIRST_LINE = "# route_trace v1"
_MODEL = re.compile(
    r"# model=(?P<model>.*) arch=(?P<arch>\S*) n_layer=\d+ n_expert=(?P<E>\d+) n_expert_used=(?P<k>\d+)"
)
_LAYER = re.compile(r"# layer=(\d+) expert_bytes=(\d+)")
_QUANTIZATION = re.compile(r"(?:^|[-_.])(i?q\d\w*|mxfp4\w*|bf16|f16|f32)(?=[-.]|$)", re.IGNORECASE)
_HEADER_LINES = 4096
_TAKEN = "another line has the same turn, phase, step, layer and slot"
_TWICE = "its token chooses this expert of this layer more than once"
_COLUMNS = {
    "turn": pl.Int32,
    "phase": pl.Int32,
    "step": pl.Int32,
    "layer": pl.Int32,
    "slot": pl.Int32,
    "expert": pl.Int32,
    "weight": pl.Float32,
    "residency": pl.Int32,
}


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is such a trace."""
    return first.startswith(FIRST_LINE.encode())


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture a file."""
    return [_read(path, hints) for path in sources]


class _Header(NamedTuple):
    """The content of the first lines."""

    lines: int
    columns: Mapping[str, type[pl.DataType] | None]  # of the file, in its order; None where nothing is read
    num_experts: int
    top_k: int
    expert_bytes: dict[int, int]  # of each layer that has experts; none if the header does not say
    model: str
    arch: str


class _Tokens(NamedTuple):
    """Findings of the first reading of all lines."""

    keys: np.ndarray  # int64 [tokens], sorted: turn, phase and step of each token, as `_key` packs them
    layer_index: np.ndarray  # [layers]
    lines: int
    dropped: int
    weights: bool  # whether there are any


def _read(path: Path, hints: Hints) -> Capture:
    """Read a route trace twice: which tokens there are, then the choices of each."""
    header = _header(path)
    check_sizes(str(path), header.num_experts, header.top_k, 1, 1, 1)
    cut, placeholders = CutLines(path, hints), Placeholders(header.num_experts, hints)
    tokens = _tokens(path, header, hints, cut)
    shape = (tokens.keys.size, tokens.layer_index.size, header.top_k)
    check_sizes(str(path), header.num_experts, header.top_k, shape[1], shape[0], 1)
    if shape[0] * shape[1] * shape[2] > SPARSEST * tokens.lines + 2**16:
        raise MoetraceError(f"{path}: {tokens.lines} lines are too few for {shape} choices (tokens, layers, slots).")
    optional = ("gates", "recorded") if tokens.weights else ("recorded",)
    spool = Spool(hints, header.num_experts, shape[1], header.top_k, optional)
    spool.grow(shape[0])
    for line, lines in tables(path, header.columns, half(hints), header=header.lines + 1, cut=cut):
        _scatter(path, line, lines, tokens, spool, placeholders)
    facts = {"format": "bigmoeonedge", "engine": "BigMoeOnEdge", "version": "route_trace v1", "arch": header.arch}
    if quantization := _QUANTIZATION.search(header.model):
        facts["quantization"] = quantization[1]
    sizes = [header.expert_bytes[layer] for layer in tokens.layer_index.tolist()] if header.expert_bytes else None
    return Capture(
        model=header.model,
        num_experts=header.num_experts,
        top_k=header.top_k,
        layer_index=tokens.layer_index,
        expert_bytes=None if sizes is None else np.array(sizes),
        request=(tokens.keys >> 32).astype(np.int32),
        position=(tokens.keys & (2**31 - 1)).astype(np.int32),
        phase=((tokens.keys >> 31) & 1).astype(np.uint8),
        optional=optional,
        facts=facts
        | cut.told()
        | placeholders.told(str(path))
        | ({"dropped": tokens.dropped} if tokens.dropped else {}),
        parts=spool.parts,
        sources=(path,),
    )


def _header(path: Path) -> _Header:
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        lines = list(_header_lines(path, file))
        names = lines.pop().split(",")
    said = next((match for line in lines if (match := _MODEL.match(line))), None)
    if said is None:
        raise MoetraceError(f"{path} has no line '# model=... arch=... n_layer=... n_expert=... n_expert_used=...'.")
    expert_bytes = {int(m[1]): int(m[2]) for line in lines if (m := _LAYER.match(line)) and int(m[2]) > 0}
    for layer, size in expert_bytes.items():
        if layer >= MAX_LAYERS or size >= 2**63:
            raise MoetraceError(f"{path} has a line '# layer={layer} expert_bytes={size}', which is impossible.")
    if missing := [name for name in _COLUMNS if names.count(name) != 1]:
        raise MoetraceError(f"{path} has no column {missing[0]!r} in line {len(lines) + 1}.")
    wanted = _COLUMNS | {"dropped": pl.Int32}
    wanted = {name: kind for name, kind in wanted.items() if names.count(name) == 1}
    columns = {name if name in wanted else f"#{at}": wanted.get(name) for at, name in enumerate(names)}
    return _Header(
        lines=len(lines),
        columns=columns,
        num_experts=int(said["E"]),
        top_k=int(said["k"]),
        expert_bytes=expert_bytes,
        model=re.split(r"[/\\]", said["model"])[-1],
        arch=said["arch"],
    )


def _tokens(path: Path, header: _Header, hints: Hints, cut: CutLines) -> _Tokens:
    keys = layers = np.zeros(0, np.int64)
    count = dropped = 0
    weights = False
    for line, lines in tables(path, header.columns, half(hints), header=header.lines + 1, cut=cut):
        _check_lines(path, line, lines, header, hints)
        count += lines.height
        dropped += int(lines["dropped"].sum()) if "dropped" in lines.columns else 0
        weights = weights or not lines["weight"].is_nan().all()
        key = _key(lines)
        keys = np.union1d(keys, key[np.r_[True, np.diff(key) != 0]])
        layers = np.union1d(layers, lines["layer"].unique().to_numpy())
    if not count:
        raise MoetraceError(f"{path} has no lines of routing.")
    layer_index = np.array(sorted(header.expert_bytes) or layers)
    return _Tokens(keys, layer_index, count, dropped, weights)


def _key(lines: pl.DataFrame) -> np.ndarray:
    """Turn, phase and step of each line in one number, which orders tokens as they were routed."""
    turn, phase, step = (lines[name].to_numpy().astype(np.int64) for name in ("turn", "phase", "step"))
    return (turn << 32) | (phase << 31) | step


def _scatter(
    path: Path, line: int, lines: pl.DataFrame, tokens: _Tokens, spool: Spool, placeholders: Placeholders
) -> None:
    """Put the choices of some lines at their places, unless there is one already."""
    expert, number = (
        placeholders.marked(lines["expert"].to_numpy()[:, None])[:, 0],
        np.arange(line, line + lines.height),
    )
    if expert.min(initial=0) < 0:
        absent = expert < 0
        lines, expert, number = lines.filter(pl.Series(~absent)), expert[~absent], number[~absent]
    row = np.searchsorted(tokens.keys, _key(lines))
    layer = np.searchsorted(tokens.layer_index, lines["layer"].to_numpy())
    if not row.size:
        return
    slot = lines["slot"].to_numpy()
    there = spool.take(row, layer)
    taken = there[np.arange(row.size), slot] != placeholders.absent
    twice = (there == expert[:, None]).any(axis=1)
    cell = row * tokens.layer_index.size + layer
    for before, key, what in (
        (taken, cell * there.shape[1] + slot, _TAKEN),
        (twice, cell * placeholders.num_experts + expert, _TWICE),
    ):
        if before.any():
            raise MoetraceError(f"{path}: line {number[int(before.argmax())]}: {what}.")
        if (np.diff(np.sort(key)) == 0).any():
            raise MoetraceError(f"{path}: line {number[pl.Series(key).is_duplicated().arg_max() or 0]}: {what}.")
    values = {"experts": expert, "gates": lines["weight"].to_numpy(), "recorded": lines["residency"].to_numpy()}
    if not tokens.weights:
        del values["gates"]
    spool.scatter(row, layer, slot, **values)


def _header_lines(path: Path, file: IO[str]) -> Iterator[str]:
    """The lines of the header, and the first one after it, which names columns."""
    for number in range(_HEADER_LINES):
        line = file.readline(4096)
        if number == 0 and not line.startswith(FIRST_LINE):
            raise MoetraceError(f"{path} does not begin with '{FIRST_LINE}'.")
        yield line.rstrip("\r\n")
        if not line.startswith("#"):
            return
    raise MoetraceError(f"{path} has more than {_HEADER_LINES} lines of header.")


def _no_expert(num_experts: int, hints: Hints) -> pl.Expr:
    """Whether a line names no expert and no placeholder id."""
    wrong = ~pl.col("expert").is_between(-1, num_experts - 1)
    if hints.absent_ids:
        wrong &= ~pl.col("expert").is_in(hints.absent_ids)
    if hints.absent_from is not None:
        wrong &= pl.col("expert") < hints.absent_from
    return wrong


def _check_lines(path: Path, line: int, lines: pl.DataFrame, header: _Header, hints: Hints) -> None:
    named = sorted(header.expert_bytes)
    checks = (
        (~pl.col("phase").is_between(0, 1), "phase is not 0 or 1"),
        (pl.col("turn") < 0, "turn is negative"),
        (pl.col("step") < 0, "step is negative: the engine could not tell the token's position"),
        (
            ~pl.col("layer").is_in(named) if named else ~pl.col("layer").is_between(0, MAX_LAYERS - 1),
            "layer is not one of the header's layers that hold experts",
        ),
        (~pl.col("slot").is_between(0, header.top_k - 1), f"slot is not 0 to {header.top_k - 1}"),
        (
            _no_expert(header.num_experts, hints),
            f"expert is not 0 to {header.num_experts - 1}: if ids from there on carry no expert, give --absent-from "
            f"{header.num_experts}",
        ),
        (pl.col("weight").is_not_nan() & (pl.col("weight").abs() > MAX_WEIGHT), f"weight is beyond {MAX_WEIGHT:g}"),
        (~pl.col("residency").is_between(0, PREFETCHED), "residency is not 0, 1 or 2"),
    )
    found = lines.select(wrong.any().alias(what) for wrong, what in checks).row(0, named=True)
    for wrong, what in checks:
        if found[what]:
            raise MoetraceError(f"{path}: line {line + (lines.select(wrong).to_series().arg_max() or 0)}: {what}.")
