"""The outcome of a policy's deadline: which steps are in time, and at which level of the GPU they ran."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetrace.engine.layer import SAME
from moetrace.engine.levels import mean_frequency
from moetrace.engine.run import AnyLane
from moetrace.spec import System
from moetrace.spec.later import Later

if TYPE_CHECKING:
    import polars as pl
else:
    pl = Later("polars")


# Column of the file -> field of the log.
_FIELDS = {"level": "level", "top_duration_s": "top_s"}


def deadline_figures(system: System, lane: AnyLane) -> dict[str, float | None]:
    """Return the figures of `summary.json` that only a policy with a deadline has; None without steps."""
    if lane.policy.deadline_ms is None:
        return {}
    duration_s = lane.duration_s
    is_late = lane.policy.deadline_ms / 1e3 < duration_s * SAME  # as `layer.less`
    found: dict[str, float | None] = {"in_time": float(np.mean(~is_late)) if len(is_late) else None}
    if system.gpu.levels is not None:
        found["mean_frequency"] = 1.0 if lane.aside.levels is None else mean_frequency(lane.aside.levels)
    return found


def level_columns(lane: AnyLane, steps: slice) -> dict[str, pl.Series]:
    """Return the columns of `steps.parquet` that levels add: null for a policy without a deadline."""
    if lane.level_steps is None:
        nothing = [None] * (steps.stop - steps.start)
        return {"level": pl.Series(nothing, dtype=pl.Int64), "top_duration_s": pl.Series(nothing, dtype=pl.Float64)}
    log = lane.level_steps[steps]
    return {name: pl.Series(np.ascontiguousarray(log[field])) for name, field in _FIELDS.items()}
