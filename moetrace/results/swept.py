"""The inputs of the report of a sweep: `sweep.json` and `cells.parquet`, as a stranger's folder holds them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from moetrace.results.folder import has_file, read_sweep
from moetrace.results.publish import file_in
from moetrace.results.read_parquet import schema_of, whole_frame
from moetrace.results.record import CELLS_FILE, COLUMNS, FRONTS, SEARCH_FILE
from moetrace.spec.errors import MoetraceError

_ALWAYS = ("trace", "model", "system", "policy", "slots")
LATENCIES = ("ttft_s_p50", "tpot_s_p50", "itl_s_p50", "itl_s_p99", "tokens_per_s")
PER_TOKEN = ("energy_per_token_j", "usd_per_million_tokens")
SOME_HAVE = ("gate_mass_dropped", "resent_bytes", "host_hit_rate", "disk_bytes", "remote_usd", "cold_s")
# Optional columns that a table or the front shows.
_FIGURES: dict[str, Any] = {"error": pl.String, "pareto": pl.Boolean}
_FIGURES |= dict.fromkeys((*FRONTS, *PER_TOKEN, *SOME_HAVE, "hit_rate", *LATENCIES), pl.Float64)


@dataclass(frozen=True)
class Swept:
    """A sweep to be drawn.

    Attributes:
        moetrace: version.
        axes: columns that differ between cells.
        grid: what was asked for: the values of each axis.
        searched: whether `moetrace sweep --search` chose the cells.
        pareto: the column that the front weighs against time.
        notes: sentences about the cells as a whole.
        cells: a row for each, in the sweep's order; `relative` is its time over that of the fastest cell of its trace.
    """

    moetrace: str
    axes: list[str]
    grid: dict[str, Any]
    searched: bool
    pareto: str
    notes: list[str]
    cells: pl.DataFrame

    @property
    def done(self) -> pl.DataFrame:
        """The cells that have a result."""
        return self.cells.drop_nulls("total_s")


def read_swept(folder: Path) -> Swept:
    """Read what `moetrace sweep -o` left in a folder.

    Raises MoetraceError (file, column) if a file cannot be read, is not what moetrace writes, or is of another sweep.
    """
    about, sha256 = read_sweep(folder)
    path = file_in(folder, CELLS_FILE)
    columns = {"name": pl.String, "total_s": pl.Float64} | _others(path, about.axes)
    cells = whole_frame(path, columns, of=sha256, signed=[name for name in columns if name not in COLUMNS])
    if cells is None:
        raise MoetraceError(f"{folder} has no cells.parquet: run the sweep again, which keeps finished cells.")
    if cells.is_empty():
        raise MoetraceError(f"{path} has no cells.")
    cells = cells.with_columns(pl.col(pl.String).exclude("error").fill_null("–"))
    axes = [axis for axis in dict.fromkeys((*_ALWAYS, *about.axes)) if axis in cells.columns]
    by_trace = ["trace"] if "trace" in cells.columns else []
    fastest = pl.col("total_s").min().over(by_trace) if by_trace else pl.col("total_s").min()
    cells = cells.with_columns((pl.col("total_s") / fastest).fill_nan(None).alias("relative"))
    return Swept(
        moetrace=about.moetrace,
        axes=[axis for axis in axes if cells[axis].n_unique() > 1],
        grid=about.axes,
        searched=has_file(folder, SEARCH_FILE),
        pareto=about.pareto,
        notes=about.notes,
        cells=cells,
    )


def _others(path: Path, axes: dict[str, Any]) -> dict[str, Any]:
    """Columns that need not be there, as they are: axes, and what a table or the front shows."""
    plain = {
        name: pl.Int64 if kind.is_integer() else pl.Float64 if kind.is_numeric() else kind
        for name, kind in schema_of(path).items()
        if kind in (pl.String, pl.Boolean) or kind.is_numeric()
    }
    return {name: _FIGURES.get(name, plain[name]) for name in (*_ALWAYS, *axes, *_FIGURES) if name in plain}
