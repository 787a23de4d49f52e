"""How often experts would have been in a cache: LRU, LFU and Belady, over the accesses of a trace, at given capacities.

The definition of an access is in `accesses`, that of a victim in `eviction`; docs/cache.md explains both to users.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from moetrace.analyze.cache import eviction
from moetrace.analyze.cache.accesses import accesses
from moetrace.analyze.cache.kernels.replays import Budget, Demands, Replay, make_replay
from moetrace.analyze.cache.kernels.static import count_accesses
from moetrace.analyze.cache.next_use import NextUses
from moetrace.analyze.cache.parted import by_layer_replay, cold_replay
from moetrace.analyze.cache.regret import link_of, with_regret
from moetrace.analyze.cache.tally import (
    AGREEING,
    HITS,
    MISSED_BYTES,
    QUANTILES,
    RECORDED,
    RECORDED_HITS,
    WHOLE_ROWS,
    WHOLE_STEPS,
    DemandCounts,
    HitTally,
    RequestGroups,
    WholeRows,
    count_demand,
    count_hits,
    intervals,
    no_demand,
    no_tally,
    owners_of,
    quantiles,
    requests_of,
)
from moetrace.analyze.sizes import expert_bytes, own_experts
from moetrace.engine.cold import cold_steps
from moetrace.engine.layer_slots import first_counts, layer_slots
from moetrace.engine.schedule import schedule_of
from moetrace.engine.static_set import most_demanded
from moetrace.spec import Model, System
from moetrace.spec.budget import parse_amount
from moetrace.spec.choices import CachePolicy, cache_policies, cache_policy
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.forks import refuse_if_forked
from moetrace.spec.named import nearest
from moetrace.trace.format import Trace
from moetrace.trace.opening import accepts_path
from moetrace.trace.schema import PHASE_NAMES

DEFAULT_POLICIES = ("lru", "lfu", "belady")
SCOPES = ("global", "layer", "request")
MAX_CAPACITY = 1 << 60
_BLOCK_IDS = 1 << 19  # of a block, whose accesses and hits then stay in the caches
MAX_KEYS = 1 << 20  # models have 23,000 at most; a damaged file may claim anything
_SCHEMA = {
    "policy": pl.String,
    "capacity": pl.String,
    "capacity_experts": pl.Int64,
    "capacity_bytes": pl.Int64,
    "scope": pl.String,
    "sequential": pl.Boolean,
    "phase": pl.String,
    "steps": pl.Int64,
    "accesses": pl.Int64,
    "hits": pl.Int64,
    "hit_rate": pl.Float64,
    "hit_rate_low": pl.Float64,
    "hit_rate_high": pl.Float64,
    "compulsory_misses": pl.Int64,
    "capacity_misses": pl.Int64,
    "missed_bytes": pl.Int64,
    "step_misses_p50": pl.Int64,
    "step_misses_p95": pl.Int64,
    "step_misses_p99": pl.Int64,
    "all_resident_rows": pl.Float64,
    "all_resident_steps": pl.Float64,
    "recorded_hit_rate": pl.Float64,
    "recorded_agreement": pl.Float64,
}


class Capacity(NamedTuple):
    """The limit of a cache: a number of `unit` ("experts" or "bytes") of all layers together."""

    amount: int
    unit: str
    label: str


class Asked(NamedTuple):
    """The checked arguments of `cache_hits`."""

    capacities: list[Capacity]
    policies: dict[str, CachePolicy]
    scope: str
    sequential: bool
    sizes: np.ndarray | None  # int64 [layers, experts]: bytes, if known
    budget: str | None = None  # option that sets each layer's number of cached experts; None: the same number in each


def parse_capacity(text: str | int) -> Capacity:
    """Read a number of experts (`400`) or bytes (`3000MiB`, `3GB`, `1.5 GiB`); raise UsageError for anything else."""
    label = str(text).strip()
    amount = parse_amount(label)
    if amount is None or amount[2] == "%":
        raise UsageError(
            f"the capacity {label!r} is neither a number of experts, as 400, nor of bytes, as 3000MiB or 3GB."
        )
    capacity = Capacity(amount[0] // amount[1], "bytes" if amount[2] else "experts", label)
    if not 1 <= capacity.amount <= MAX_CAPACITY:
        bound = "at least 1" if capacity.amount < 1 else f"at most {MAX_CAPACITY}"
        raise UsageError(f"the capacity {label!r} is {capacity.amount} {capacity.unit}: give {bound}.")
    return capacity


@accepts_path
def cache_hits(
    trace: Trace,
    capacities: Sequence[Capacity | str | int],
    policies: Sequence[str] = DEFAULT_POLICIES,
    *,
    scope: str = "global",
    budget: str | Path | None = None,
    sequential: bool = False,
    model: Model | str | Path | None = None,
    system: System | str | Path | None = None,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> pl.DataFrame:
    """Replay the accesses of a trace through a cache for each policy and capacity.

    docs/cache.md defines accesses, hits and policies. Caches start empty. The experts of one (step, layer) are demanded
    together, one time each, and none is evicted for another of them. One pass over the trace does it; belady and
    static-hindsight need another one before.

    Args:
        trace: A trace or the path of its file.
        capacities: Sizes of the cache, over all layers together: experts (48) or bytes ("100MB", "3GiB").
        policies: Cache policies, which docs/cache.md lists. By default lru, lfu and belady.
        scope: "global" is one cache; "layer" gives each layer its own, of an equal part of the capacity; "request" is
            one cache that is emptied, and forgets, whenever no request is under way.
        budget: With scope "layer", how many experts each layer's cache holds: a CSV file with a number a line, or
            "auto", which goes by the choices of the first prompts.
        sequential: Demand experts one access at a time instead of together.
        model: A preset's name, a TOML file or a Model, for the sizes of experts that the trace does not hold. By
            default the preset that the trace names.
        system: A preset's name, a TOML file or a System, whose link prices misses. By default none.
        seed: Seed of the bootstrap.
        progress: A function that gets the number of rows of each block.

    Returns:
        A frame with a row for each capacity, policy and phase of steps ("all" and, if they occur, "prefill", "decode",
        "mixed"). The columns are:

        - policy, capacity, capacity_experts or capacity_bytes, scope, sequential, phase, steps, accesses, hits;
        - hit_rate, with its 95 % confidence interval over requests (hit_rate_low, hit_rate_high; null for one request);
        - compulsory_misses (first accesses) and capacity_misses (the others);
        - missed_bytes, null if sizes are unknown;
        - step_misses_p50, step_misses_p95, step_misses_p99;
        - all_resident_rows and all_resident_steps: the shares of the rows and steps whose choices all hit;
        - recorded_hit_rate: the share of the accesses that were resident by the engine's own record;
        - recorded_agreement: the share of the accesses whose residency the engine recorded that hit here and there, or
          miss in both; null without a record;
        - regret_points, miss_ms_per_step, regret_ms_per_step and verdict (docs/cache.md, "Policy or working set?").

    Raises:
        UsageError: A policy or scope is unknown, a system has no link, sizes are unknown and a capacity in bytes or
            a system needs them, or a budget does not go with scope or capacity.
        MoetraceError: The trace is damaged or holds only counts.

    Examples:
        >>> import moetrace as mt
        >>> frame = mt.cache_hits("traces/tiny-olmoe.h5", [48], ["lru", "belady"])
        >>> frame.filter(phase="decode").select("policy", "hits").rows()
        [('lru', 111204), ('belady', 141689)]
    """
    refuse_if_forked()
    sizes = expert_bytes(trace, model)
    parsed = [c if isinstance(c, Capacity) else parse_capacity(c) for c in capacities]
    asked = Asked(parsed, _known(policies), scope, sequential, sizes, None if budget is None else str(budget))
    _check(trace, asked)
    link = None if system is None else link_of(system, known=sizes is not None)
    requests = requests_of(trace)
    demand, tallies = _replay(trace, asked, requests, progress)
    frame = pl.DataFrame(_rows(asked, demand, tallies, seed), schema=_SCHEMA)
    return with_regret(frame, link)


@accepts_path
def hindsight_set(
    trace: Trace,
    capacity: Capacity | str | int,
    *,
    scope: str = "global",
    sequential: bool = False,
    model: Model | str | Path | None = None,
) -> np.ndarray:
    """The experts that policy static-hindsight keeps.

    Args:
        trace: A trace or the path of its file.
        capacity: Size of the cache, as in `cache_hits`.
        scope: "global" or "layer".
        sequential: Demand experts one access at a time instead of together.
        model: A preset's name, a TOML file or a Model, for sizes.

    Returns:
        int64 [n, 2] of layer and expert, in that order.

    Raises:
        UsageError: As `cache_hits`.
        MoetraceError: As `cache_hits`.
    """
    parsed = capacity if isinstance(capacity, Capacity) else parse_capacity(capacity)
    asked = Asked([parsed], _known(["static-hindsight"]), scope, sequential, expert_bytes(trace, model))
    _check(trace, asked)
    keys, pools = trace.layers * trace.num_experts, trace.layers if scope == "layer" else 1
    weight = np.ones(keys, np.int64)
    if parsed.unit == "bytes":
        assert asked.sizes is not None
        weight = np.ascontiguousarray(asked.sizes.reshape(-1))
    count = count_accesses(accesses(trace, sequential=sequential), keys)
    kept = np.flatnonzero(most_demanded(count, weight, parsed.amount // pools, pools))
    return np.stack(np.divmod(kept, trace.num_experts), 1)


def _replay(
    trace: Trace, asked: Asked, requests: RequestGroups, progress: Callable[[int], object] | None
) -> tuple[DemandCounts, dict[str, list[HitTally]]]:
    """Return the demand, and the hits of each policy at each capacity."""
    keys, pools = trace.layers * trace.num_experts, trace.layers if asked.scope == "layer" else 1
    size = np.zeros(keys, np.int64) if asked.sizes is None else asked.sizes.reshape(-1)
    count, block_rows = np.zeros(0, np.int64), max(1, _BLOCK_IDS // (trace.layers * trace.top_k))
    needs = asked.policies.values()
    if any(policy.totals for policy in needs):
        count = count_accesses(accesses(trace, sequential=asked.sequential, block_rows=block_rows), keys)
    choices = trace.rows * trace.top_k
    demands = Demands(trace.layers, trace.num_experts, size, pools, asked.sequential, choices, count)
    budgets = [Budget(capacity.amount // pools, capacity.unit == "bytes") for capacity in asked.capacities]
    replays = _replays(trace, asked, budgets, demands)
    tallies = {policy: [no_tally(requests.groups) for _ in budgets] for policy in asked.policies}
    demand = no_demand(keys, requests.groups)
    looks_ahead = any(policy.next_use for policy in needs)
    each = size[:1] if (size == size[0]).all() else size
    with NextUses(keys) as next_uses:
        if looks_ahead:
            next_uses.learn(accesses(trace, sequential=asked.sequential, block_rows=block_rows))
        wanted = {
            "recorded": "recorded" in trace.has,
            "rows": True,
            "chosen_by": any(policy.row_counts for policy in needs),
        }
        for block in accesses(trace, sequential=asked.sequential, block_rows=block_rows, **wanted):
            owners = owners_of(block, requests.group_of(block.request), trace.layers)
            count_demand(demand, block, owners, trace.num_experts)
            next_use = next_uses.of(block) if looks_ahead else np.zeros(0, np.int64)
            whole = WholeRows(block, owners, trace.num_experts, asked.sequential, len(replays) * len(budgets))
            for policy, replay in replays.items():
                for tally, hit in zip(tallies[policy], replay(block, next_use), strict=True):
                    count_hits(tally, block, hit, each, owners)
                    whole.add(tally, hit)
            whole.count()
            if progress is not None:
                progress(block.rows)
    return demand, tallies


def _replays(trace: Trace, asked: Asked, budgets: list[Budget], demands: Demands) -> dict[str, Replay]:
    """Return what replays each policy."""
    if asked.budget is not None:
        exists = np.arange(trace.num_experts) < own_experts(trace)[:, None]
        counts = cache(partial(first_counts, trace))
        amounts = [layer_slots(asked.budget, counts, capacity.amount, exists) for capacity in asked.capacities]
        return {
            name: by_layer_replay(partial(make_replay, policy, demands=demands), amounts, trace.layers, demands.experts)
            for name, policy in asked.policies.items()
        }
    if asked.scope == "request":
        cold = cold_steps(schedule_of(trace).requests, trace.steps)
        return {
            name: cold_replay(partial(make_replay, policy, budgets, demands), cold, trace.layers)
            for name, policy in asked.policies.items()
        }
    return {name: make_replay(policy, budgets, demands) for name, policy in asked.policies.items()}


def _known(names: Sequence[str]) -> dict[str, CachePolicy]:
    """Return the records of policies, each once; raise UsageError for one that there is not."""
    known = {}
    for name in names:
        policy = cache_policy(name)
        if policy is None:
            names = list(cache_policies())
            raise UsageError(f"there is no cache policy {name!r}{nearest(name, names)}; known are {', '.join(names)}.")
        known[name] = policy
    return known


def _check(trace: Trace, asked: Asked) -> None:
    for name, policy in asked.policies.items():
        if policy.one_at_a_time and not (asked.sequential and all(c.unit == "experts" for c in asked.capacities)):
            raise UsageError(
                f"{name} is defined one access at a time and for equal sizes: use --sequential, and "
                f"capacities in experts."
            )
    if asked.budget is not None and (asked.scope != "layer" or any(c.unit == "bytes" for c in asked.capacities)):
        raise UsageError("a budget gives each layer's cache experts: use scope layer, and capacities in experts.")
    check_trace(trace, asked.capacities, asked.scope, asked.sizes)


def check_trace(
    trace: Trace,
    capacities: Sequence[Capacity],
    scope: str,
    sizes: np.ndarray | None,
    scopes: Sequence[str] = SCOPES,
) -> None:
    """Raise UsageError or MoetraceError if caches of these capacities cannot be replayed over a trace."""
    if scope not in scopes:
        raise UsageError(f"there is no scope {scope!r}; known are {', '.join(scopes)}.")
    in_bytes = next((capacity for capacity in capacities if capacity.unit == "bytes"), None)
    if in_bytes is not None and sizes is None:
        raise UsageError(
            f"the capacity {in_bytes.label} needs the sizes of experts, but {trace.shown} has no "
            f"/layers/expert_bytes and its model {trace.model!r} is no preset: name one with --model, or give the "
            f"capacity in experts."
        )
    where, choices = trace.shown, trace.rows * trace.layers * trace.top_k
    if trace.layers * (trace.num_experts + 1) > MAX_KEYS:
        raise MoetraceError(
            f"{where} has {trace.layers} x {trace.num_experts} experts; caches take {MAX_KEYS} at most."
        )
    if trace.rows >= eviction.MAX_COUNT or choices >= 1 << eviction.TOUCHED_BITS:
        raise MoetraceError(f"{where} has {trace.rows} rows and {choices} choices, more than LFU counts exactly.")
    if sizes is not None and int(sizes.max()) * choices >= 2**63:
        raise MoetraceError(
            f"{where} has experts of {sizes.max()} bytes: missed bytes would be more than can be counted."
        )


def _rows(asked: Asked, demand: DemandCounts, tallies: dict[str, list[HitTally]], seed: int) -> list[dict]:
    """The rows of the frame: of each capacity, policy and phase."""
    phases = [("all", list(range(len(PHASE_NAMES))))]
    phases += [(name, [number]) for number, name in enumerate(PHASE_NAMES) if demand.counts[number, 0]]
    rows, hits, group_accesses = [], [], []
    for place, capacity in enumerate(asked.capacities):
        for policy in asked.policies:
            for name, numbers in phases:
                rows.append(_row(demand, tallies[policy][place], numbers) | {"policy": policy, "phase": name})
                rows[-1] |= {"capacity": capacity.label, f"capacity_{capacity.unit}": capacity.amount}
                rows[-1] |= {"scope": asked.scope, "sequential": asked.sequential}
                rows[-1]["missed_bytes"] = None if asked.sizes is None else rows[-1]["missed_bytes"]
                hits.append(tallies[policy][place].group_hits[numbers].sum(0))
                group_accesses.append(demand.group_accesses[numbers].sum(0))
    if rows:
        for row, low, high in zip(rows, *intervals(np.array(hits), np.array(group_accesses), seed), strict=True):
            known = not np.isnan(low)
            row |= {"hit_rate_low": float(low) if known else None, "hit_rate_high": float(high) if known else None}
    return rows


def _row(demand: DemandCounts, tally: HitTally, phases: list[int]) -> dict:
    accessed, compulsory, steps, choosing_rows, choosing_steps = (int(n) for n in demand.counts[phases].sum(0))
    totals = tally.totals[phases].sum(0)
    return {
        "steps": steps,
        "accesses": accessed,
        "hits": int(totals[HITS]),
        "hit_rate": totals[HITS] / accessed if accessed else None,
        "compulsory_misses": compulsory,
        "capacity_misses": accessed - compulsory - int(totals[HITS]),
        "missed_bytes": int(totals[MISSED_BYTES]),
        "all_resident_rows": totals[WHOLE_ROWS] / choosing_rows if choosing_rows else None,
        "all_resident_steps": totals[WHOLE_STEPS] / choosing_steps if choosing_steps else None,
        "recorded_hit_rate": totals[RECORDED_HITS] / totals[RECORDED] if totals[RECORDED] else None,
        "recorded_agreement": totals[AGREEING] / totals[RECORDED] if totals[RECORDED] else None,
        **{
            f"step_misses_p{q}": value for q, value in zip(QUANTILES, quantiles(tally.step_misses(phases)), strict=True)
        },
    }
