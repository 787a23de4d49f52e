"""The figures of a whole replay, one set a policy: what `summary.json` holds (schema `moetrace.result/1`)."""

import math
from typing import Any

import numpy as np
import polars as pl

from moetrace.engine.run import Lane, Run
from moetrace.jit.fingerprint import room_fingerprint
from moetrace.results.frames import request_times, total_s, unit_frame
from moetrace.spec import PolicySpec, System, canonical
from moetrace.trace import Trace
from moetrace.trace.schema import DECODE, MIXED, PREFILL
from moetrace.version import __version__

SCHEMA = "moetrace.result/1"
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


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
    requests = run.schedule.requests
    counts = {
        "requests": len(requests.id),
        "prefill_rows": int(requests.prompt_rows.sum()),
        "decode_rows": int(requests.output_rows.sum()),
    }
    return {
        "schema": SCHEMA,
        "moetrace": __version__,
        "engine": room_fingerprint("engine"),
        "trace": trace | counts,
        "model": canonical(run.model),
        "system": canonical(run.system),
        "slots": run.slots,
        "policies": policies,
    }


def policy_figures(run: Run) -> list[dict[str, Any]]:
    """Return the figures of each policy, in order; seconds, bytes, counts and ratios, None where undefined."""
    units = {name: rows for (name,), rows in unit_frame(run).partition_by("policy", as_dict=True).items()}
    figures = [_figures(run, lane, units[lane.policy.name]) for lane in run.lanes]
    for each in figures:
        each["speedup"] = _ratio(figures[0]["total_s"], each["total_s"])
    return figures


def choices_of(policy: PolicySpec) -> dict[str, Any]:
    """Return what a policy chose, with the parameters that apply."""
    return {field: value for field, value in canonical(policy).items() if field not in ("name", *policy.unread)}


def summary_frame(policies: list[dict[str, Any]]) -> pl.DataFrame:
    """Return one row a policy; nested figures get names like `ttft_s_p50`, `utilization_ndp` is the units' mean."""
    rows = []
    for policy in policies:
        row = {}
        for name, value in policy.items():
            if name == "choices":
                continue
            if isinstance(value, dict):
                row |= {f"{name}_{part}": _mean(inner) for part, inner in value.items()}
            else:
                row[name] = value
        rows.append(row)
    counts = {"hits", "misses", "late", "wasted", "used", "optimal_fallbacks"}
    types = {name: pl.Int64 if name in counts else pl.Float64 for name in rows[0]} | {"name": pl.String}
    return pl.DataFrame(rows, schema=types)


def _figures(run: Run, lane: Lane, units: pl.DataFrame) -> dict[str, Any]:
    log, layers = lane.log.step, lane.log.layer
    duration_s = np.ascontiguousarray(log["duration_s"])
    phase_s = [float(np.sum(duration_s[run.schedule.phase == phase])) for phase in (PREFILL, DECODE, MIXED)]
    seconds = total_s(lane)
    times = request_times(run, lane)
    hits, misses = int(layers["hits"].sum()), int(layers["misses"].sum())
    return {
        "name": lane.policy.name,
        "total_s": seconds,
        "prefill_s": phase_s[0],
        "decode_s": phase_s[1],
        "mixed_s": phase_s[2],
        "tokens_per_s": _ratio(int(run.schedule.requests.output_rows.sum()), seconds),
        "hits": hits,
        "misses": misses,
        "step_s": _spread(duration_s),
        "ttft_s": _spread(times.ttft_s),
        "tpot_s": _spread(times.tpot_s),
        "hit_rate": _ratio(hits, hits + misses),
        "demand_bytes": float(layers["demand_bytes"].sum()),
        "prefetch_bytes": float(np.sum(log["prefetch_bytes"])),
        "late": int(np.sum(log["late"])),
        "wasted": int(lane.log.tally["wasted"][0]),
        "imbalance_mean": _ratio(float(layers["imbalance_sum"].sum()), int(layers["imbalance_count"].sum())),
        "utilization": _utilization(run.system, dict(zip(units["unit"], units["utilization"], strict=True))),
        "work_bound_s": float(run.work_bound_s),  # of plain Python, without a JIT, NumPy's
        "clairvoyant_s": float(lane.clairvoyant_s),
        "speedup": None,  # against the first policy
        "used": int(lane.log.tally["used"][0]),
        "optimal_fallbacks": int(lane.log.fallbacks[0]),
        "choices": choices_of(lane.policy),
    }


def _utilization(system: System, of_part: dict[str, float | None]) -> dict[str, Any]:
    """Return busy over total time of each part; of units at home, a list."""
    found: dict[str, Any] = dict(of_part)
    home = system.home
    units = [found.pop(name) for name in home.names] if home else []
    ordered = {system.accelerator.name: found.pop(system.accelerator.name), home.name if home else "ndp": units}
    cpu = found.pop("cpu")
    return {**ordered, **found, "cpu": cpu}


def _spread(values: np.ndarray) -> dict[str, float | None]:
    """Mean, quantiles (linear) and maximum of what is defined."""
    values = values[~np.isnan(values)]
    if values.size == 0:
        return {"mean": None, **dict.fromkeys(QUANTILES), "max": None}
    quantiles = np.quantile(values, list(QUANTILES.values())).tolist()
    return {
        "mean": float(np.mean(values)),
        **dict(zip(QUANTILES, quantiles, strict=True)),
        "max": float(np.max(values)),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(value: Any) -> float | None:
    """The value itself, or the mean of a list of them, None where there is none."""
    if not isinstance(value, list):
        return value
    return math.fsum(value) / len(value) if value and None not in value else None
