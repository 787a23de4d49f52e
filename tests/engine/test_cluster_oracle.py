"""The oracle of the cluster's replay, against closed forms, order relations and examples worked by hand."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cluster_cases import MADE_FROM_LOADS, cluster_cases
from support.cluster_oracle import Machine, Network, Plans, Policy, Row, Step, replay, steps_of
from support.cluster_oracle.moving import loads_of, moved_into
from support.cluster_oracle.schedule import Stages, last_end, run
from support.oracle import DECODE, OracleTrace, simulate
from support.strategies import as_arrays

from moetrace.analyze.balance import plans as kernels
from moetrace.analyze.balance.units import balance
from moetrace.trace.format import Trace

seconds = st.floats(1e-6, 1e-2)


def equal_stages(layers, r1, r2, a, s, a2e, e):
    """Stages of which every micro-batch and chunk is like the others."""
    chunks = [[[a2e] * r2] * r1] * layers
    return Stages([[a] * r1] * layers, [[s] * r1] * layers, chunks, [[[e] * r2] * r1] * layers, chunks)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), seconds, seconds | st.just(0.0), seconds, seconds)
def test_equal_loads_take_findeps_closed_form(layers, r1, r2, a, s, a2e, e):
    spans = run(equal_stages(layers, r1, r2, a, s, a2e, e), colocated=False)
    X, Y = a + s, max(e, a2e)
    F, G = max(X, r2 * Y), a + 2 * a2e + e + (r2 - 1) * Y
    assert last_end(spans) == pytest.approx((layers - 1) * max(G, r1 * F) + max(X, G) + (r1 - 1) * F, rel=1e-9)


GPU = {"F": 1e12, "B": 1e9, "t_g": 1e-3, "overhead_s": 0.0, "launch": "expert", "roofline": "max"}
NET = Network(B_net=1e6, dispatch_s=2e-3, combine_s=4e-3)


def machine(experts=4, gpus=2, attention=None, layers=1, net=NET, **changed):
    """Experts of 1 MB that take 1 ms and a start of 1 ms; a dense layer of 3 MB; rows of 1000 bytes at 16 bits."""
    return Machine(
        L=layers,
        experts=[experts] * layers,
        W=[[1e6] * experts] * layers,
        **{"flop_per_row": 1.0, "width": 500, "activation_bytes": 2.0, "dense_params": 3e6, "shared_params": 0.0}
        | {"dense_bits": 8.0, "head_bytes": 0.0, "kv_bytes": 0.0, "network": [net] * 3}
        | GPU
        | {"attention": attention or gpus, "expert_gpus": gpus, "colocated": attention is None}
        | changed,
    )


def steps(*of_steps, layers=1):
    """Decode steps of rows that each choose the same experts in every layer."""
    return [
        Step([Row(row, 0, DECODE, [list(chosen)] * layers) for row, chosen in enumerate(chosen_by)])
        for chosen_by in of_steps
    ]


BLOCK = [[[0, 1], [2, 3]]]  # two GPUs with two experts each


def test_a_serial_step_by_hand():
    found = replay(steps([(0, 1), (1, 2)]), machine(attention=1), Policy(), Plans(BLOCK))
    # Row 0 has both experts on GPU 0, row 1 one on each: with dedup two rows go to GPU 0 and one to GPU 1.
    assert found.dispatch_bytes == found.combine_bytes == 3000
    # The one attention GPU sends 3000 bytes at 1e6 bytes/s. GPU 0 runs two experts, GPU 1 one.
    assert found.steps[0].stage_s == pytest.approx(
        {"A": 3e-3 + 1e-3, "S": 0, "A2E": 2e-3 + 3e-3, "E": 4e-3, "E2A": 4e-3 + 3e-3, "K": 0}
    )
    assert found.total_s == pytest.approx(4e-3 + 5e-3 + 4e-3 + 7e-3 + 1e-3)  # and the head's start
    assert found.busy_s == pytest.approx({"attention0": 5e-3, "experts0": 4e-3, "experts1": 2e-3})
    assert found.resource_s == pytest.approx({"AG": 5e-3, "A2E": 5e-3, "EG": 4e-3, "E2A": 7e-3})
    assert found.imbalance_rows == [pytest.approx(3 / 2)]
    assert found.imbalance_s == [pytest.approx(4 / 3)]
    assert found.fan_out == 1.5
    assert found.exposed_s == pytest.approx(12e-3)


def test_without_dedup_every_choice_travels():
    net = replace(NET, dedup=False, dispatch_bits=8.25)
    found = replay(steps([(0, 1), (1, 2)]), machine(attention=1, net=net), Policy(), Plans(BLOCK))
    assert (found.dispatch_bytes, found.combine_bytes) == (4 * 500 * 8.25 / 8, 4000)
    assert found.fan_out == 1.5


def test_dedup_counts_gpus_after_copies_are_chosen():
    # Expert 0 stands on both GPUs. "row": row 0 takes the copy on GPU 0, row 1 that on GPU 1, where its expert 3 is.
    plan = [[[0, 1, 2], [0, 3, -1]]]
    found = replay(steps([(0, 3), (0, 3)]), machine(attention=1), Policy(copies="row"), Plans(plan))
    assert found.dispatch_bytes == 3000
    assert found.fan_out == 1.5


def test_colocated_one_row_in_m_stays():
    found = replay(steps([(0, 1), (1, 2)]), machine(net=replace(NET, row_s=1e-3)), Policy(), Plans(BLOCK))
    assert found.dispatch_bytes == 1500
    # Into GPU 0 two rows, of which half cross: 1000 bytes; out of each 750. One row a GPU is prepared.
    assert found.steps[0].stage_s["A2E"] == pytest.approx(2e-3 + 1e-3 + 1e-3)
    assert found.busy_s == pytest.approx({"gpu0": 9e-3, "gpu1": 7e-3})
    assert found.resource_s["GPU"] == pytest.approx(9e-3)


@pytest.mark.parametrize(
    ("copies", "rows_of_gpus"),
    [
        # Rows 1, 2 and 4 choose expert 0: numbers 0, 1, 2 among its rows. Its copies are on GPUs 0, 1 and 1.
        ("even", [[1, 2], [1, 2]]),  # step 1 begins with the last copy: 2, 0, 1
        ("row", [[0, 3], [0, 3]]),  # places 1, 2, 1
        ("nearest", [[2, 1], [2, 1]]),  # row 1 is on GPU 1, rows 2 and 4 on GPU 0
    ],
)
def test_copies_by_hand(copies, rows_of_gpus):
    plan = [[[0, 1, 3], [0, 0, 2]]]
    rows = [(), (0,), (0,), (), (0,)]
    found = replay(steps(rows, rows), machine(), Policy(copies=copies), Plans(plan))
    assert [step.gpu_rows[0] for step in found.steps] == rows_of_gpus


def test_even_copies_begin_with_another_copy_each_step():
    plan = [[[0, 1], [0, 2]]]
    found = replay(steps([(0,)], [(0,)], [(0,)]), machine(experts=3), Policy(), Plans(plan))
    assert [step.gpu_rows[0] for step in found.steps] == [[1, 0], [0, 1], [1, 0]]


def test_nearest_is_row_where_experts_have_gpus_of_their_own():
    plan = [[[0, 1], [0, 2]]]
    rows = steps([(0,), (0,), (0,)])
    near = replay(rows, machine(experts=3, attention=3), Policy(copies="nearest"), Plans(plan))
    assert near.steps[0].gpu_rows == [[2, 1]]


def test_two_copies_on_a_gpu_read_their_weights_twice_but_are_sent_to_once():
    found = replay(steps([(0,), (0,)]), machine(experts=1, attention=1), Policy(), Plans([[[0, 0], [-1, -1]]]))
    assert found.gpu_slots == {"experts0": 2, "experts1": 0}
    assert found.gpu_bytes["experts0"] == 2e6
    assert found.dispatch_bytes == 2000
    assert found.steps[0].gpu_s == [[pytest.approx(4e-3), 0.0]]


def test_random_copies_are_those_of_the_seed():
    plan, rows = [[[0], [0], [0]]], steps(*[[(0,)] * 40] * 4)
    one, again, other = (
        replay(rows, machine(experts=1, gpus=3), Policy(copies="random", seed=seed), Plans(plan)) for seed in (1, 1, 2)
    )
    assert one.gpu_rows == again.gpu_rows != other.gpu_rows
    assert min(one.gpu_rows.values()) > 30
    assert len({tuple(step.gpu_rows[0]) for step in one.steps}) > 1


def test_launches_and_rooflines_of_experts():
    rows = steps([(0, 1), (1, 2)])
    cases = [("expert", "max", 4e-3), ("layer", "max", 3e-3), ("expert", "sum", 4e-3 + 3e-3), ("layer", "sum", 6e-3)]
    for launch, roofline, expected in cases:
        on = machine(launch=launch, roofline=roofline, flop_per_row=1e9)  # a row is 1 ms, expert 0 and twice expert 1
        found = replay(rows, on, Policy(), Plans(BLOCK)).steps[0].gpu_s[0][0]
        by_hand = {"max": 1e-3 + 2e-3, "sum": 2e-3 + 3e-3}[roofline] + (2e-3 if launch == "expert" else 1e-3)
        assert found == pytest.approx(by_hand), (launch, roofline, expected)


def test_shared_experts_apart():
    # 1 of the 3 MB is of shared experts: A takes 2 + 1 ms, S 1 + 1 ms beside the transfer.
    on = machine(attention=1, shared_params=1e6)
    apart = replay(steps([(0,)]), on, Policy(schedule="pipeline:1,1", shared="apart"), Plans(BLOCK))
    assert apart.steps[0].stage_s["A"] == pytest.approx(3e-3)
    assert apart.steps[0].stage_s["S"] == pytest.approx(2e-3)
    assert apart.total_s == pytest.approx(3e-3 + 3e-3 + 2e-3 + 5e-3 + 1e-3)
    serial = replay(steps([(0,)]), on, Policy(shared="apart"), Plans(BLOCK))
    assert serial.total_s == pytest.approx(apart.total_s + 2e-3)


def test_context_of_a_request_in_two_micro_batches_is_read_twice():
    rows = [Row(7, position, DECODE, [[0]]) for position in (3, 4, 5, 6)]
    on = machine(attention=1, kv_bytes=1e6)  # 1 ms a token
    whole = replay([Step(rows)], on, Policy(schedule="pipeline:1,1"), Plans(BLOCK))
    halves = replay([Step(rows)], on, Policy(schedule="pipeline:2,1"), Plans(BLOCK))
    assert whole.steps[0].stage_s["A"] == pytest.approx(4e-3 + 7e-3)
    assert halves.steps[0].stage_s["A"] == pytest.approx(2 * 4e-3 + 5e-3 + 7e-3)


def test_bulk_and_fused_by_hand():
    # 3 further kernels: 3 starts, and 3 times 2 rows of 1000 bytes out and back at 1e9 bytes/s.
    policy = Policy(kernels_per_layer=4)
    rows, on = steps([(0, 1), (1, 2)]), machine(attention=1)
    bulk = replay(rows, on, policy, Plans(BLOCK))
    lean = replay(rows, on, Policy(), Plans(BLOCK))
    fused = replay(rows, on, replace(policy, execution="fused"), Plans(BLOCK))
    assert bulk.total_s - lean.total_s == pytest.approx(3e-3 + 3 * 4000 / 1e9)
    # x = y = 3 ms out of the one attention GPU; c is 4 ms on GPU 0, 2 ms on GPU 1.
    assert fused.total_s == pytest.approx(4e-3 + (2e-3 + 4e-3) + (3 + 4 + 3) * 1e-3 / 8 + 7 * 4e-3 / 8 + 1e-3)
    assert bulk.taxes == pytest.approx(
        {"launch": 3e-3, "locality": 12e-6, "barrier": 3e-3 + 4e-3 + 3e-3 - 10e-3 / 8 - 28e-3 / 8}
    )
    assert fused.taxes == pytest.approx(bulk.taxes)
    assert math.fsum(bulk.taxes.values()) == pytest.approx(bulk.total_s - fused.total_s, rel=1e-12)


def test_one_gpu_has_no_barrier_tax():
    found = replay(steps([(0, 1), (1, 2)]), machine(gpus=1), Policy(kernels_per_layer=3), Plans([[[0, 1, 2, 3]]]))
    assert found.taxes["barrier"] == pytest.approx(0, abs=1e-15)
    assert found.network_bytes == 0
    assert found.steps[0].stage_s["A2E"] == 0


SWAPPED = [[[2, 1], [0, 3]]]  # against BLOCK each GPU gets one expert of 1 MB


def making(*plans):
    """A plan-maker that writes down the loads that it gets, and gives the plans one after another."""
    seen = []

    def make(loads):
        seen.append(loads)
        return plans[min(len(seen), len(plans)) - 1]

    return make, seen


def test_a_plan_that_pauses():
    make, seen = making(SWAPPED, SWAPPED, BLOCK)
    rows = steps([(0,)], [(1,)], [(2,)], [(2,)], [(3,)], [(0,)], [(0,)])
    found = replay(rows, machine(attention=1), Policy(window=2, interval=2), Plans(BLOCK, make))
    assert seen == [[[1, 1, 0, 0]], [[0, 0, 2, 0]], [[1, 0, 0, 1]]]
    assert [step.plan for step in found.steps] == [0, 0, 1, 1, 2, 2, 3]
    # 1 MB at 1e6 bytes/s and the latency; the second plan is the first one again.
    assert [step.pause_s for step in found.steps] == pytest.approx([0, 0, 1.002, 0, 0, 0, 1.002])
    assert (found.plans, found.pauses, found.moved_bytes) == (3, 2, 4e6)
    assert [step.gpu_rows[0] for step in found.steps][2:4] == [[1, 0], [1, 0]]
    still = replay(rows, machine(attention=1), Policy(), Plans(BLOCK))
    assert found.total_s == pytest.approx(still.total_s + 2.004)
    assert found.exposed_s == pytest.approx(still.exposed_s)


def test_a_plan_that_moves_beside_the_work():
    make, seen = making(SWAPPED)
    policy = Policy(window=1, interval=1, migrate="async", migrate_share=0.5)
    on = machine(attention=1, head_bytes=0.6e9)  # a step is a little over 0.6 s
    found = replay(steps(*[[(0,)]] * 7), on, policy, Plans(BLOCK, make))
    # Made before step 1; 1 MB at half of 1e6 bytes/s are 2 s: steps 2, 3, 4 begin too early, step 5 takes it.
    # Before step 5, once that is done, the next one is made, and so before step 6; they move nothing.
    assert [step.plan for step in found.steps] == [0, 0, 0, 0, 0, 2, 3]
    assert [step.migrating for step in found.steps] == [False, True, True, True, True, False, False]
    assert [step.moved_bytes for step in found.steps] == [0, 2e6, 0, 0, 0, 0, 0]
    assert len(seen) == 3  # before steps 1, 5 and 6; none is made, or queued, while one is under way
    quick, slow = found.steps[0].stage_s, found.steps[1].stage_s
    assert slow["A2E"] - quick["A2E"] == pytest.approx(1e-3)  # 1000 bytes at half the speed
    assert found.pause_s == 0


def test_moved_bytes_of_copies_on_one_gpu_count_once():
    make, _ = making([[[2, 2], [0, 1]]])
    found = replay(steps([(0,)], [(0,)]), machine(experts=3), Policy(window=1), Plans([[[0, 1], [2, -1]]], make))
    assert found.moved_bytes == 3e6
    assert found.pause_s == pytest.approx(2e-3 + 2.0)  # GPU 1 gets two


def test_two_tiers_by_hand():
    # Four colocated GPUs in two nodes. Row 0 wants GPUs 0 and 1, row 1 wants GPU 2.
    net = replace(NET, B_node=1e5, node_s=3e-3)
    on = machine(gpus=4, net=net, gpus_per_node=2)
    found = replay(steps([(0, 1), (2,)]), on, Policy(), Plans([[[0], [1], [2], [3]]]))
    # With dedup one row goes to each node, and half of the rows come from the other one: 500 bytes into each.
    assert found.node_bytes == 2 * 1000
    assert found.network_bytes == 2 * 3 * 750
    assert found.steps[0].stage_s["A2E"] == pytest.approx(3e-3 + 5e-3)
    choices = replay(
        steps([(0, 1), (2,)]),
        replace(on, network=[replace(net, dedup=False)] * 3),
        Policy(),
        Plans([[[0], [1], [2], [3]]]),
    )
    assert choices.steps[0].stage_s["A2E"] == pytest.approx(3e-3 + 10e-3)


def test_constants_by_phase():
    slow, fast = NET, replace(NET, dispatch_s=0.0)
    on = replace(machine(attention=1), network=[fast, slow, fast])
    prefill, decode = ([Step([Row(0, 0, phase, [[0]])])] for phase in (0, 1))
    difference = (
        replay(decode, on, Policy(), Plans(BLOCK)).total_s - replay(prefill, on, Policy(), Plans(BLOCK)).total_s
    )
    assert difference == pytest.approx(2e-3)


def test_auto_takes_the_least_of_all_candidates():
    rows = steps(*[[(0, 2), (1, 2), (3, 0), (1, 0), (2, 3), (0, 1), (0, 3), (1, 2)]] * 3, layers=2)
    on, plans = machine(layers=2, attention=2, kv_bytes=1e5), Plans(BLOCK * 2)
    found = replay(rows, on, Policy(schedule="pipeline:auto", plan_steps=2), plans)
    tried = {
        (r1, r2, order): replay(rows[:2], on, Policy(schedule=f"pipeline:{r1},{r2}", order=order), plans).total_s
        for r1 in (1, 2, 4, 8)
        for r2 in (1, 2, 4, 8)
        for order in ("asas", "aass")
    }
    assert tried[found.chosen[DECODE]] == pytest.approx(min(tried.values()), rel=1e-12)
    single = replay(steps([(0,)]), machine(), Policy(schedule="pipeline:auto", order="aass"), Plans(BLOCK))
    assert single.chosen == {DECODE: (1, 1, "asas")}  # all are alike


def test_fused_goes_with_serial_only():
    with pytest.raises(ValueError, match="serial only"):
        Policy(schedule="pipeline:2,1", execution="fused")


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


NOTHING = dict.fromkeys(("half_life", "gpu_rows", "most_count", "evicted_share", "loads", "plan", "static")) | {
    "alpha": 0.3,
    "p": 1.0,
    "seed": 0,
}


def test_traces_become_steps():
    trace = OracleTrace(np.array([[[1, -1]]]), np.array([4]), np.array([9]), np.array([1]), np.array([0, 1]))
    assert steps_of(trace) == [Step([Row(4, 9, 1, [[1]])])]


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
