"""A residency of the replay and the cache policy of that name are the same thing: hit for hit."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.one_run import run
from support.strategies import as_arrays, cases

from moetrace.analyze.cache.accesses import Accesses
from moetrace.analyze.cache.hits import cache_hits
from moetrace.analyze.cache.kernels.replays import Budget, Demands, make_replay
from moetrace.analyze.cache.kernels.scored import ALPHA
from moetrace.analyze.cache.kernels.static import count_accesses
from moetrace.analyze.cache.next_use import NextUses
from moetrace.engine.demand import demand_of
from moetrace.spec import PolicySpec, load_model, load_system
from moetrace.spec.choices import cache_policies, legal
from moetrace.trace import Trace

SHIPPED = Path(__file__).parents[2] / "traces"
POLICIES = cache_policies()
SHARED = [name for name in POLICIES if name in legal("residency")]
SCOPES = ("global", "layer")


def on_demand(residency: str, scope: str) -> PolicySpec:
    return PolicySpec(name=f"{residency} {scope}", dispatch="gpu", residency=residency, scope=scope)


def in_demand_order(trace: Trace) -> list[Accesses]:
    """The accesses of `analyze cache`, at once, but those of an event in the order of a replay."""
    blocks, done = [], 0
    for block in trace.blocks():
        demand = demand_of(block.experts, np.ascontiguousarray(block.offset, np.int64), trace.num_experts)
        assert demand is not None
        layer = np.repeat(np.arange(len(demand.start) - 1) % trace.layers, np.diff(demand.start))
        none = np.zeros(0, np.int32)
        blocks.append(
            Accesses(
                first=done,
                key=(layer * trace.num_experts + demand.expert).astype(np.int32),
                bounds=demand.start,
                recorded=none.astype(np.uint8),
                phase=trace.phase[block.first_step : block.first_step + block.steps],
                rows=len(block.request),
                row=none,
                request=np.ascontiguousarray(block.request, np.int32),
                step_rows=np.diff(block.offset).astype(np.int64),
                chosen_by=demand.rows,
                row_choices=0,
                fresh=none,
                experts=np.zeros((0, 0, 0), np.uint8),
            )
        )
        done += len(demand.expert)
    return blocks


def hits_of_caches(trace: Trace, policy: str, scope: str, slots: list[int]) -> list[np.ndarray]:
    """Hits [steps, layers] at each capacity, by the kernels of `analyze cache`."""
    blocks, keys = in_demand_order(trace), trace.layers * trace.num_experts
    pools = trace.layers if scope == "layer" else 1
    shape = (trace.layers, trace.num_experts, np.ones(keys, np.int64), pools, False, trace.rows * trace.top_k)
    replay = make_replay(
        POLICIES[policy], [Budget(s // pools, False) for s in slots], Demands(*shape, count_accesses(blocks, keys))
    )
    hits: list[list[np.ndarray]] = [[] for _ in slots]
    with NextUses(keys) as next_uses:
        next_uses.learn(blocks)
        for block in blocks:
            for of_cache, hit in zip(hits, replay(block, next_uses.of(block)), strict=True):
                before = np.concatenate(([0], np.cumsum(hit, dtype=np.int64)))
                of_cache.append(np.diff(before[block.bounds]).reshape(-1, trace.layers))
    return [np.concatenate(of_cache) for of_cache in hits]


def check(trace: Trace, model, system, slots: list[int], names: list[str]) -> None:
    policies = [on_demand(name, scope) for name, scope in product(names, SCOPES)]
    found = [run(trace, model, system, policies, slots=s, ignore_capacity=True) for s in slots]
    for number, (name, scope) in enumerate(product(names, SCOPES)):
        for s, outcome, expected in zip(slots, found, hits_of_caches(trace, name, scope, slots), strict=True):
            log = outcome.lanes[number].log
            assert log.step["hits"].tolist() == expected.sum(1).tolist(), (name, scope, s)
            assert log.layer["hits"].tolist() == expected.sum(0).tolist(), (name, scope, s)


def largest_event(trace: Trace) -> int:
    return max(int(np.diff(block.bounds).max()) for block in in_demand_order(trace))


def test_a_replay_lacks_only_policies_defined_one_access_at_a_time():
    assert set(POLICIES) - set(SHARED) == {"s3-fifo", "arc", "static-prefill"}
    assert on_demand("ewma", "layer").alpha == ALPHA


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(max_steps=30, max_experts=12, max_units=0))
def test_a_replay_on_demand_hits_as_the_cache_does(case):
    trace = Trace.from_arrays(num_experts=case.model.experts, **as_arrays(case.trace, case.model.experts))
    everything = trace.layers * trace.num_experts
    slots = sorted({case.slots, everything // 2, everything * 3 // 4})
    check(trace, case.model, case.system, slots, [name for name in SHARED if name != "belady"])
    # Among experts that come next at the same time, belady drops another one here than there. That changes no hits as
    # long as the demanded experts fit.
    fits = largest_event(trace)
    check(trace, case.model, case.system, [max(s, fits * trace.layers) for s in slots], ["belady"])


@pytest.mark.parametrize(("name", "slots"), [("tiny-olmoe", [24, 96, 150]), ("mixtral-8x7b-b16", [64, 200])])
def test_shipped_traces(name, slots):
    with Trace.open(SHIPPED / f"{name}.h5") as trace:
        rows = min(trace.rows, 1500)
        block = next(trace.blocks(rows=rows))
        steps = int(np.searchsorted(block.offset, min(rows, int(block.offset[-1])), "right")) - 1
        rows = int(block.offset[steps])
        part = Trace.from_arrays(
            block.experts[:rows],
            num_experts=trace.num_experts,
            request=block.request[:rows],
            steps=np.diff(block.offset[: steps + 1]),
            phase=trace.phase[:steps],
            row_phase=block.phase[:rows],
        )
    fits = [s for s in slots if s >= largest_event(part) * part.layers]
    model, system = load_model(name.removesuffix("-b16")), load_system("rtx4090-offload")
    check(part, model, system, slots, [policy for policy in SHARED if policy != "belady"])
    check(part, model, system, [*fits, part.layers * part.num_experts], ["belady"])


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), capacity=st.integers(1, 40))
def test_the_command_s_own_figures_where_orders_agree(seed, capacity):
    """One row a step, ids ascending: then the last choices of an event come in demand order."""
    rng = np.random.default_rng(seed)
    popularity = rng.random((1, 4, 10)) ** 2
    ids = np.sort(np.argsort(rng.random((50, 4, 10)) - popularity, axis=2)[:, :, :3], axis=2)
    trace, model = Trace.from_arrays(ids.astype(np.uint8), num_experts=10), load_model("tiny-olmoe")
    model = type(model)(**{f: getattr(model, f) for f in model.__struct_fields__} | {"moe_layers": 4, "experts": 10})
    for scope in SCOPES:
        names = [name for name in SHARED if name != "belady" or capacity >= 12]
        policies = [on_demand(name, scope) for name in names]
        outcome = run(trace, model, load_system("rtx4090-offload"), policies, slots=capacity)
        frame = cache_hits(trace, [capacity], names, scope=scope).filter(phase="all")
        assert [int(lane.log.step["hits"].sum()) for lane in outcome.lanes] == frame["hits"].to_list()
