"""The inputs of charts and reports of a replay: its figures and frames, in memory or from a stranger's folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import polars as pl

from moetrace.results.folder import read_summary
from moetrace.results.publish import file_in
from moetrace.results.read_parquet import scan, whole_frame
from moetrace.results.record import Summary

if TYPE_CHECKING:
    from moetrace.results.replay import Result

# Columns of each file that charts need; other columns are not read.
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
# And numbers that earlier versions did not write.
_NEWER: dict[str, dict[str, Any]] = {"requests": {"itl_s_p99": pl.Float64}}


@dataclass(frozen=True)
class Replayed:
    """A replay to be drawn. For a folder, a frame is None where its file is missing, and `sha256` is of summary.json.

    steps may be larger than memory, so it is a lazy frame.
    """

    summary: Summary
    steps: pl.LazyFrame | None
    units: pl.DataFrame | None
    layers: pl.DataFrame | None
    requests: pl.DataFrame | None
    experts: pl.DataFrame | None
    sha256: str | None = None

    @property
    def names(self) -> list[str]:
        """The policies, in order."""
        return [policy.name for policy in self.summary.policies]


def replayed_of(result: "Result") -> Replayed:
    """Take what a replay in memory found."""
    summary = msgspec.convert(result.to_dict(), Summary)
    wanted = {name: [*columns, *_NEWER.get(name, {})] for name, columns in COLUMNS.items()}
    steps, *others = (getattr(result, name).select(columns) for name, columns in wanted.items())
    return Replayed(summary, steps.lazy(), *others)


def read_replayed(folder: Path) -> Replayed:
    """Read what `moetrace replay -o` left in a folder; a missing Parquet file is None.

    Raises MoetraceError (file, field or column) if a file cannot be read, is not what `docs/results.md`
    says, or is of another result than `summary.json`.
    """
    summary, sha256 = read_summary(folder)
    files = {name: file_in(folder, f"{name}.parquet") for name in COLUMNS}
    steps = scan(files["steps"], COLUMNS["steps"], of=sha256)
    others = (
        whole_frame(files[name], columns, _NEWER.get(name), of=sha256)
        for name, columns in COLUMNS.items()
        if name != "steps"
    )
    return Replayed(summary, steps, *others, sha256=sha256)
