"""Is it the policy or the working set? Further hits of Belady's policy, in points, in time, and as a verdict."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import polars as pl

from moetrace.spec import System, load_system
from moetrace.spec.choices import find
from moetrace.spec.errors import UsageError

YARDSTICK = "belady"
ENOUGH = 0.05  # of all accesses: fewer misses than this, without first uses, are no failure
POLICY, WORKING_SET, NEITHER = "policy", "working set", "neither"
_CASE = ["capacity", "phase"]
_COLUMNS = {
    "miss_ms_per_step": pl.Float64,
    "regret_points": pl.Float64,
    "regret_ms_per_step": pl.Float64,
    "verdict": pl.String,
}


class LinkCost(NamedTuple):
    """Time to fetch an expert: `bytes / bytes_s + latency_s` (timing model, section 2)."""

    bytes_s: float
    latency_s: float


def link_of(system: System | str | Path, known: bool) -> LinkCost:
    """Return a system's link; `known` says whether the sizes of experts are.

    Raises UsageError if they are not, or if the system has no link.
    """
    spec = system if isinstance(system, System) else load_system(system)
    if spec.link is None:
        raise UsageError(f"system {spec.name} has no link over which experts could be fetched: name another one.")
    if not known:
        raise UsageError("--system needs the sizes of experts, which the trace does not have: name a --model.")
    return LinkCost(spec.link.bytes_s, spec.link.latency_s)


def with_regret(frame: pl.DataFrame, link: LinkCost | None) -> pl.DataFrame:
    """Add columns to the frame of `cache_hits`, float64 except the verdict, null if undefined.

    regret_points: 100 x (Belady's hit rate - its own), of the same capacity and phase. miss_ms_per_step: time to fetch
    the missed experts, one after another, on average. regret_ms_per_step: how much more than Belady's. verdict: of the
    capacity and phase, the same for all its policies (see docs/cache.md): "policy", "working set" or "neither".
    """
    rows, of_case = frame.rows(named=True), {}
    for row in rows:
        case = of_case.setdefault(tuple(row[name] for name in _CASE), {})
        case.setdefault(row["policy"], row)
        ms = None
        if link is not None and row["steps"] > 0 and row["missed_bytes"] is not None:
            total_s = row["missed_bytes"] / link.bytes_s + (row["accesses"] - row["hits"]) * link.latency_s
            ms = 1e3 * total_s / row["steps"]
        row["miss_ms_per_step"] = ms
    verdicts = {case: _verdict(of) for case, of in of_case.items()}
    found = []
    for row in rows:
        case, ms = tuple(row[name] for name in _CASE), row["miss_ms_per_step"]
        belady = of_case[case].get(YARDSTICK, {})
        points = _less(belady.get("hit_rate"), row["hit_rate"], 100.0)
        found.append((ms, points, _less(ms, belady.get("miss_ms_per_step"), 1.0), verdicts[case]))
    return frame.hstack(pl.DataFrame(found, _COLUMNS, orient="row"))


def _less(a: float | None, b: float | None, unit: float) -> float | None:
    return None if a is None or b is None else unit * (a - b)


def _verdict(of: dict[str, dict]) -> str | None:
    """Return the verdict on a capacity and phase, from the row of each policy; None if undefined."""
    usable, belady = [of[name]["hits"] for name in _usable(of)], of.get(YARDSTICK)
    if belady is None or not usable or not belady["accesses"]:
        return None
    policy, beyond = max(0, belady["hits"] - max(usable)), belady["capacity_misses"]
    if policy + beyond < ENOUGH * belady["accesses"]:
        return NEITHER
    return POLICY if policy > beyond else WORKING_SET


def _usable(policies: Iterable[str]) -> list[str]:
    """Policies that an engine may have: those that do not know the trace in advance."""
    return [name for name in dict.fromkeys(policies) if not find("residency", name).knows_future]


def verdict_lines(frame: pl.DataFrame) -> list[str]:
    """Return a sentence for each capacity and phase that there is a verdict on, with its numbers."""
    lines = []
    for (capacity, phase), of in frame.group_by(_CASE, maintain_order=True):
        belady = of.filter(policy=YARDSTICK)
        usable = of.filter(pl.col("policy").is_in(_usable(of["policy"]))).sort(
            "hits", descending=True, maintain_order=True
        )
        if of["verdict"][0] is None:
            continue
        best, accessed = usable.row(0, named=True), of["accesses"][0]
        share = {
            "first uses": best["compulsory_misses"],
            "the working set's": belady["capacity_misses"][0],
            "the policy's": max(0, belady["hits"][0] - best["hits"]),
        }
        parts = ", ".join(f"{100 * count / accessed:.1f} {name}" for name, count in share.items())
        title = {POLICY: "policy failure", WORKING_SET: "working-set failure", NEITHER: "neither failure"}
        missed = 100 * (accessed - best["hits"]) / accessed
        lines.append(
            f"{capacity}, {phase} steps: {title[of['verdict'][0]]}. {best['policy']}, the best here, misses "
            f"{missed:.1f} %: {parts}."
        )
    return lines
