"""Random clusters in the oracle: what holds of all, version 1 on one GPU, copies and plans of `analyze balance`."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cluster_cases import MADE_FROM_LOADS, cluster_cases
from support.cluster_oracle import steps_of
from support.cluster_oracle.moving import loads_of, moved_into
from support.oracle import simulate
from support.strategies import as_arrays

from moetrace.analyze.balance import plans as kernels
from moetrace.analyze.balance.units import balance
from moetrace.trace.format import Trace

NOTHING = dict.fromkeys(("half_life", "gpu_rows", "most_count", "evicted_share", "loads", "plan", "static")) | {
    "alpha": 0.3,
    "p": 1.0,
    "seed": 0,
}


@settings(max_examples=60, deadline=None)
@given(cluster_cases(schedules=("serial",), placements=("ep", "plan")))
def test_taxes_sum_to_bulk_less_fused(case):
    bulk, fused = case.run(execution="bulk"), case.run(execution="fused")
    for one, other in zip(bulk.steps, fused.steps, strict=True):
        assert one.taxes == other.taxes
        assert math.fsum(one.taxes.values()) == pytest.approx(one.duration_s - other.duration_s, abs=1e-12)
        if not case.system["network"].get("gpus_per_node"):
            assert min(one.taxes.values()) >= -1e-12
    assert bulk.busy_s.keys() == fused.busy_s.keys()


@settings(max_examples=60, deadline=None)
@given(cluster_cases(schedules=("serial",), placements=("ep", "plan")))
def test_a_pipeline_of_one_is_never_slower_than_serial(case):
    plain = {"execution": "bulk", "kernels_per_layer": 1}
    one, serial = case.run(**plain, schedule="pipeline:1,1"), case.run(**plain, schedule="serial")
    for piped, in_turn in zip(one.steps, serial.steps, strict=True):
        assert piped.duration_s <= in_turn.duration_s + 1e-12
        assert in_turn.duration_s == pytest.approx(
            in_turn.head_s + in_turn.overhead_s + math.fsum(in_turn.stage_s.values())
        )


@settings(max_examples=60, deadline=None)
@given(cluster_cases(max_rows=3, schedules=("pipeline",), placements=("ep", "plan")))
def test_three_rows_in_8_8_are_three_in_3_1(case):
    fine, coarse = case.run(schedule="pipeline:8,8"), case.run(schedule="pipeline:3,1")
    for one, other in zip(fine.steps, coarse.steps, strict=True):
        if one.rows == 3:
            assert one.spans == other.spans
            assert one.duration_s == other.duration_s


@settings(max_examples=100, deadline=None)
@given(cluster_cases())
def test_all_cases_run_and_add_up(case):
    found = case.run()
    machine, _, plans = case.read()
    choices = int((case.trace.experts >= 0).sum())
    assert sum(found.gpu_rows.values()) == choices
    assert found.total_s == pytest.approx(found.prefill_s + found.decode_s + found.mixed_s)
    starts = np.array([step.start_s for step in found.steps])
    assert starts == pytest.approx(np.concatenate(([0.0], np.cumsum([step.duration_s for step in found.steps])))[:-1])
    for step in found.steps:
        in_order: dict[str, float] = {}
        for span in step.spans:
            resource = span.stage if not machine.colocated else "NET" if "2" in span.stage else "GPU"
            assert span.start_s >= in_order.get(resource, 0.0)
            in_order[resource] = span.end_s
        assert 0 <= step.exposed_s <= step.duration_s
        assert math.isnan(step.fan_out) or 1 <= step.fan_out <= min(machine.expert_gpus, case.model["top_k"])
        assert all(math.isnan(value) or value >= 1 - 1e-12 for value in step.imbalance_rows + step.imbalance_s)
    for name in machine.expert_names:
        assert found.busy_s[name] <= found.total_s * (1 + 1e-12)
    if plans.make is None:
        assert (found.plans, found.moved_bytes, found.pause_s) == (0, 0, 0)


@settings(max_examples=40, deadline=None)
@given(cluster_cases(max_gpus=1, schedules=("serial",), placements=("ep",), two_tiers=False, uneven=False))
def test_one_gpu_is_version_1_with_everything_resident(case):
    case.system["cluster"] = {"gpus": 1}
    found = case.run(execution="bulk", kernels_per_layer=1, shared="with-attention")
    parts = {name: SimpleNamespace(**case.system["gpu"]) for name in ("gpu",)}
    system = SimpleNamespace(**parts, ndp=None, link=None, cpu=None, host=None)
    policy = {"placement": "ep", "dispatch": "gpu", "residency": "static-layers", "scope": "global", "prefetch": "none"}
    policy |= {"prefetch_blocks": False, "gpu_layers": None, "gpu_layers_end": "first"}
    model = SimpleNamespace(**case.model)
    alone = simulate(case.trace, model, system, SimpleNamespace(**policy, **NOTHING), None)
    assert [step.duration_s for step in found.steps] == pytest.approx(alone.steps["duration_s"], rel=1e-12)
    assert found.busy_s["gpu0"] == pytest.approx(alone.units["busy_s"][0], rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    cluster_cases(schedules=("serial",), placements=("plan",), uneven=False), st.sampled_from(["even", "row", "random"])
)
def test_copies_are_chosen_as_analyze_balance_does(case, copies):
    seed, experts = case.policy.get("seed", 0), case.model["experts"]
    trace = Trace.from_arrays(num_experts=experts, **as_arrays(case.trace, experts))
    plan = kernels.Plan(1, np.array(case.plan, np.int32))
    tier, shown = kernels.Tier(case.gpus, redundant=0), {"copies": copies, "seed": seed}
    judged = balance(trace, [], tier=tier, window=0, plans={"plan": plan}, **shown)
    expected = [math.nan if value is None else value for value in judged.layers["imbalance"]]
    assert case.run(**shown).imbalance_rows == pytest.approx(expected, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(cluster_cases(schedules=("serial",), placements=MADE_FROM_LOADS))
def test_plans_are_those_of_analyze_balance(case):
    machine, _, plans = case.read()
    loads = loads_of(steps_of(case.trace), machine.experts)
    table = np.zeros((machine.L, max(machine.experts)), np.int64)
    for layer, of_layer in enumerate(loads):
        table[layer, : len(of_layer)] = of_layer
    tier = kernels.Tier(case.gpus, *(case.policy.get(name) for name in ("redundant", "nodes", "groups")))
    tier = tier._replace(nodes=tier.nodes or 1, groups=tier.groups or 1)
    own = np.array(machine.experts)
    made = kernels.make_plan(case.policy["placement"], tier, table.shape, table, own)
    first = kernels.make_plan("ep-block", tier, table.shape, None, own)
    for plan, kernel in ((plans.make(loads), made), (plans.first, first)):
        assert [[[e for e in gpu if e >= 0] for gpu in layer] for layer in kernel.expert_of_slot.tolist()] == plan
    into = moved_into(plans.first, plans.make(loads), [[1.0] * number for number in machine.experts])
    assert sum(into) == kernels.moved_bytes(first, made, np.ones(table.shape, np.int64)).sum()
