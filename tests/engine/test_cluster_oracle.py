"""The oracle of the cluster's replay, against closed forms, order relations and examples worked by hand."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cluster_oracle import Machine, Network, Plans, Policy, Row, Step, from_specs, replay, steps_of
from support.cluster_oracle.schedule import Stages, last_end, queues_of, run, waits_for
from support.oracle import DECODE, OracleTrace

from moetrace.spec import load_model

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


@st.composite
def drawn_stages(draw):
    """Stages of unequal micro-batches and chunks, many of which take no time."""
    layers, chunks = draw(st.integers(1, 3)), draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    some = draw(st.sampled_from([st.integers(0, 3).map(float), seconds]))
    each = [[[draw(some) for _ in chunks] for _ in range(layers)] for _ in "AS"]
    parts = [[[[draw(some) for _ in range(of)] for of in chunks] for _ in range(layers)] for _ in range(3)]
    return Stages(*each, *parts)


@settings(max_examples=200, deadline=None)
@given(drawn_stages(), st.booleans(), st.sampled_from(["asas", "aass"]))
def test_a_task_starts_when_its_resource_and_what_it_needs_are_ready(stages, colocated, order):
    spans = run(stages, colocated=colocated, order=order)
    started = {(span.stage, span.layer, span.batch, span.chunk): span for span in spans}
    count = 0
    for queue in queues_of(stages, colocated, order, False).values():
        free_s = 0.0
        for key in queue:
            ready_s = max((started[other].end_s for other in waits_for(key, stages, False)), default=0.0)
            assert started[key].start_s == max(free_s, ready_s)
            free_s = started[key].end_s
            assert free_s == started[key].start_s + stages.seconds(key)
            count += 1
    assert count == len(spans)


@pytest.mark.parametrize(
    ("colocated", "order", "layers", "a2e", "e", "ends"),
    [
        (False, "asas", 1, 1.0, 1.0, {"A": 5, "S": 6, "A2E": 6, "E": 7, "E2A": 8}),
        (False, "aass", 1, 1.0, 1.0, {"A": 4, "S": 6, "A2E": 5, "E": 6, "E2A": 7}),
        # Colocated, experts wait for the attention of both micro-batches, and transfers back for those out.
        (True, "asas", 1, 3.0, 4.0, {"A": 5, "S": 6, "A2E": 8, "E": 14, "E2A": 17}),
        (True, "asas", 2, 3.0, 4.0, {"A": 19, "S": 20, "A2E": 23, "E": 28, "E2A": 31}),
    ],
)
def test_two_micro_batches_by_hand(colocated, order, layers, a2e, e, ends):
    spans = run(equal_stages(layers, 2, 1, 2.0, 1.0, a2e, e), colocated=colocated, order=order)
    assert {stage: max(span.end_s for span in spans if span.stage == stage) for stage in ends} == ends


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
    # As `analyze balance` turns: of three copies, step 1 begins with the last one, step 2 with that before it.
    found = replay(steps(*[[(0,)]] * 4), machine(experts=1, gpus=3), Policy(), Plans([[[0], [0], [0]]]))
    assert [step.gpu_rows[0] for step in found.steps] == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]


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
    shared = replay([Step(rows)], replace(on, attention=2), Policy(schedule="pipeline:1,1"), Plans(BLOCK))
    assert shared.steps[0].stage_s["A"] == pytest.approx(4e-3 + 3.5e-3)


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
    policy = Policy(window=1, interval=1, migrate="async", migrate_share=0.6)
    on = machine(attention=1, head_bytes=0.6e9)  # a step is a little over 0.6 s
    found = replay(steps(*[[(0,)]] * 7), on, policy, Plans(BLOCK, make))
    # Made before step 1; 1 MB at 0.6e6 bytes/s are 1.67 s: steps 2 and 3 begin too early, step 4 takes it.
    # Before step 4, once that is done, the next one is made, and so before steps 5 and 6; they move nothing.
    assert [step.plan for step in found.steps] == [0, 0, 0, 0, 2, 3, 4]
    assert [step.migrating for step in found.steps] == [False, True, True, True, False, False, False]
    assert [step.moved_bytes for step in found.steps] == [0, 2e6, 0, 0, 0, 0, 0]
    assert len(seen) == 4  # none is made, or queued, while one is under way
    quick, slow = found.steps[0].stage_s, found.steps[1].stage_s
    assert slow["A2E"] - quick["A2E"] == pytest.approx(1.5e-3)  # 1000 bytes at 0.4e6 bytes/s
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


@pytest.mark.parametrize("shared", ["with-attention", "apart", "auto"])
def test_auto_takes_the_least_of_all_candidates(shared):
    rows = steps(*[[(0, 2), (1, 2), (3, 0), (1, 0), (2, 3), (0, 1), (0, 3), (1, 2)]] * 3, layers=2)
    on, plans = machine(layers=2, attention=2, kv_bytes=1e5, shared_params=1e6), Plans(BLOCK * 2)
    found = replay(rows, on, Policy(schedule="pipeline:auto", plan_steps=2, shared=shared), plans)
    tried = {
        (r1, r2, order, where): replay(
            rows[:2], on, Policy(schedule=f"pipeline:{r1},{r2}", order=order, shared=where), plans
        ).total_s
        for r1 in (1, 2, 4, 8)
        for r2 in (1, 2, 4, 8)
        for order in ("asas", "aass")
        for where in (["with-attention", "apart"] if shared == "auto" else [shared])
    }
    assert tried[found.chosen[DECODE]] == pytest.approx(min(tried.values()), rel=1e-12)


def test_where_all_candidates_are_alike_auto_takes_the_simplest():
    policy = Policy(schedule="pipeline:auto", order="aass", shared="auto")
    found = replay(steps([(0,)]), machine(), policy, Plans(BLOCK))
    assert found.chosen == {DECODE: (1, 1, "asas", "with-attention")}


def test_auto_looks_at_the_first_steps_of_each_phase():
    rows = steps([(0,)], [(0, 2), (1, 2), (3, 0), (1, 0), (2, 3), (0, 1), (0, 3), (1, 2)], layers=2)
    on, plans = machine(layers=2, attention=2, flop_per_row=1e10, t_g=0.0), Plans(BLOCK * 2)
    one, two = (replay(rows, on, Policy(schedule="pipeline:auto", plan_steps=n), plans).chosen for n in (1, 2))
    assert one[DECODE][:3] == (1, 1, "asas")  # of one row all candidates are alike
    assert two[DECODE][0] > 1
    prompt = Step([replace(row, phase=0) for row in rows[0].rows])
    both = replay([prompt, rows[1]], on, Policy(schedule="pipeline:auto", plan_steps=1), plans).chosen
    assert (both[0][:3], both[DECODE][0] > 1) == ((1, 1, "asas"), True)


def test_fused_goes_with_serial_only():
    with pytest.raises(ValueError, match="serial only"):
        Policy(schedule="pipeline:2,1", execution="fused")


def test_traces_become_steps():
    trace = OracleTrace(np.array([[[1, -1]]]), np.array([4]), np.array([9]), np.array([1]), np.array([0, 1]))
    assert steps_of(trace) == [Step([Row(4, 9, 1, [[1]])])]


def test_specs_are_read_by_their_names():
    model = load_model("mixtral-8x7b")
    network = {"bandwidth_gb_s": 50, "dispatch_latency_us": 8, "combine_latency_us": 9, "decode": {"row_ns": 2}}
    gpu = {"tflops": 100, "bandwidth_gb_s": 1000, "launch_us": 3, "compute_efficiency": 0.5, "launch": "layer"}
    on, policy = from_specs(
        model,
        {"gpu": gpu, "cluster": {"attention": 2, "experts": 6}, "network": network},
        SimpleNamespace(placement="eplb", window=3, copies=None, schedule="pipeline:2,4"),
    )
    assert (on.L, on.experts[0], on.W[31][7], on.colocated) == (32, 8, 3 * 4096 * 14336 * 2, False)
    assert (on.F, on.B, on.t_g, on.launch, on.roofline) == (50e12, 1e12, 3e-6, "layer", "max")
    assert on.attention_names + on.expert_names[-1:] == ["attention0", "attention1", "experts5"]
    assert [net.row_s for net in on.network] == [0.0, 2e-9, 0.0]
    assert {(net.B_net, net.dispatch_s, net.combine_bits, net.dedup) for net in on.network} == {(50e9, 8e-6, 16, True)}
    assert policy == Policy(schedule="pipeline:2,4", window=3)
