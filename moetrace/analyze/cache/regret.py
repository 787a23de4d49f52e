"""Is it the policy or the working set? What Belady's policy would hit more, in points, in time, and as a verdict."""

from pathlib import Path
from typing import NamedTuple

import polars as pl

from moetrace.spec import System, load_system
from moetrace.spec.choices import find
from moetrace.spec.errors import UsageError

YARDSTICK = "belady"
ENOUGH = 0.05  # of all accesses: fewer misses than this, but for first uses, are no failure
POLICY, WORKING_SET, NEITHER = "policy", "working set", "neither"
_CASE = ["capacity", "phase"]


class LinkCost(NamedTuple):
    """What fetching an expert takes: `bytes / bytes_s + latency_s` (timing model, section 2)."""

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
    """Add columns to the frame of `cache_hits`, float64 but for the verdict, null where there is nothing to say.

    regret_points: 100 x (Belady's hit rate - its own), of the same capacity and phase. miss_ms_per_step: time to fetch
    what is missed, one expert after another, on average. regret_ms_per_step: how much more than Belady's. verdict: of
    the capacity and phase, the same for all its policies (see docs/cache.md): "policy", "working set" or "neither".
    """
    own_ms = pl.lit(None, pl.Float64)
    if link is not None:
        misses = pl.col("accesses") - pl.col("hits")
        total_s = pl.col("missed_bytes") / link.bytes_s + misses * link.latency_s
        own_ms = pl.when(pl.col("steps") > 0).then(1e3 * total_s / pl.col("steps"))
    frame = frame.with_columns(miss_ms_per_step=own_ms)

    def belady(name: str) -> pl.Expr:
        return pl.col(name).filter(pl.col("policy") == YARDSTICK).first().over(_CASE)

    frame = frame.with_columns(
        regret_points=100 * (belady("hit_rate") - pl.col("hit_rate")),
        regret_ms_per_step=pl.col("miss_ms_per_step") - belady("miss_ms_per_step"),
        _best=pl.col("hits").filter(~pl.col("policy").is_in(_clairvoyant(frame))).max().over(_CASE),
        _belady=belady("hits"),
        _beyond=belady("capacity_misses"),
    )
    policy = (pl.col("_belady") - pl.col("_best")).clip(0)
    few = policy + pl.col("_beyond") < ENOUGH * pl.col("accesses")
    verdict = pl.when(few).then(pl.lit(NEITHER)).when(policy > pl.col("_beyond")).then(pl.lit(POLICY))
    known = pl.col("_best").is_not_null() & pl.col("_belady").is_not_null() & (pl.col("accesses") > 0)
    frame = frame.with_columns(verdict=pl.when(known).then(verdict.otherwise(pl.lit(WORKING_SET))))
    return frame.drop("_best", "_belady", "_beyond")


def _clairvoyant(frame: pl.DataFrame) -> list[str]:
    """Policies of the frame that know the trace beforehand: no engine has them."""
    return [name for name in frame["policy"].unique().sort() if find("residency", name).knows_future]


def verdict_lines(frame: pl.DataFrame) -> list[str]:
    """Return a sentence for each capacity and phase that there is a verdict on, with its numbers."""
    lines = []
    for (capacity, phase), of in frame.group_by(_CASE, maintain_order=True):
        belady = of.filter(policy=YARDSTICK)
        usable = of.filter(~pl.col("policy").is_in(_clairvoyant(of))).sort("hits", descending=True, maintain_order=True)
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
