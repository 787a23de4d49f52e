"""How often experts would have been in a cache: LRU, LFU and Belady, over the accesses of a trace, at given capacities.

What counts as an access, and how a victim is found, is in `accesses` and `eviction`; docs/cache.md says it for users.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from moetrace.analyze import eviction
from moetrace.analyze.accesses import Accesses, accesses
from moetrace.analyze.next_use import NextUses
from moetrace.engine.compile import kernel
from moetrace.spec import Model, list_presets, load_model
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.format import Trace
from moetrace.trace.opening import accepts_path
from moetrace.trace.schema import NOT_RECORDED, PHASE_NAMES

POLICIES = {
    "lru": "the expert accessed longest ago",
    "lfu": "the expert accessed least often so far; of several, longest ago",
    "lfu-in-cache": "the expert accessed least often since it was admitted; of several, longest ago",
    "belady": "the expert whose next access is farthest; of several, accessed longest ago",
}
DEFAULT_POLICIES = ("lru", "lfu", "belady")
SCOPES = ("global", "layer")
_RULES = {"lfu": eviction.LFU, "lfu-in-cache": eviction.LFU_IN_CACHE, "belady": eviction.BELADY}
_UNITS = {"B": 1} | {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_UNITS |= {f"{p}IB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
_CAPACITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?((?:[KMGT]I?)?B)?", re.IGNORECASE | re.ASCII)
MAX_CAPACITY = 1 << 60
MAX_KEYS = 1 << 20  # models have 23,000 at most; a damaged file may claim anything
_SCHEMA = {
    "policy": pl.String,
    "capacity": pl.String,
    "capacity_experts": pl.Int64,
    "capacity_bytes": pl.Int64,
    "scope": pl.String,
    "sequential": pl.Boolean,
    "phase": pl.String,
    "accesses": pl.Int64,
    "hits": pl.Int64,
    "hit_rate": pl.Float64,
    "compulsory_misses": pl.Int64,
    "missed_bytes": pl.Int64,
    "recorded_agreement": pl.Float64,
}
# Columns of a lane's totals, [phases, 4].
_HITS, _MISSED_BYTES, _RECORDED, _AGREEING = 0, 1, 2, 3


class Capacity(NamedTuple):
    """What a cache holds at most: so many `unit` ("experts" or "bytes") of all layers together."""

    amount: int
    unit: str
    label: str


class _Lane(NamedTuple):
    """One policy at one capacity on its way through a trace."""

    policy: str
    capacity: Capacity
    state: eviction.RecencyList | eviction.RankedHeap
    totals: np.ndarray  # int64 [phases, 4]


def parse_capacity(text: str | int) -> Capacity:
    """Read a number of experts (`400`) or bytes (`3000MiB`, `3GB`, `1.5 GiB`); raise UsageError for anything else."""
    label = str(text).strip()
    match = _CAPACITY.fullmatch(label)
    if match and match[2]:
        whole, _, fraction = match[1].partition(".")
        scale = _UNITS[match[2].upper()]
        amount = int(whole) * scale + (int(fraction) * scale // 10 ** len(fraction) if fraction else 0)
        capacity = Capacity(amount, "bytes", label)
    elif match and "." not in match[1]:
        capacity = Capacity(int(match[1]), "experts", label)
    else:
        raise UsageError(
            f"the capacity {label!r} is neither a number of experts, as 400, nor of bytes, as 3000MiB or 3GB."
        )
    if not 1 <= capacity.amount <= MAX_CAPACITY:
        raise UsageError(f"the capacity {label!r} is {capacity.amount} {capacity.unit}: give 1 to {MAX_CAPACITY}.")
    return capacity


def expert_bytes(trace: Trace, model: Model | str | Path | None = None) -> np.ndarray | None:
    """Bytes of each expert, int64 [layers, experts]: the trace's own, else those of `model` or the preset it names.

    None if neither is known. Raises UsageError if the model does not have the layers and experts of the trace.
    """
    shape = (trace.layers, trace.num_experts)
    if trace.expert_bytes is not None:
        return np.ascontiguousarray(np.broadcast_to(trace.expert_bytes.reshape(trace.layers, -1), shape))
    if model is None and trace.model not in list_presets("models"):
        return None
    spec = load_model(model if model is not None else trace.model)
    if (spec.moe_layers, spec.experts) != shape:
        raise UsageError(
            f"{trace.path or 'the trace'} has {trace.layers} MoE layers of {trace.num_experts} experts, but the model "
            f"{spec.name} has {spec.moe_layers} of {spec.experts}: name the right one with --model."
        )
    return np.ceil(spec.expert_bytes()).astype(np.int64)


@accepts_path
def cache_hits(
    trace: Trace,
    capacities: Sequence[Capacity | str | int],
    policies: Sequence[str] = DEFAULT_POLICIES,
    *,
    scope: str = "global",
    sequential: bool = False,
    model: Model | str | Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> pl.DataFrame:
    """Replay the accesses of a trace (or the file of one) through caches, in one pass (Belady: two).

    There is a cache for each policy and capacity.

    Caches start empty. With scope "layer" each layer has a cache of its own, of an equal part of the capacity. At once
    (not `sequential`), the experts of one (step, layer) are demanded together, one time each, and none is evicted for
    another of them. `progress` is told the rows of each block.

    Returns a row for each capacity, policy and phase of steps ("all" and, if they occur, "prefill", "decode", "mixed"):
    policy, capacity, capacity_experts or capacity_bytes, scope, sequential, phase, accesses, hits, hit_rate,
    compulsory_misses (first accesses), missed_bytes (null if sizes are unknown), recorded_agreement (of the accesses
    whose residency the engine recorded, the share that hits here and was resident there, or neither; else null).

    Raises UsageError for an unknown policy or scope, or a capacity in bytes where sizes are unknown; MoetraceError if
    the trace is damaged or holds counts only.
    """
    capacities = [c if isinstance(c, Capacity) else parse_capacity(c) for c in capacities]
    sizes = expert_bytes(trace, model)
    _check(trace, capacities, policies, scope, sizes)
    keys, pools = trace.layers * trace.num_experts, trace.layers if scope == "layer" else 1
    size = np.zeros(keys, np.int64) if sizes is None else sizes.reshape(-1)
    lanes = [_lane(policy, capacity, size, pools) for capacity in capacities for policy in policies]
    recorded = "recorded" in trace.has
    counts, seen = np.zeros((len(PHASE_NAMES), 2), np.int64), np.zeros(keys, np.uint8)
    looks_ahead = "belady" in policies
    with NextUses(keys) as next_uses:
        if looks_ahead:
            next_uses.learn(accesses(trace, sequential=sequential))
        for block in accesses(trace, sequential=sequential, recorded=recorded):
            _count(block.key, block.bounds, trace.layers, block.phase, seen, counts)
            next_use = next_uses.of(block) if looks_ahead else np.zeros(0, np.int64)
            hit = np.empty(block.key.size, np.uint8)
            for lane in lanes:
                _advance(lane, block, next_use, trace.layers, sequential, hit)
                _tally(block, hit, size, trace.layers, lane.totals)
            if progress is not None:
                progress(block.rows)
    rows = [row | {"scope": scope, "sequential": sequential} for lane in lanes for row in _rows(lane, counts, sizes)]
    return pl.DataFrame(rows, schema=_SCHEMA)


def _check(
    trace: Trace, capacities: Sequence[Capacity], policies: Sequence[str], scope: str, sizes: np.ndarray | None
) -> None:
    for policy in policies:
        if policy not in POLICIES:
            raise UsageError(f"there is no cache policy {policy!r}; known are {', '.join(POLICIES)}.")
    if scope not in SCOPES:
        raise UsageError(f"there is no scope {scope!r}; known are {', '.join(SCOPES)}.")
    in_bytes = next((capacity for capacity in capacities if capacity.unit == "bytes"), None)
    if in_bytes is not None and sizes is None:
        raise UsageError(
            f"the capacity {in_bytes.label} needs the sizes of experts, but {trace.path or 'the trace'} has no "
            f"/layers/expert_bytes and its model {trace.model!r} is no preset: name one with --model, or give the "
            f"capacity in experts."
        )
    where, choices = trace.path or "the trace", trace.rows * trace.layers * trace.top_k
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


def _lane(policy: str, capacity: Capacity, size: np.ndarray, pools: int) -> _Lane:
    weight = size if capacity.unit == "bytes" else np.ones(size.size, np.int64)
    make = eviction.recency_list if policy == "lru" else eviction.ranked_heap
    state = make(weight, capacity.amount // pools, pools)
    return _Lane(policy, capacity, state, np.zeros((len(PHASE_NAMES), 4), np.int64))


def _advance(
    lane: _Lane, block: Accesses, next_use: np.ndarray, layers: int, sequential: bool, hit: np.ndarray
) -> None:
    if isinstance(lane.state, eviction.RecencyList):
        eviction.evict_by_recency(lane.state, block, layers, sequential, hit)
    else:
        eviction.evict_by_rank(lane.state, _RULES[lane.policy], block, next_use, layers, sequential, hit)


def _rows(lane: _Lane, counts: np.ndarray, sizes: np.ndarray | None) -> list[dict]:
    """The rows of a lane; counts int64 [phases, 2] are accesses and compulsory misses."""
    parts = [("all", lane.totals.sum(0), counts.sum(0))]
    parts += [(name, lane.totals[i], counts[i]) for i, name in enumerate(PHASE_NAMES) if counts[i, 0]]
    capacity = lane.capacity
    return [
        {
            "policy": lane.policy,
            "capacity": capacity.label,
            f"capacity_{capacity.unit}": capacity.amount,
            "phase": name,
            "accesses": int(accessed),
            "hits": int(totals[_HITS]),
            "hit_rate": totals[_HITS] / accessed if accessed else None,
            "compulsory_misses": int(compulsory),
            "missed_bytes": None if sizes is None else int(totals[_MISSED_BYTES]),
            "recorded_agreement": totals[_AGREEING] / totals[_RECORDED] if totals[_RECORDED] else None,
        }
        for name, totals, (accessed, compulsory) in parts
    ]


@kernel
def _count(key, bounds, layers, phase, seen, counts):
    """Add each phase's accesses and first accesses to counts int64 [phases, 2]; seen uint8 [keys] is carried."""
    for step in range(phase.size):
        first = 0
        for i in range(bounds[step * layers], bounds[(step + 1) * layers]):
            first += seen[key[i]] == 0
            seen[key[i]] = 1
        counts[phase[step], 0] += bounds[(step + 1) * layers] - bounds[step * layers]
        counts[phase[step], 1] += first


@kernel
def _tally(block, hit, size, layers, totals):
    """Add each phase's hits, missed bytes, and accesses with a record and agreeing with it, to totals [phases, 4]."""
    for step in range(block.phase.size):
        start, stop = block.bounds[step * layers], block.bounds[(step + 1) * layers]
        hits, missed_bytes, known, agreeing = 0, 0, 0, 0
        for i in range(start, stop):
            hits += hit[i] > 0
            missed_bytes += 0 if hit[i] else size[block.key[i]]
        if block.recorded.size:
            for i in range(start, stop):
                known += block.recorded[i] != NOT_RECORDED
                agreeing += block.recorded[i] != NOT_RECORDED and (block.recorded[i] > 0) == (hit[i] > 0)
        totals[block.phase[step], _HITS] += hits
        totals[block.phase[step], _MISSED_BYTES] += missed_bytes
        totals[block.phase[step], _RECORDED] += known
        totals[block.phase[step], _AGREEING] += agreeing
