"""The log of a replay as Polars frames: a row for each policy and step, unit, layer or request, or for each expert.

Columns are those of the files that `moetrace replay -o` writes; undefined values are null, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from moetrace.engine.cluster.cluster_books import STAGE_FIELDS, STEP_FIELDS
from moetrace.engine.cluster.cluster_lane import ClusterLane
from moetrace.engine.lane import Lane
from moetrace.engine.levels import power_s
from moetrace.engine.run import AnyLane, Run
from moetrace.engine.state import LINK_IN, LINK_OUT, STEP, UNIT
from moetrace.results.accounts import Account, accounts_of
from moetrace.results.deadlines import level_columns
from moetrace.results.remote_use import remote_usd
from moetrace.results.requests import QUANTILES, REQUEST_COUNTS, edges_of, request_gaps, request_times
from moetrace.spec import System
from moetrace.spec.later import Later
from moetrace.trace.schema import PHASE_NAMES

if TYPE_CHECKING:
    import polars as pl
else:
    pl = Later("polars")

# The step log may be larger than memory: it is turned into rows this many steps at a time.
SLICE_STEPS = 1 << 16

# Copied from the log as they are; the columns before and after them in steps.parquet are made here.
_STEP_FIGURES = ("dense_s", "moe_s", "head_s", "wait_s", "hits", "misses", "demand_bytes", "prefetch_bytes", "late")


def step_slices(run: Run) -> Iterator[pl.DataFrame]:
    """Yield the rows of all steps of all policies in order, a slice at a time."""
    phase_names = pl.Series("phase", PHASE_NAMES)
    with_levels = any(lane.level_steps is not None for lane in run.lanes)
    any_cold = any(lane.remote is not None for lane in run.lanes)
    for lane in run.lanes:
        end_s = 0.0
        for first in range(0, len(lane.log.step), SLICE_STEPS):
            log = lane.log.step[first : first + SLICE_STEPS]
            steps = slice(first, first + len(log))
            edge_s = np.cumsum(np.concatenate(([end_s], log["duration_s"])))
            end_s = edge_s[-1]
            yield pl.DataFrame(
                {
                    "policy": pl.repeat(lane.policy.name, len(log), eager=True),
                    "step": np.arange(first, first + len(log)),
                    "phase": phase_names.gather(run.schedule.phase[steps]),
                    "rows": run.schedule.rows[steps],
                    "start_s": edge_s[:-1],
                    "duration_s": np.ascontiguousarray(log["duration_s"]),
                    **{name: np.ascontiguousarray(log[name]) for name in _STEP_FIGURES},
                    "imbalance": _nulls(log["imbalance"]),
                    **(level_columns(lane, steps) if with_levels else {}),
                    **({"cold_s": np.where(np.arange(first, first + len(log)), 0.0, lane.cold_s)} if any_cold else {}),
                    **_of_a_cluster(log),
                }
            )


def _of_a_cluster(log: np.ndarray) -> dict[str, pl.Series]:
    """The columns that only the steps of a cluster have: those of its log, and its rows' fan-out."""
    if log.dtype == STEP:
        return {}
    routed = log["routed"]
    columns = {name: pl.Series(np.ascontiguousarray(log[name])) for name in STEP_FIELDS if name != "imbalance_rows"}
    fan_out = np.where(routed > 0, log["distinct"] / np.maximum(routed, 1), np.nan)
    return columns | {"imbalance_rows": _nulls(log["imbalance_rows"]), "fan_out": _nulls(fan_out)}


def unit_frame(run: Run) -> pl.DataFrame:
    """Return what each part of the machine did, by the names that the machine gives them: `gpu`, `ndp0` .. `link_out`.

    For a link, `experts` and `bytes` are those that it carried. Those of a CPU that takes no part are 0.
    `resent_bytes`, which are not in `bytes`, is there only if the link loses packets.
    """
    return pl.concat([_units_of(lane) for lane in run.lanes])


def layer_frame(run: Run) -> pl.DataFrame:
    """Return the figures of each MoE layer, summed over the steps; `layer` counts from 0, as in a policy's files."""
    with_cpu = any(has_cpu_beside(lane) for lane in run.lanes)
    return pl.concat([_layers_of(lane, with_cpu) for lane in run.lanes])


def has_cpu_beside(lane: AnyLane) -> bool:
    """Whether a CPU runs experts beside NDP units."""
    return lane.tiers is not None and bool(lane.tiers.term["has_cpu"][0])


def expert_frame(run: Run) -> pl.DataFrame:
    """Return how much each expert was wanted: rows that chose it, steps in which any did; the same for all policies."""
    layers, experts = run.popularity.rows.shape
    return pl.DataFrame(
        {
            "layer": np.repeat(np.arange(layers), experts),
            "expert": np.tile(np.arange(experts), layers),
            "rows": run.popularity.rows.ravel(),
            "steps": run.popularity.steps.ravel(),
        }
    )


def request_frame(run: Run) -> pl.DataFrame:
    """Return rows and times of each request, by ascending id."""
    requests, turns = run.schedule.requests, run.schedule.turns
    rows = {
        "request": requests.id,
        "prompt_rows": requests.prompt_rows,
        "output_rows": requests.output_rows,
    }
    frames = []
    for lane in run.lanes:
        edge_s = edges_of(lane)
        times = {name: _nulls(values) for name, values in request_times(run, edge_s)._asdict().items()}
        gaps = request_gaps(turns, edge_s)
        frames.append(
            pl.DataFrame(
                {
                    "policy": pl.repeat(lane.policy.name, len(requests.id), eager=True),
                    **rows,
                    **{name: times.pop(name) for name in ("ttft_s", "tpot_s", "e2e_s")},
                    **{name: getattr(turns, name) for name in REQUEST_COUNTS},
                    **times,
                    **{f"itl_s_p{100 * q:.0f}": _nulls(gaps[:, i]) for i, q in enumerate(QUANTILES)},
                }
            )
        )
    return pl.concat(frames)


def account_frame(run: Run) -> pl.DataFrame:
    """Return energy and price of each part of the machine that has a rate, in the order of `accounts_of`."""
    rows = [
        {"policy": lane.policy.name, "part": one.part, "idle_j": one.idle_j, "active_j": one.active_j}
        | {"link_j": one.link_j, "energy_j": one.energy_j, "price_usd": one.usd}
        for lane in run.lanes
        for one in lane_accounts(run.system, lane)
    ]
    names = ("idle_j", "active_j", "link_j", "energy_j", "price_usd")
    return pl.DataFrame(rows, {"policy": pl.String, "part": pl.String} | dict.fromkeys(names, pl.Float64))


def lane_accounts(system: System, lane: AnyLane) -> list[Account]:
    """Return the accounts of a policy, without a frame."""
    busy_s = busy_of(lane)
    if isinstance(lane, ClusterLane):
        return accounts_of(system, total_s(lane), busy_s, 0.0)
    busy_s["gpu"] = power_s(lane.aside.levels, busy_s["gpu"])
    accounts = accounts_of(system, total_s(lane), busy_s, link_bytes_of(lane))
    if system.price is not None and lane.remote is not None:
        accounts.append(Account("remote", usd=remote_usd(system, lane)))
    return accounts


def total_s(lane: AnyLane) -> float:
    """Seconds of all steps."""
    return float(np.sum(lane.duration_s))


def utilization_of(lane: AnyLane) -> dict[str, float | None]:
    """Return the share of the time in which each part of the machine works, by its name, without a frame."""
    shares = _utilization(_part_log(lane), total_s(lane)).tolist()
    return {part.name: None if math.isnan(one) else one for part, one in zip(lane.parts, shares, strict=True)}


def busy_of(lane: AnyLane) -> dict[str, float]:
    """Return the busy seconds of each part of the machine, by its name, without a frame."""
    return dict(zip((part.name for part in lane.parts), _part_log(lane)["busy_s"].tolist(), strict=True))


def link_bytes_of(lane: Lane) -> float:
    """Return what the link carried, both ways; what it sent again, too."""
    payload, losses = float(lane.log.unit["bytes"][LINK_IN] + lane.log.unit["bytes"][LINK_OUT]), lane.losses
    return payload if losses is None else payload + losses.resent_in_bytes + losses.resent_out_bytes


def _part_log(lane: AnyLane) -> np.ndarray:
    """The log of units, a row for each part of the machine."""
    log = np.concatenate((lane.log.unit, np.zeros(1, UNIT)))  # the last row is for parts that do no work
    return log[[part.log_row for part in lane.parts]]


def _units_of(lane: AnyLane) -> pl.DataFrame:
    log = _part_log(lane)
    sharers = np.array([part.share for part in lane.parts])
    seconds, losses = total_s(lane), lane.losses
    resent = {}
    if losses is not None:
        of_part = {LINK_IN: losses.resent_in_bytes, LINK_OUT: losses.resent_out_bytes}
        resent["resent_bytes"] = [of_part.get(part.log_row, 0.0) for part in lane.parts]
    return pl.DataFrame(
        {
            "policy": pl.repeat(lane.policy.name, len(log), eager=True),
            "unit": [part.name for part in lane.parts],
            "busy_s": np.ascontiguousarray(log["busy_s"]),
            "utilization": _nulls(_utilization(log, seconds)),
            "experts": np.ascontiguousarray(log["experts"]),
            "rows": log["rows"] / sharers,
            "bytes": log["bytes"] / sharers,
            **resent,
        }
    )


def _utilization(log: np.ndarray, seconds: float) -> np.ndarray:
    """Share of the time in which each part works: transfers that pass a link at the same time count once."""
    if seconds == 0:
        return np.full(len(log), np.nan)
    return np.clip((log["busy_s"] - log["shared_s"]) / seconds, 0.0, 1.0)  # a sum's rounding may lead beyond 1


def _layers_of(lane: AnyLane, with_cpu: bool) -> pl.DataFrame:
    log, cpu = lane.log.layer, ("cpu_experts",) if with_cpu else ()
    count = log["imbalance_count"]
    imbalance = np.where(count > 0, log["imbalance_sum"] / np.maximum(count, 1), np.nan)
    columns = {
        name: np.ascontiguousarray(log[name])
        for name in ("dense_s", "moe_s", "hits", "misses", "gpu_experts", "ndp_experts", *cpu, "demand_bytes")
    }
    frame = pl.DataFrame(
        {
            "policy": pl.repeat(lane.policy.name, len(log), eager=True),
            "layer": np.arange(len(log)),
            **columns,
        }
    )
    frame = frame.insert_column(frame.get_column_index("gpu_experts"), _nulls(imbalance).rename("imbalance"))
    if "routed" not in log.dtype.names:
        return frame
    rows = np.where(count > 0, log["imbalance_rows_sum"] / np.maximum(count, 1), np.nan)
    fan_out = np.where(log["routed"] > 0, log["distinct"] / np.maximum(log["routed"], 1), np.nan)
    stages = [pl.Series(name, np.ascontiguousarray(log[name])) for name in STAGE_FIELDS]
    return frame.with_columns(*stages, _nulls(rows).rename("imbalance_rows"), _nulls(fan_out).rename("fan_out"))


def _nulls(values: np.ndarray) -> pl.Series:
    """A column with null for NaN."""
    return pl.Series(np.ascontiguousarray(values, np.float64), nan_to_null=True)
