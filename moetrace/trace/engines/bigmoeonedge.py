"""BigMoeOnEdge route traces, version 1: a CSV line for each routed expert.

Layout as its documents state it (`docs/telemetry.md`, `core/src/metrics/route_trace_sink.cpp`, commit 2d4f2b11 and
later): `# model= arch= n_layer= n_expert= n_expert_used=`, a line `# layer= expert_bytes= dense_bytes=` for each layer,
then columns by name: turn, phase (0 prefill, 1 decode), step (position of the token), layer, slot, expert, weight,
residency (0 miss, 1 hit, 2 hit on a prefetch), expert_bytes, and in later versions `dropped`.

Lines are ordered by layer before token within a prefill. Its last layer routes only the last prompt token: the others
are absent there. A dropped routing (a miss that the engine skipped) is kept, since the router chose it.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from moetrace.spec.errors import MoetraceError
from moetrace.trace.engines.capture import Capture, Hints
from moetrace.trace.schema import MAX_LAYERS, NOT_RECORDED, PREFETCHED, absent_id, check_sizes, expert_dtype

FIRST_LINE = "# route_trace v1"
_MODEL = re.compile(
    r"# model=(?P<model>.*) arch=(?P<arch>\S*) n_layer=\d+ n_expert=(?P<E>\d+) n_expert_used=(?P<k>\d+)"
)
_LAYER = re.compile(r"# layer=(\d+) expert_bytes=(\d+)")
_QUANTIZATION = re.compile(r"(?:^|[-_.])(i?q\d\w*|mxfp4\w*|bf16|f16|f32)(?=[-.]|$)", re.IGNORECASE)
_HEADER_LINES = 4096
# A header may announce any size: a file with fewer than one line in this many choices is not believed.
SPARSEST = 100
MAX_WEIGHT = float(np.finfo(np.float16).max)
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


def _read(path: Path, hints: Hints) -> Capture:
    """Read a whole route trace; about 30 bytes of memory for each of its lines."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        header = list(_header_lines(path, file))
    said = next((match for line in header if (match := _MODEL.match(line))), None)
    if said is None:
        raise MoetraceError(f"{path} has no line '# model=... arch=... n_layer=... n_expert=... n_expert_used=...'.")
    num_experts, top_k = int(said["E"]), int(said["k"])
    expert_bytes = {int(m[1]): int(m[2]) for line in header if (m := _LAYER.match(line)) and int(m[2]) > 0}
    for layer, size in expert_bytes.items():
        if layer >= MAX_LAYERS or size >= 2**63:
            raise MoetraceError(f"{path} has a line '# layer={layer} expert_bytes={size}', which is impossible.")
    lines, dropped = _lines(path, len(header))
    layer_index = np.array(sorted(expert_bytes) or lines["layer"].unique().sort().to_list())
    check_sizes(str(path), num_experts, top_k, layer_index.size, lines.height, 1)
    _check_lines(path, len(header), lines, num_experts, top_k, layer_index)
    tokens = lines.select("turn", "phase", "step").unique().sort("turn", "phase", "step").with_row_index("row")
    row = lines.join(tokens, on=["turn", "phase", "step"], how="left", maintain_order="left")["row"].to_numpy()
    cell = (row, np.searchsorted(layer_index, lines["layer"].to_numpy()), lines["slot"].to_numpy())
    shape = (tokens.height, layer_index.size, top_k)
    if tokens.height * layer_index.size * top_k > SPARSEST * lines.height + 2**16:
        raise MoetraceError(f"{path}: {lines.height} lines are too few for {shape} choices (tokens, layers, slots).")
    arrays = {
        "experts": np.full(shape, absent_id(num_experts), expert_dtype(num_experts)),
        "gates": np.zeros(shape, np.float16),
        "recorded": np.full(shape, NOT_RECORDED, np.uint8),
    }
    for name, column in (("experts", "expert"), ("gates", "weight"), ("recorded", "residency")):
        arrays[name][cell] = lines[column].to_numpy()
    if lines["weight"].is_nan().all():  # how the engine says that it knows no weights
        del arrays["gates"]
    model = re.split(r"[/\\]", said["model"])[-1]
    facts = {"format": "bigmoeonedge", "engine": "BigMoeOnEdge", "version": "route_trace v1", "arch": said["arch"]}
    if quantization := _QUANTIZATION.search(model):
        facts["quantization"] = quantization[1]
    return Capture(
        model=model,
        num_experts=num_experts,
        top_k=top_k,
        layer_index=layer_index,
        expert_bytes=np.array([expert_bytes[layer] for layer in layer_index.tolist()]) if expert_bytes else None,
        request=tokens["turn"].to_numpy(),
        position=tokens["step"].to_numpy(),
        phase=tokens["phase"].to_numpy().astype(np.uint8),
        optional=tuple(name for name in ("gates", "recorded") if name in arrays),
        facts=facts | ({"dropped": dropped} if dropped else {}),
        parts=lambda: iter([arrays]),
        sources=(path,),
    )


def _header_lines(path: Path, file) -> Iterator[str]:
    for number in range(_HEADER_LINES):
        line = file.readline(4096)
        if number == 0 and not line.startswith(FIRST_LINE):
            raise MoetraceError(f"{path} does not begin with '{FIRST_LINE}'.")
        if not line.startswith("#"):
            return
        yield line.rstrip("\r\n")
    raise MoetraceError(f"{path} has more than {_HEADER_LINES} lines of header.")


def _lines(path: Path, header: int) -> tuple[pl.DataFrame, int]:
    """The lines of routing, and how many of them the engine dropped."""
    try:
        # Not skip_rows: it takes a quote in the header, as in a model's name, for the beginning of a field.
        found = pl.read_csv(path, skip_lines=header, quote_char=None, n_rows=0).columns
        if missing := [name for name in _COLUMNS if name not in found]:
            raise MoetraceError(f"{path} has no column {missing[0]!r} in line {header + 1}.")
        wanted = _COLUMNS | ({"dropped": pl.Int32} if "dropped" in found else {})
        lines = pl.read_csv(path, skip_lines=header, quote_char=None, columns=list(wanted), schema_overrides=wanted)
    except pl.exceptions.PolarsError as error:
        raise MoetraceError(f"{path} can't be read as CSV: {str(error).splitlines()[0]}.") from error
    if lines.is_empty():
        raise MoetraceError(f"{path} has no lines of routing.")
    incomplete = lines.select(pl.any_horizontal(pl.all().is_null())).to_series()
    if incomplete.any():
        raise MoetraceError(f"{path}: line {header + 2 + (incomplete.arg_max() or 0)} is incomplete.")
    dropped = int(lines["dropped"].sum()) if "dropped" in found else 0
    return lines.select(list(_COLUMNS)), dropped


def _check_lines(
    path: Path, header: int, lines: pl.DataFrame, num_experts: int, top_k: int, layer_index: np.ndarray
) -> None:
    cell = ["turn", "phase", "step", "layer"]
    for wrong, what in (
        (~pl.col("phase").is_between(0, 1), "phase is not 0 or 1"),
        (pl.col("turn") < 0, "turn is negative"),
        (pl.col("step") < 0, "step is negative: the engine could not tell the token's position"),
        (~pl.col("layer").is_in(layer_index.tolist()), "layer is not one of the header's layers that hold experts"),
        (~pl.col("slot").is_between(0, top_k - 1), f"slot is not 0 to {top_k - 1}"),
        (~pl.col("expert").is_between(0, num_experts - 1), f"expert is not 0 to {num_experts - 1}"),
        (pl.col("weight").is_not_nan() & (pl.col("weight").abs() > MAX_WEIGHT), f"weight is beyond {MAX_WEIGHT:g}"),
        (~pl.col("residency").is_between(0, PREFETCHED), "residency is not 0, 1 or 2"),
        (pl.struct(*cell, "slot").is_duplicated(), "another line has the same turn, phase, step, layer and slot"),
        (pl.struct(*cell, "expert").is_duplicated(), "its token chooses this expert of this layer more than once"),
    ):
        found = lines.select(wrong).to_series()
        if found.any():
            raise MoetraceError(f"{path}: line {header + 2 + (found.arg_max() or 0)}: {what}.")
