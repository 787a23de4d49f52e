"""Policies and budgets that explain a measured hit rate: a search for the capacity at which each reaches it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from moetrace.analyze.cache.hits import Capacity, cache_hits, parse_capacity
from moetrace.analyze.sizes import expert_bytes, own_experts
from moetrace.spec import Model
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.format import Trace
from moetrace.trace.opening import accepts_path

OBSERVED_POLICIES = ("lru", "fifo", "lfu", "lfu-in-cache", "static-prefill", "belady")
RECORDED = "recorded"
_AT_ONCE = 16  # capacities of a pass
_BYTE_STEPS = 1 << 12  # a budget in bytes is found to so small a part of all experts


def parse_rate(text: str) -> float | None:
    """Read a hit rate, `62%` or `0.62`, or `recorded` as None; raise UsageError for anything else."""
    label = text.strip()
    if label == RECORDED:
        return None
    try:
        rate = float(label.removesuffix("%")) / (100 if label.endswith("%") else 1)
    except ValueError:
        rate = np.nan
    if not 0 <= rate <= 1:
        raise UsageError(f"the observed hit rate is {text!r}: give a share, as 62% or 0.62, or recorded.")
    return rate


@accepts_path
def explain_hit_rate(
    trace: Trace,
    observed: float | None,
    policies: Sequence[str] = OBSERVED_POLICIES,
    capacities: Sequence[Capacity | str | int] = (),
    *,
    phase: str = "all",
    scope: str = "global",
    sequential: bool = False,
    model: Model | str | Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> pl.DataFrame:
    """Find the budgets at which cache policies have a hit rate that was measured.

    Args:
        trace: A trace or the path of its file.
        observed: The hit rate, a share; None takes the rate that the trace's engine recorded, in steps of the phase.
        policies: Cache policies that may explain it.
        capacities: Budgets that may explain it, as in `cache_hits`. By default the budget is searched: that of each
            policy whose hit rate is nearest, in experts, or in bytes where experts differ in size.
        phase: The steps that the rate is of: "all", "prefill", "decode" or "mixed".
        scope: "global" or "layer", as in `cache_hits`.
        sequential: Demand experts one access at a time instead of together.
        model: A preset's name, a TOML file or a Model, for sizes.
        progress: A function that gets the number of rows of each block.

    Returns:
        Rows of `cache_hits` of the phase, nearest first (of a recorded rate, those that agree most with the record
        first), with observed_rate, off_points (100 x (its hit rate - the observed one)), capacity_share (of all
        experts, or of their bytes) and budget_bytes (null if sizes are unknown, or differ where it is of experts).

    Raises:
        UsageError: As `cache_hits`.
        MoetraceError: As `cache_hits`; or there are no accesses in steps of the phase, or none is recorded.

    Examples:
        >>> import moetrace as mt
        >>> found = mt.explain_hit_rate("traces/tiny-olmoe.h5", 0.62, ["lru", "belady"], phase="decode")
        >>> found.select("policy", "capacity_experts").rows()
        [('belady', 24), ('lru', 42)]
    """
    how = {"scope": scope, "sequential": sequential, "model": model, "progress": progress}
    search = _BudgetSearch(trace, phase, expert_bytes(trace, model), how)
    if observed is None:
        found = search.rows([search.capacity(search.all)], ["lru"])["recorded_hit_rate"]
        if found[0] is None:
            raise MoetraceError(f"{trace.shown} holds no record of residency in such steps: give the rate as a number.")
        observed, recorded = float(found[0]), True
    else:
        recorded = False
    names, pools = list(dict.fromkeys(policies)), trace.layers if scope == "layer" else 1
    if capacities:
        frame = search.rows([c if isinstance(c, Capacity) else parse_capacity(c) for c in capacities], names)
    else:
        frame = pl.concat([search.nearest(name, observed, pools) for name in names])
    share = pl.when(pl.col("capacity_bytes").is_null()).then(pl.col("capacity_experts") / search.experts)
    share = share.otherwise(pl.col("capacity_bytes") / search.bytes if search.bytes else None)
    budget = pl.col("capacity_bytes")
    if search.bytes is not None and not search.in_bytes:
        budget = pl.coalesce(budget, pl.col("capacity_experts") * (search.bytes // search.experts))
    frame = frame.with_columns(
        observed_rate=pl.lit(observed),
        off_points=100 * (pl.col("hit_rate") - observed),
        capacity_share=share,
        budget_bytes=budget,
    )
    nearest = pl.col("off_points").abs()
    order = [-pl.col("recorded_agreement"), nearest] if recorded else [nearest]
    return frame.sort(*order, "capacity_share", maintain_order=True)


class _BudgetSearch:
    """Hit rates of a trace in steps of one phase, and the capacities that may explain one."""

    def __init__(self, trace: Trace, phase: str, sizes: np.ndarray | None, how: dict) -> None:
        self.trace, self.phase, self.how = trace, phase, how
        has = own_experts(trace)
        self.experts = int(has.sum())
        own = None if sizes is None else sizes[np.arange(trace.num_experts) < has[:, None]]
        self.bytes = None if own is None else int(own.sum())
        self.in_bytes = own is not None and int(own.min()) != int(own.max())
        self.all = self.bytes if self.in_bytes and self.bytes is not None else self.experts

    def capacity(self, amount: int) -> Capacity:
        """Return a capacity in experts, or bytes where experts differ in size."""
        if self.in_bytes:
            return Capacity(amount, "bytes", f"{amount / 2**20:.1f}MiB")
        return Capacity(amount, "experts", str(amount))

    def rows(self, capacities: Sequence[Capacity], policies: Sequence[str]) -> pl.DataFrame:
        """The rows of policies at capacities, of steps of the phase."""
        frame = cache_hits(self.trace, capacities, policies, **self.how).filter(phase=self.phase)
        if frame.is_empty() or frame["hit_rate"].null_count():
            raise MoetraceError(f"{self.trace.shown} has no accesses in {self.phase} steps.")
        return frame

    def nearest(self, policy: str, observed: float, pools: int) -> pl.DataFrame:
        """The row of the policy's capacity whose hit rate is nearest, the least of several.

        By ever finer grids between the last capacity below the rate and the first one that reaches it: a hit rate need
        not grow with the capacity, so this finds one such place, and of all that was tried the nearest.
        """
        unit = max(1, self.all // _BYTE_STEPS) if self.in_bytes else pools
        below, reaches, best = 0, -(-self.all // unit), None
        while reaches - below > 0:
            grid = np.unique(np.linspace(below, reaches, min(_AT_ONCE, reaches - below) + 1).astype(np.int64)[1:])
            capacities = [self.capacity(int(number) * unit) for number in grid.tolist()]
            frame = self.rows(capacities, [policy])
            tried = frame if best is None else pl.concat([best, frame])
            off = (tried["hit_rate"] - observed).abs()
            best = tried[[int(off.arg_min() or 0)]]
            enough = np.flatnonzero(frame["hit_rate"].to_numpy() >= observed)
            if not enough.size or grid.size == reaches - below:
                break
            reaches, below = int(grid[enough[0]]), int(grid[enough[0] - 1]) if enough[0] else below
        assert best is not None
        return best
