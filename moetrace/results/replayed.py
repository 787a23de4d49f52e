"""What charts and reports are made from: a replay's figures and frames, in memory or from a stranger's folder."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import polars as pl

from moetrace.spec.errors import MoetraceError, UsageError, printable

if TYPE_CHECKING:
    from moetrace.results.replay import Result

# Columns that charts need of each file; whatever else is in it is left alone.
COLUMNS: dict[str, dict[str, Any]] = {
    "steps": {
        "policy": pl.String,
        "step": pl.Int64,
        "phase": pl.String,
        "rows": pl.Int64,
        "duration_s": pl.Float64,
        "dense_s": pl.Float64,
        "moe_s": pl.Float64,
        "head_s": pl.Float64,
        "wait_s": pl.Float64,
        "hits": pl.Int64,
        "misses": pl.Int64,
    },
    "units": {"policy": pl.String, "unit": pl.String, "busy_s": pl.Float64, "utilization": pl.Float64},
    "layers": {
        "policy": pl.String,
        "layer": pl.Int64,
        "moe_s": pl.Float64,
        "hits": pl.Int64,
        "misses": pl.Int64,
        "imbalance": pl.Float64,
    },
    "requests": {"policy": pl.String, "request": pl.Int64, "ttft_s": pl.Float64, "tpot_s": pl.Float64},
    "experts": {"layer": pl.Int64, "expert": pl.Int64, "rows": pl.Int64, "steps": pl.Int64},
}
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]  # JSON knows no limit, a column does
MOST_JSON_BYTES = 64 << 20
# No file of ours has so many rows a byte; one that claims more would take memory that it does not justify.
_MOST_ROWS_A_BYTE = 64


class Spread(msgspec.Struct):
    """Mean, quantiles and maximum; None where nothing is defined."""

    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None
    max: float | None


class Utilization(msgspec.Struct):
    """Busy over total time of each part of the machine."""

    gpu: float | None
    ndp: list[float | None]
    link_in: float | None
    link_out: float | None
    cpu: float | None


class PolicyFigures(msgspec.Struct):
    """One policy of `summary.json`."""

    name: str
    total_s: float
    prefill_s: float
    decode_s: float
    mixed_s: float
    tokens_per_s: float | None
    step_s: Spread
    ttft_s: Spread
    tpot_s: Spread
    hit_rate: float | None
    demand_bytes: float
    prefetch_bytes: float
    imbalance_mean: float | None
    utilization: Utilization
    work_bound_s: float
    clairvoyant_s: float
    speedup: float | None
    choices: dict[str, Any]


class TraceFacts(msgspec.Struct):
    """The trace of `summary.json`."""

    model: str
    layers: Count
    experts: Count
    top_k: Count
    rows: Count
    steps: Count
    requests: Count
    prefill_rows: Count
    decode_rows: Count
    source: dict[str, Any]
    sha256: str | None = None


class Summary(msgspec.Struct):
    """What charts and reports need of `summary.json` (schema `moetrace.result/1`)."""

    schema: str
    moetrace: str
    trace: TraceFacts
    model: dict[str, Any]
    system: dict[str, Any]
    slots: Count
    policies: list[PolicyFigures]


@dataclass(frozen=True)
class Replayed:
    """A replay to be drawn. Of a folder, a frame is None where its file is missing.

    steps may be larger than memory, so it is a lazy frame.
    """

    summary: Summary
    steps: pl.LazyFrame | None
    units: pl.DataFrame | None
    layers: pl.DataFrame | None
    requests: pl.DataFrame | None
    experts: pl.DataFrame | None

    @property
    def names(self) -> list[str]:
        """The policies, in order."""
        return [policy.name for policy in self.summary.policies]


def replayed_of(result: "Result") -> Replayed:
    """Take what a replay in memory found."""
    summary = msgspec.convert(result.to_dict(), Summary)
    steps, *others = (getattr(result, name).select(list(columns)) for name, columns in COLUMNS.items())
    return Replayed(summary, steps.lazy(), *others)


def read_replayed(folder: Path) -> Replayed:
    """Read what `moetrace replay -o` left in a folder; a missing Parquet file is None.

    Raises MoetraceError (file, field or column) if a file cannot be read or is not what `docs/results.md` says.
    """
    path = folder / "summary.json"
    summary = read_json(path, Summary)
    if summary.schema != "moetrace.result/1":
        raise MoetraceError(
            f"{path} has schema {printable(summary.schema)!r}, but this moetrace reads moetrace.result/1: replay again."
        )
    names = [policy.name for policy in summary.policies]
    if not names or len(set(names)) < len(names):
        raise MoetraceError(f"{path} must have policies, each of another name.")
    steps = scan(folder / "steps.parquet", COLUMNS["steps"])
    others = (whole_frame(folder / f"{name}.parquet", columns) for name, columns in COLUMNS.items() if name != "steps")
    return Replayed(summary, steps, *others)


def read_json(path: Path, form: Any) -> Any:
    """Return a JSON file as the struct `form`; raises MoetraceError (file, field) if it is not one."""
    try:
        size_bytes = path.stat().st_size
        content = path.read_bytes() if size_bytes <= MOST_JSON_BYTES else b""
    except OSError as error:
        raise MoetraceError(f"{path} could not be read: {error.strerror or error}.") from None
    if size_bytes > MOST_JSON_BYTES:
        raise MoetraceError(f"{path} has {size_bytes:,} bytes, more than any that moetrace writes.")
    try:
        return msgspec.json.decode(content, type=form)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MoetraceError(f"{path} is not what moetrace writes: {printable(str(error))}.") from None


def scan(path: Path, columns: dict[str, Any]) -> pl.LazyFrame | None:
    """Return these columns of a Parquet file, as these types, or None if there is no such file.

    Raises MoetraceError (file, column) if it is damaged, lacks a column, or claims more rows than its size justifies.
    """
    if not os.path.lexists(path):
        return None
    with readable(path):
        size_bytes = path.stat().st_size
        frame = pl.scan_parquet(path, glob=False)
        schema = frame.collect_schema()
        rows = frame.select(pl.len()).collect().item()
    if rows > _MOST_ROWS_A_BYTE * size_bytes:
        raise MoetraceError(f"{path} claims {rows:,} rows in {size_bytes:,} bytes: it is damaged.")
    for name, kind in columns.items():
        if name not in schema or not _alike(schema[name], kind):
            found = f"{schema[name]}" if name in schema else "no such column"
            raise MoetraceError(f"{path} must have a column {name} of {kind}, but there is {found}: replay again.")
    return frame.select(pl.col(name).cast(kind) for name, kind in columns.items())


def whole_frame(path: Path, columns: dict[str, Any]) -> pl.DataFrame | None:
    """Return what `scan` finds, in memory."""
    frame = scan(path, columns)
    if frame is None:
        return None
    with readable(path):
        return frame.collect()


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn Polars' refusal of a damaged file into one sentence."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MoetraceError(f"{path} could not be read: {printable(why)}.") from None


def folder_of(path: str | os.PathLike[str]) -> Path:
    """Return the path of an existing folder; raises UsageError if it is none."""
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"{folder} {what}: name a folder that `moetrace replay -o` or `moetrace sweep -o` wrote.")
    return folder


def _alike(found: Any, wanted: Any) -> bool:
    """Whether a column can stand for another: any width of integers, any number for a float."""
    if wanted == pl.Int64:
        return found.is_integer()
    return found.is_numeric() if wanted == pl.Float64 else found == wanted
