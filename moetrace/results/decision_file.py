"""The decision of each policy for each active expert, beside that of `optimal`: a row for each, as Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.engine.against_optimal import DECISION, NOT_SEARCHED
from moetrace.engine.decision_log import DecisionLog
from moetrace.engine.run import Lane, Run
from moetrace.engine.state import DEVICES
from moetrace.results.write import GROUP_ROWS
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.later import Later
from moetrace.trace.schema import PHASE_NAMES

if TYPE_CHECKING:
    import polars as pl
    from polars.io import plugins
else:
    pl, plugins = Later("polars"), Later("polars.io.plugins")


def decision_frame(run: Run) -> pl.DataFrame:
    """Return a row for each policy and active expert of a layer, in the order of step, layer and demand.

    Columns: docs/results.md. Raises UsageError if decisions were not kept.
    """
    return pl.concat(_slices(run))


def write_decisions(run: Run, file: Any) -> None:
    """Write the rows of `decision_frame` as Parquet, from memory for a slice of them.

    Raises UsageError if decisions were not kept, MoetraceError if the system refuses.
    """
    schema, failed = next(_slices(run)).schema, []

    def frames(*_: Any) -> Iterator[pl.DataFrame]:
        try:
            yield from _slices(run)
        except BaseException as error:
            failed.append(error)  # Polars would make it an error of its own
            raise

    try:
        plugins.register_io_source(frames, schema=schema).sink_parquet(
            file,
            compression="zstd",
            compression_level=3,
            statistics=True,
            row_group_size=GROUP_ROWS,
            maintain_order=True,
        )
    except pl.exceptions.PolarsError as error:
        raise (failed[0] if failed else MoetraceError(f"Decisions could not be written: {error}.")) from None


def _slices(run: Run) -> Iterator[pl.DataFrame]:
    """Yield the rows a slice at a time, an empty one first."""
    lanes = [lane for lane in run.lanes if isinstance(lane, Lane)]  # a cluster decides nothing
    logs = [_log_of(lane) for lane in lanes]
    yield _frame(lanes[0], np.zeros(0, DECISION))
    for lane, log in zip(lanes, logs, strict=True):
        for made in log.slices():
            yield _frame(lane, made)


def _log_of(lane: Lane) -> DecisionLog:
    if lane.decision_log is None:
        raise UsageError("Decisions were not kept: replay with decisions=True.")
    return lane.decision_log


def _frame(lane: Lane, made: np.ndarray) -> pl.DataFrame:
    column = {name: np.ascontiguousarray(made[name]) for name in DECISION.names or ()}
    has_home = lane.aside.regret.has_home
    return pl.DataFrame(
        {
            "policy": pl.repeat(lane.policy.name, len(made), dtype=pl.String, eager=True),
            "step": column["step"],
            "phase": pl.Series(PHASE_NAMES, dtype=pl.String).gather(column["phase"]),
            "step_rows": column["step_rows"],
            "layer": column["layer"].astype(np.int64),
            "expert": column["expert"].astype(np.int64),
            "group": column["group"].astype(np.int64),
            "rows": column["rows"].astype(np.int64),
            "weight_bytes": column["weight_bytes"],
            "resident": column["resident"].astype(bool),
            "gpu_s": column["gpu_s"],
            "fetch_s": column["fetch_s"],
            "ndp_s": _or_null(column["ndp_s"], np.full(len(made), bool(has_home))),
            "cpu_s": _or_null(column["cpu_s"], np.isfinite(column["cpu_s"])),
            "device": _device(column["device"]),
            "optimal": _device(column["optimal"]),
        }
    )


def _or_null(seconds: np.ndarray, known: np.ndarray) -> pl.Series:
    return pl.select(pl.when(pl.lit(pl.Series(known))).then(pl.lit(pl.Series(seconds)))).to_series()


def _device(plan: np.ndarray) -> pl.Series:
    names = pl.Series([*DEVICES, None], dtype=pl.String)
    return names.gather(np.where(plan == NOT_SEARCHED, len(DEVICES), plan))
