"""The value of prefetch predictors to an LRU cache of experts; `predictors` and docs/prefetch.md define all figures."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from moetrace.analyze.cache.accesses import accesses
from moetrace.analyze.cache.eviction import recency_list
from moetrace.analyze.cache.hits import Capacity, check_trace, parse_capacity
from moetrace.analyze.prefetch import predictors
from moetrace.analyze.prefetch.predictors import Costs, Predictor
from moetrace.analyze.sizes import expert_bytes, model_of
from moetrace.spec import Model, System, load_system
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.forks import refuse_if_forked
from moetrace.spec.named import nearest
from moetrace.trace.format import Trace
from moetrace.trace.opening import accepts_path
from moetrace.trace.schema import PHASE_NAMES, Block, absent_id, check_ids

PREDICTORS = {
    "last-token": "the experts of the layer's last event, the last one first",
    "frequency": "the experts that the layer demanded most often so far",
    "ewma": "the same, but the weight of an access is multiplied by 0.7 with each step that passes",
    "transition": "the experts that follow those of the layer before most often, in other requests",
    "recorded": "what the engine recorded as prefetched",
    "oracle": "the experts that will be demanded, each with the probability --recall",
}
DEFAULT_PREDICTORS = ("last-token", "frequency", "ewma", "transition", "oracle")
_KINDS = {
    "last-token": predictors.LAST_TOKEN,
    "transition": predictors.TRANSITION,
    "recorded": predictors.RECORDED,
    "oracle": predictors.ORACLE,
}
_GROWTH = {"ewma": 1 / 0.7}
_MOST_SHARES = 1 << 28  # in the table of transitions: a gigabyte
_SCHEMA = {
    "predictor": pl.String,
    "capacity": pl.String,
    "scope": pl.String,
    "phase": pl.String,
    "named": pl.Int64,
    "demanded": pl.Int64,
    "recall": pl.Float64,
    "precision": pl.Float64,
    "misses": pl.Int64,
    "covered_misses": pl.Int64,
    "timely_hits": pl.Int64,
    "displaced": pl.Float64,
    "prefetched_bytes": pl.Int64,
    "wasted_bytes": pl.Int64,
}


@accepts_path
def prefetch_value(
    trace: Trace,
    capacity: Capacity | str | int,
    names: Sequence[str] = DEFAULT_PREDICTORS,
    *,
    scope: str = "global",
    most: int | None = None,
    ahead: int = 1,
    recall: float = 0.9,
    seed: int = 0,
    model: Model | str | Path | None = None,
    system: System | str | Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> pl.DataFrame:
    """Let predictors name the experts of each event some layers before it, beside an LRU cache.

    docs/prefetch.md defines events, predictors and what counts as timely. The experts of one event are demanded
    together.

    Args:
        trace: A trace or the path of its file.
        capacity: Size of the cache, over all layers together: experts (48) or bytes ("100MB").
        names: Predictors, which docs/prefetch.md lists. By default all except "recorded".
        scope: "global" is one cache; "layer" gives each layer its own, of an equal part of the capacity.
        most: How many experts a predictor names for an event. By default the trace's top_k. "oracle" and "recorded"
            name any number.
        ahead: How many layers before the event it is named, from 1 to the trace's layers.
        recall: Chance with which "oracle" names a demanded expert, from 0 to 1.
        seed: Seed of the oracle.
        model: A preset's name, a TOML file or a Model, for sizes and times. By default the preset that the trace names.
        system: A preset's name, a TOML file or a System, whose link decides which fetches are in time. By default none.
        progress: A function that gets the number of rows of each block.

    Returns:
        A frame with a row for each predictor and phase of steps. The columns are:

        - predictor, capacity, scope, phase, named, demanded, recall;
        - precision, null for "recorded", of which only hits are known;
        - misses (without prefetch) and covered_misses (the named ones);
        - timely_hits, those that arrive before they are demanded; null without a system;
        - displaced, timely_hits / misses; without a system covered_misses / misses;
        - prefetched_bytes and wasted_bytes (prefetched and not demanded), null if sizes are unknown.

    Raises:
        UsageError: A predictor or scope is unknown, a number is out of range, a system has no link, or sizes or the
            model are unknown.
        MoetraceError: The trace is damaged, holds only counts, or has no record for "recorded".

    Examples:
        >>> import moetrace as mt
        >>> frame = mt.prefetch_value("traces/tiny-olmoe.h5", 48, ["transition", "oracle"], recall=0.8)
        >>> for name, recall in frame.filter(phase="decode").select("predictor", "recall").rows():
        ...     print(f"{name} {recall:.2f}")
        transition 0.47
        oracle 0.80
    """
    refuse_if_forked()
    sizes = expert_bytes(trace, model)
    limit = capacity if isinstance(capacity, Capacity) else parse_capacity(capacity)
    check_trace(trace, [limit], scope, sizes, ("global", "layer"))
    _check(trace, names, most, ahead, recall)
    costs = _costs(trace, sizes, model, system)
    pools = trace.layers if scope == "layer" else 1
    weight = costs.size if limit.unit == "bytes" else np.ones(costs.size.size, np.int64)
    most = min(trace.top_k if most is None else most, trace.num_experts)
    share = _transitions(trace, ahead) if "transition" in names else np.zeros((2, 0, 0, 0), np.float32)
    runs = {
        name: (
            _predictor(trace, name, most, ahead, recall, seed, share),
            recency_list(weight, limit.amount // pools, pools),
            predictors.scratch(trace.layers, trace.num_experts, ahead),
            np.zeros((len(PHASE_NAMES), predictors.COLUMNS), np.int64),
        )
        for name in dict.fromkeys(names)
    }
    absent = absent_id(trace.num_experts)
    whole = accesses(trace, sequential=False, recorded="recorded" in names)
    for routed, block in zip(_checked(trace), whole, strict=True):
        offset = np.ascontiguousarray(routed.offset, np.int64)
        routing = predictors.Routing(routed.experts, offset, _half(block.request), absent, routed.first_step)
        for predictor, cache, scratch, totals in runs.values():
            predictors.replay_predictor(predictor, cache, costs, scratch, block, routing, totals)
        if progress is not None:
            progress(block.rows)
    rows = [
        row | {"predictor": name, "capacity": limit.label, "scope": scope}
        for name, (*_, totals) in runs.items()
        for row in _rows(totals, name, sizes is not None, system is not None)
    ]
    return pl.DataFrame(rows, schema=_SCHEMA)


def _check(trace: Trace, names: Sequence[str], most: int | None, ahead: int, recall: float) -> None:
    for name in names:
        if name not in PREDICTORS:
            raise UsageError(
                f"there is no predictor {name!r}{nearest(name, list(PREDICTORS))}; known are {', '.join(PREDICTORS)}."
            )
    if most is not None and most < 1:
        raise UsageError(f"a predictor cannot name {most} experts: give 1 or more.")
    if not 1 <= ahead <= trace.layers:
        raise UsageError(f"experts cannot be named {ahead} layers ahead: give 1 to {trace.layers}, a step.")
    if not 0 <= recall <= 1:
        raise UsageError(f"the oracle's recall is {recall}, but must be from 0 to 1.")
    if "recorded" in names and "recorded" not in trace.has:
        raise MoetraceError(f"{trace.shown} has no /recorded/resident: leave out the predictor recorded.")
    if "transition" in names and 2 * trace.layers * trace.num_experts**2 > _MOST_SHARES:
        raise MoetraceError(
            f"{trace.shown} has {trace.layers} x {trace.num_experts} experts, too many for a table of "
            f"transitions: leave out the predictor transition."
        )


def _checked(trace: Trace) -> Iterator[Block]:
    """The blocks of a trace; raises MoetraceError before the first that has an impossible id."""
    for block in trace.blocks():
        check_ids(
            trace.shown,
            int(trace.offset[block.first_step]),
            block.experts,
            trace.num_experts,
        )
        yield block


def _half(request: np.ndarray) -> np.ndarray:
    return (request % 2).astype(np.uint8)


def _transitions(trace: Trace, ahead: int) -> np.ndarray:
    """Shares of what follows each expert `ahead` layers later, float32 [2, layers, experts, experts]."""
    count = np.zeros((2, trace.layers, trace.num_experts, trace.num_experts), np.uint32)
    for block in _checked(trace):
        predictors.learn_transitions(count, block.experts, _half(block.request), absent_id(trace.num_experts), ahead)
    share = count.view(np.float32)  # takes the counts' place: there are up to a gigabyte of them
    for half in range(2):
        for layer in range(trace.layers):
            total = count[half, layer].sum(axis=1, dtype=np.int64, keepdims=True)
            share[half, layer] = count[half, layer] / np.maximum(total, 1)
    return share


def _predictor(
    trace: Trace, name: str, most: int, ahead: int, recall: float, seed: int, share: np.ndarray
) -> Predictor:
    shape = (trace.layers, trace.num_experts)
    return Predictor(
        kind=_KINDS.get(name, predictors.SCORED),
        most=most,
        ahead=ahead,
        score=np.zeros(shape),
        gain=np.ones(1),
        growth=_GROWTH.get(name, 1.0),
        last=np.zeros(shape, np.int32),
        last_count=np.zeros(trace.layers, np.int64),
        share=share,
        recall=float(recall),
        seed=seed,
    )


def _costs(
    trace: Trace, sizes: np.ndarray | None, model: Model | str | Path | None, system: System | str | Path | None
) -> Costs:
    keys = trace.layers * trace.num_experts
    size = np.zeros(keys, np.int64) if sizes is None else sizes.reshape(-1)
    if system is None:
        return Costs(size, np.zeros(keys), np.zeros(keys), 0.0)
    machine = system if isinstance(system, System) else load_system(system)
    if machine.link is None:
        raise UsageError(f"system {machine.name} has no link over which experts could be fetched: name another one.")
    spec = model_of(trace, model)
    if sizes is None or spec is None:
        raise UsageError("--system needs the model, to know how long a layer computes: name one with --model.")
    fetch_s = size / machine.link.bytes_s + machine.link.latency_s
    run_s = size / machine.gpu.bytes_s + (1 + spec.sparse_starts) * machine.gpu.launch_s
    return Costs(size, fetch_s, run_s, float(spec.dense_bytes / machine.gpu.bytes_s + machine.gpu.launch_s))


def _rows(totals: np.ndarray, name: str, sized: bool, timed: bool) -> list[dict]:
    parts = [("all", totals.sum(0)), *zip(PHASE_NAMES, totals, strict=True)]
    rows = []
    for phase, of in parts:
        named, correct, demanded, misses, covered, timely, fetched, wasted = (int(value) for value in of)
        if phase != "all" and not demanded:
            continue
        rows.append(
            {
                "phase": phase,
                "named": named,
                "demanded": demanded,
                "recall": correct / demanded if demanded else None,
                "precision": correct / named if named and name != "recorded" else None,
                "misses": misses,
                "covered_misses": covered,
                "timely_hits": timely if timed else None,
                "displaced": (timely if timed else covered) / misses if misses else None,
                "prefetched_bytes": fetched if sized else None,
                "wasted_bytes": wasted if sized else None,
            }
        )
    return rows
