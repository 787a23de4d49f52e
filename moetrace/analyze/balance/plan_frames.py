"""The frames of `balance`: what its tallies say, layer by layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from moetrace.analyze.balance.imbalance import STEP_SUMS, SUMS, percentile
from moetrace.analyze.balance.judged import JudgedPlan

PERCENTILES = {"imbalance_p50": 0.5, "imbalance_p95": 0.95, "imbalance_p99": 0.99}
_STALE = {"kept": "kept", "remade": "re-made", "clairvoyant": "clairvoyant"}


def layers(
    judged_plans: Sequence[JudgedPlan], layer: np.ndarray, sizes_known: bool, link_bytes_s: float | None, timed: bool
) -> pl.DataFrame:
    """Make a row for each plan and layer (int64 [L], its index in the model)."""
    parts = []
    for judged in judged_plans:
        sums = dict(zip(SUMS, judged.tally.sums.T, strict=True))
        steps = sums["steps"]
        mean = np.where(steps > 0, steps, np.nan)  # a mean over no steps is undefined
        none = np.full(layer.size, np.nan)
        moved = pl.Series(judged.moved_bytes if sizes_known else [None] * layer.size, dtype=pl.Int64)
        pause_s = none if link_bytes_s is None else judged.moved_bytes / link_bytes_s
        figures: dict[str, Any] = {
            "layer": layer,
            "slots": judged.plan.slots,
            "steps": steps.astype(np.int64),
            "imbalance": sums["imbalance"] / mean,
            **{name: percentile(judged.tally, share) for name, share in PERCENTILES.items()},
            "imbalance_max": np.where(steps > 0, judged.tally.worst, np.nan),
            "least_imbalance": judged.least.imbalance / mean,
            "jain": sums["jain"] / mean,
            "balancedness": sums["balancedness"] / mean,
            "busiest_rows": sums["max_rows"] / judged.plan.share / mean,
            "time_imbalance": sums["time_imbalance"] / mean if timed else none,
            "busy_s": sums["busy_s"] if timed else none,
            "least_busy_s": judged.least.busy_s if timed else none,
            "migration_bytes": moved,
            "pause_s": pause_s,
        }
        rows = np.where(judged.fan_out[:, 0] > 0, judged.fan_out[:, 0], np.nan)
        figures |= {"fan_out": judged.fan_out[:, 1] / rows, "fan_out_nodes": judged.fan_out[:, 2] / rows}
        parts.append(pl.DataFrame(_names(judged, layer.size) | figures))
    return pl.concat(parts).with_columns(pl.col(pl.Float64).fill_nan(None))


def _names(judged: JudgedPlan, size: int) -> dict[str, pl.Series]:
    """The columns that name a plan, in ``size`` rows of each frame."""
    names = {"placement": judged.placement, "plan": judged.plan_is, "interval": judged.interval}
    types = {"placement": pl.String, "plan": pl.String, "interval": pl.Int64}
    return {name: pl.Series([value] * size, dtype=types[name]) for name, value in names.items()}


def summary(by_layer: pl.DataFrame, judged_plans: Sequence[JudgedPlan], judged_steps: int) -> pl.DataFrame:
    """Make a row for each plan: how its layers are, what they take together, and what engines would log."""
    total = pl.col("busy_s").sum()
    frame = by_layer.group_by("placement", "plan", "interval", maintain_order=True).agg(
        slots=pl.col("slots").max(),
        imbalance=pl.col("imbalance").mean(),
        imbalance_worst_layer=pl.col("imbalance").max(),
        worst_layer=pl.col("layer").get(pl.col("imbalance").fill_null(0).arg_max()),
        imbalance_p50=pl.col("imbalance_p50").mean(),
        imbalance_p95=pl.col("imbalance_p95").mean(),
        imbalance_p99=pl.col("imbalance_p99").mean(),
        imbalance_max=pl.col("imbalance_max").max(),
        least_imbalance=pl.col("least_imbalance").mean(),
        jain=pl.col("jain").mean(),
        time_imbalance=pl.col("time_imbalance").mean(),
        busy_s=pl.when(pl.col("busy_s").count() > 0).then(total),
        least_busy_s=pl.when(pl.col("busy_s").count() > 0).then(pl.col("least_busy_s").sum()),
        migration_bytes=pl.when(pl.col("migration_bytes").count() > 0).then(pl.col("migration_bytes").sum()),
        pause_s=pl.when(pl.col("pause_s").count() > 0).then(pl.col("pause_s").sum()),
    )
    remade = ((judged_steps - 1) // pl.col("interval")).fill_null(0)
    logged = np.array([judged.tally.step_sums for judged in judged_plans])
    logged = logged[:, 1:] / np.where(logged[:, :1] > 0, logged[:, :1], np.nan)
    apart = np.array([judged.fan_out.sum(axis=0) for judged in judged_plans])
    apart = apart[:, 1:] / np.where(apart[:, :1] > 0, apart[:, :1], np.nan)
    return frame.with_columns(
        *(pl.Series(name, logged[:, i]).fill_nan(None) for i, name in enumerate(STEP_SUMS[1:])),
        *(pl.Series(name, apart[:, i]).fill_nan(None) for i, name in enumerate(("fan_out", "fan_out_nodes"))),
        remade.cast(pl.Int64).alias("rebalances"),
    )


def staleness(by_layer: pl.DataFrame, judged: int, intervals: Sequence[int]) -> pl.DataFrame:
    """Make a row for each planned placement, interval and layer, and one of all layers: mean imbalance, summed seconds.

    `loss` is by how much a kept plan is worse than a re-made or a clairvoyant one, as a share. A rebalance is worth its
    pause after `break_even_steps` of the seconds that it saves a step; null if it saves none, or seconds are unknown.
    """
    wide = pl.concat([_side_by_side(by_layer, interval) for interval in intervals])
    seconds = [name for name in wide.columns if name.startswith(("busy_s", "pause_s", "migration"))]
    every = wide.group_by("placement", "interval", maintain_order=True).agg(
        pl.lit(None, pl.Int64).first().alias("layer"),
        pl.col("^imbalance_.*$").mean(),
        *(pl.when(pl.col(name).count() > 0).then(pl.col(name).sum()).alias(name) for name in seconds),
    )
    frame = pl.concat([wide, every.select(wide.columns)])
    first = pl.col("interval")
    saved_s = (pl.col("busy_s_kept") - pl.col("busy_s_remade")) / (judged - first).clip(1)
    pause_s = pl.col("pause_s") / ((judged - 1) // first).clip(1)
    return frame.with_columns(
        imbalance_loss_to_remade=pl.col("imbalance_kept") / pl.col("imbalance_remade") - 1,
        imbalance_loss_to_clairvoyant=pl.col("imbalance_kept") / pl.col("imbalance_clairvoyant") - 1,
        busy_loss_to_remade=pl.col("busy_s_kept") / pl.col("busy_s_remade") - 1,
        busy_loss_to_clairvoyant=pl.col("busy_s_kept") / pl.col("busy_s_clairvoyant") - 1,
        saved_s_per_step=saved_s,
        pause_s_per_rebalance=pause_s,
        break_even_steps=pl.when(saved_s > 0).then(pause_s / saved_s),
    ).with_columns(pl.col(pl.Float64).fill_nan(None))


def _side_by_side(by_layer: pl.DataFrame, interval: int) -> pl.DataFrame:
    """Put a placement's kept plan, those re-made at an interval and the clairvoyant one in a row a layer."""
    wide = None
    for ending, plan in _STALE.items():
        columns = [pl.col(name).alias(f"{name}_{ending}") for name in ("imbalance", "busy_s")]
        part = by_layer.filter(plan=plan)
        if plan == "re-made":
            part = part.filter(interval=interval)
            columns += ["migration_bytes", "pause_s"]
        part = part.select("placement", "layer", *columns)
        wide = part if wide is None else wide.join(part, on=["placement", "layer"], how="left", maintain_order="left")
    assert wide is not None
    return wide.select("placement", pl.lit(interval, pl.Int64).alias("interval"), pl.exclude("placement"))


def over_time(judged_plans: Sequence[JudgedPlan], layer: np.ndarray, judged_steps: np.ndarray) -> pl.DataFrame:
    """Make a row for each plan, layer and period: its first step, and the mean imbalance of its steps."""
    parts = []
    for judged in judged_plans:
        steps, total = judged.tally.over_time[:, :, 0], judged.tally.over_time[:, :, 1]
        periods = len(steps)
        first = judged_steps[-(-np.arange(periods) * judged_steps.size // periods)]
        size = periods * layer.size
        columns: dict[str, Any] = {
            **_names(judged, size),
            "layer": np.tile(layer, periods),
            "first_step": np.repeat(first, layer.size),
            "imbalance": (total / np.where(steps > 0, steps, np.nan)).ravel(),
        }
        parts.append(pl.DataFrame(columns))
    return pl.concat(parts).with_columns(pl.col(pl.Float64).fill_nan(None))
