"""The figures of a whole replay, one set a policy: the content of `summary.json`. `record` has the meaning of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from moetrace.engine.cluster.cluster_lane import ClusterLane
from moetrace.engine.run import AnyLane, Run
from moetrace.jit.fingerprint import room_fingerprint
from moetrace.results.accounts import account_figures
from moetrace.results.cluster_summary import cluster_figures
from moetrace.results.common_figures import Utilization
from moetrace.results.deadlines import deadline_figures
from moetrace.results.frames import lane_accounts, total_s, utilization_of
from moetrace.results.record import (
    COLUMNS,
    FIGURES,
    PolicyFigures,
    Spread,
    SummaryFile,
    TraceFacts,
    choices_of,
    is_absent,
    value_in,
)
from moetrace.results.remote_use import remote_figures
from moetrace.results.requests import (
    QUANTILES,
    REQUEST_COUNTS,
    Gaps,
    all_gaps,
    edges_of,
    request_times,
    weighted_quantiles,
)
from moetrace.spec import System, canonical
from moetrace.spec.errors import MoetraceError
from moetrace.spec.later import Later
from moetrace.trace import Trace
from moetrace.trace.schema import DECODE, MIXED, PHASE_NAMES, PREFILL
from moetrace.version import __version__

if TYPE_CHECKING:
    import polars as pl
else:
    pl = Later("polars")

# Column of the frame -> path in `summary.json`.
_PATHS = {path.replace(".", "_"): path for path in FIGURES}


def trace_facts(trace: Trace) -> dict[str, Any]:
    """Say which trace it was, without where it lay; the number of requests is only known after the replay."""
    return {
        "model": trace.model,
        "layers": trace.layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "rows": trace.rows,
        "steps": trace.steps,
        "own_expert_bytes": trace.expert_bytes is not None,
        "source": trace.source,
        "sha256": trace.content_sha256,
    }


def summary_dict(run: Run, trace: dict[str, Any], policies: list[dict[str, Any]]) -> dict[str, Any]:
    """Put together what `summary.json` holds, from `trace_facts` and the figures of each policy."""
    requests, turns = run.schedule.requests, run.schedule.turns
    facts: dict[str, Any] = trace | {
        "requests": len(requests.id),
        "prefill_rows": int(requests.prompt_rows.sum()),
        "decode_rows": int(requests.output_rows.sum()),
        **{name: int(getattr(turns, name).sum()) for name in REQUEST_COUNTS},
    }
    summary = SummaryFile(
        moetrace=__version__,
        engine=room_fingerprint("jit", "engine"),
        trace=TraceFacts(**facts),
        model=canonical(run.model),
        system=canonical(run.system),
        slots=run.slots,
        policies=policies,
    )
    return msgspec.to_builtins(summary)


def policy_figures(run: Run, break_even: Sequence[float | None] | None = None) -> list[dict[str, Any]]:
    """Return the figures of each policy, in order; seconds, bytes, counts and ratios, None where undefined.

    `break_even` is one of these figures that the run does not know: `results.break_even` computes it.
    Raises MoetraceError if one is not a finite number: JSON has no other, and no comparison could trust it.
    """
    figures = [_figures(run, lane) for lane in run.lanes]
    decode_rows = int(run.schedule.requests.output_rows.sum())
    for each, lane in zip(figures, run.lanes, strict=True):
        found = account_figures(lane_accounts(run.system, lane), decode_rows) | deadline_figures(run.system, lane)
        for name, value in found.items():
            setattr(each, name, value)
    for each, tokens in zip(figures, break_even or [None] * len(figures), strict=True):
        each.break_even_tokens = tokens
        each.speedup = _ratio(figures[0].total_s, each.total_s)
    found = msgspec.to_builtins(figures)
    for policy in found:
        _check_finite(policy, run)
    return found


def _check_finite(policy: dict[str, Any], run: Run) -> None:
    for path in FIGURES:
        value = value_in(policy, path)
        if value is not None and not math.isfinite(value):
            raise MoetraceError(
                f"{path} of policy {policy['name']} is {value}, and not a finite number: the rates and sizes of system "
                f"{run.system.name} and model {run.model.name} lie too far apart for a replay."
            )


def summary_frame(policies: list[dict[str, Any]]) -> pl.DataFrame:
    """Return one row a policy; nested figures get names like `ttft_s_p50`, `utilization_ndp` is the units' mean.

    A figure of `OPTIONAL` that no policy has is no column.
    """
    paths = {name: path for name, path in _PATHS.items() if not all(is_absent(path, policy) for policy in policies)}
    columns = {name: [value_in(policy, path) for policy in policies] for name, path in paths.items()}
    types = {name: pl.Int64 if COLUMNS[name].unit == "count" else pl.Float64 for name in paths}
    return pl.DataFrame({"name": [policy["name"] for policy in policies]} | columns, {"name": pl.String} | types)


def _figures(run: Run, lane: AnyLane) -> PolicyFigures:
    layers, duration_s = lane.log.layer, lane.duration_s
    phase_s = [float(np.sum(duration_s[run.schedule.phase == phase])) for phase in (PREFILL, DECODE, MIXED)]
    seconds = total_s(lane)
    turns, edge_s = run.schedule.turns, edges_of(lane)
    times, gaps = request_times(run, edge_s), all_gaps(turns, edge_s)
    hits, misses = int(layers["hits"].sum()), int(layers["misses"].sum())
    return PolicyFigures(
        name=lane.policy.name,
        total_s=seconds,
        prefill_s=phase_s[0],
        decode_s=phase_s[1],
        mixed_s=phase_s[2],
        tokens_per_s=_ratio(int(turns.tokens.sum()), seconds),
        hits=hits,
        misses=misses,
        step_s=_spread(duration_s),
        ttft_s=_spread(times.ttft_s),
        tpot_s=_spread(times.tpot_s),
        hit_rate=_ratio(hits, hits + misses),
        demand_bytes=float(layers["demand_bytes"].sum()),
        prefetch_bytes=lane.prefetch_bytes,
        late=lane.late,
        wasted=int(lane.log.tally["wasted"][0]),
        imbalance_mean=_ratio(float(layers["imbalance_sum"].sum()), int(layers["imbalance_count"].sum())),
        utilization=_utilization(run.system, utilization_of(lane)),
        work_bound_s=float(lane.work_bound_s),  # of plain Python, without a JIT, NumPy's
        clairvoyant_s=None if lane.clairvoyant_s is None else float(lane.clairvoyant_s),
        speedup=None,  # against the first policy
        used=int(lane.log.tally["used"][0]),
        optimal_fallbacks=int(lane.log.fallbacks[0]),
        overhead_s=_overhead_s(run, lane),
        choices=choices_of(lane.policy),
        ttft_max_s=_spread(times.ttft_max_s),
        itl_s=_weighted_spread(gaps),
        request_tokens_per_s=_spread(times.tokens_per_s),
        lower_bound_s=float(lane.lower_bound_s),
        **_host_figures(lane),
        **_losses(lane),
        **_moves(run.system, lane),
        **remote_figures(run.system, lane),
        **_regret(lane),
        cluster=cluster_figures(lane, seconds, _phases(run)) if isinstance(lane, ClusterLane) else msgspec.UNSET,
    )


def _host_figures(lane: AnyLane) -> dict[str, Any]:
    """Return what a lane above a disk has more; nothing of others."""
    host = lane.tiers and lane.tiers.host
    if host is None:
        return {}
    hits, misses, disk_bytes = (host.books[name][0] for name in ("hits", "misses", "disk_bytes"))
    return {
        "host_slots": int(host.cache.capacity[0]),
        "host_hits": int(hits),
        "host_misses": int(misses),
        "host_hit_rate": _ratio(int(hits), int(hits + misses)),
        "disk_bytes": float(disk_bytes),
        "disk_busy": utilization_of(lane)["disk"],
    }


def _losses(lane: AnyLane) -> dict[str, Any]:
    """Bytes that a lossy link sent again, and the share of all gates that it lost; nothing for other links."""
    losses = lane.losses
    if losses is None:
        return {}
    return {
        "resent_bytes": losses.resent_in_bytes + losses.resent_out_bytes,
        "gate_mass_dropped": losses.gate_mass_dropped,
    }


def _moves(system: System, lane: AnyLane) -> dict[str, Any]:
    """Moves between layouts, where a policy lets experts move, and the time of evictions, where they take time."""
    if isinstance(lane, ClusterLane):
        return {}
    found: dict[str, Any] = {}
    tiers = lane.tiers
    if tiers is not None and tiers.layout is not None:
        found["moved_bytes"], found["moved_s"] = (float(each) for each in tiers.layout.moved)
    if system.gpu.evict_us is not None:
        found["evict_s"] = 0.0 if tiers is None else float(tiers.tally["evict_s"][0])
    return found


def _regret(lane: AnyLane) -> dict[str, Any]:
    """The cost of the decisions over those of `optimal`, where that was asked for."""
    if isinstance(lane, ClusterLane) or lane.aside.regret is None:
        return {}
    tally = lane.aside.regret.tally[0]
    return {
        "regret": _ratio(float(tally["excess_s"]), float(tally["optimal_s"])),
        "regret_equal_share": _ratio(int(tally["equal_experts"]), int(tally["experts"])),
        "regret_layers": int(tally["layers"]),
        "regret_left_out": int(tally["left_out"]),
    }


def _overhead_s(run: Run, lane: AnyLane) -> float:
    if isinstance(lane, ClusterLane):
        return lane.overhead_s
    return len(lane.duration_s) * len(lane.log.layer) * run.system.gpu.layer_overhead_s


def _phases(run: Run) -> list[str]:
    """Names of the phases that the trace has."""
    return [PHASE_NAMES[phase] for phase in np.unique(run.schedule.phase)]


def _utilization(system: System, of_part: dict[str, float | None]) -> Utilization:
    """Return busy over total time of each part, and a list for the units at home.

    A part that `Utilization` has no field for is only in `unit_frame`.
    """
    fields = Utilization.__struct_fields__
    shares: dict[str, Any] = dict.fromkeys(fields) | {"ndp": []} | of_part
    if system.home and system.home.is_numbered:
        shares[system.home.name] = [of_part[name] for name in system.home.names]
    if system.cluster is not None:
        known = [share for name in system.cluster.names if (share := of_part[name]) is not None]
        shares["gpu"] = sum(known) / len(known) if known else None
    return Utilization(**{name: shares[name] for name in fields})


def _spread(values: np.ndarray) -> Spread:
    """Mean, quantiles (linear) and maximum of the defined values."""
    values = values[~np.isnan(values)]
    if values.size == 0:
        return Spread(mean=None, p50=None, p95=None, p99=None, max=None)
    p50, p95, p99 = np.quantile(values, QUANTILES).tolist()
    return Spread(mean=float(np.mean(values)), p50=p50, p95=p95, p99=p99, max=float(np.max(values)))


def _weighted_spread(gaps: Gaps) -> Spread:
    """The same of gaps that stand for more than one."""
    seconds, weight = gaps
    if seconds.size == 0:
        return _spread(seconds)
    p50, p95, p99 = weighted_quantiles(seconds, weight)
    mean = float(np.sum(seconds * weight) / np.sum(weight))
    return Spread(mean=mean, p50=p50, p95=p95, p99=p99, max=float(np.max(seconds)))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
