"""Plans of a cluster: when they are made, from what, what moves and waits, what fits, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.clusters import SLOW, cluster, drawn_trace, lane, ms, of, policy, trace_of

from moetrace.analyze.balance.plans import Tier
from moetrace.analyze.balance.units import balance
from moetrace.engine.cluster.cluster_lane import ClusterLane
from moetrace.engine.eplb import eplb_plan
from moetrace.engine.folding import StepStore
from moetrace.spec import MoetraceError, PolicySpec, UsageError, load_policy

MB = 1_000_000  # an expert


def plans_of(monkeypatch, trace, on, one):
    """The steps from which on plans hold, and the plans."""
    taken, made = [], []
    monkeypatch.setattr(
        ClusterLane, "_take", lambda self, plan, before=ClusterLane._take: (made.append(plan), before(self, plan))[1]
    )
    changed = ClusterLane._change_plan

    def note(self, step, phase):
        number = len(made)
        changed(self, step, phase)
        taken.extend([step] * (len(made) - number))

    monkeypatch.setattr(ClusterLane, "_change_plan", note)
    found = lane(trace, on, one)
    return found, taken, made


@pytest.mark.parametrize(
    ("window", "interval", "at"), [(2, 0, [2]), (2, 3, [2, 5, 8]), (3, 1, [3, 4, 5, 6, 7, 8, 9]), (12, 1, [])]
)
def test_plans_are_made_from_the_last_steps(monkeypatch, window, interval, at):
    trace = drawn_trace(5, steps=10)
    found, taken, made = plans_of(
        monkeypatch, trace, cluster(gpus=4), policy(placement="eplb", window=window, interval=interval, redundant=4)
    )
    assert taken == at
    assert found.books.clock["plans"][0] == len(at)
    for step, plan in zip(taken, made, strict=True):
        ids = trace.read("experts", int(trace.offset[step - window]), int(trace.offset[step]))
        loads = np.stack([np.bincount(ids[:, layer].ravel(), minlength=256)[:8] for layer in range(trace.layers)])
        assert plan.tolist() == eplb_plan(loads, 12, 4).reshape(trace.layers, 4, 3).tolist()


def test_a_pause_is_what_the_most_bytes_into_one_gpu_take():
    """Experts 0 and 1 are on GPU 0; all rows choose them, so the plan moves one to GPU 1, and another one back."""
    ids = np.tile([[[0, 1]]], (4, 1, 1))
    trace = trace_of(ids, [1, 1, 1, 1])
    on = cluster(SLOW | {"bandwidth_gb_s": 1.0, "dispatch_latency_us": 100}, attention=1, experts=2)
    found = lane(trace, on, policy(placement="eplb", window=1, redundant=0))
    # 1 MB into each GPU, at 1 GB/s and a start: 1.1 ms. Before 2 experts on one GPU, then 1 on each of two.
    assert ms(found)[1] == pytest.approx(1 + 0.1 + 2 * 2e-3 + 1 + 1.1, rel=1e-3)
    assert ms(found)[0] == pytest.approx(1 + 0.1 + 2 * 1e-3 + 2, rel=1e-3)
    assert ms(found)[2] == pytest.approx(ms(found)[1] - 1.1)
    total = found.books.total[0]
    assert (found.books.clock["pauses"][0], total["moved_bytes"]) == (1, 2 * MB)
    assert total["pause_s"] == pytest.approx(1.1e-3)
    assert found.log.step["exposed_s"][1] < 1.1e-3
    still = lane(trace, on, policy(placement="eplb", window=1, interval=1, redundant=0))
    assert (still.books.clock["plans"][0], still.books.clock["pauses"][0]) == (
        3,
        1,
    )  # what moves nothing waits for nothing


def test_a_layer_of_few_experts_may_copy_one_several_times():
    """Layer 1 has 2 experts in 4 slots, and all rows choose expert 1: it has 3 copies, each with a third of them."""
    ids = np.tile([[[255], [1]]], (12, 1, 1))
    trace = trace_of(ids, [6, 6])
    one = policy(placement="eplb", window=1, redundant=2)
    found = lane(trace, cluster(attention=1, experts=2), one, experts=[4, 2])
    assert found.plan[1, :, :2].tolist() == [[1, 1], [1, 0]]
    assert found.copies.start[1].tolist() == [0, 1, 4, 4, 4]
    assert found.log.unit["rows"][1:3].tolist() == [4, 6 + 2]  # before the plan expert 1 is on the second GPU only


def test_a_plan_moves_while_steps_go_on():
    ids = np.tile([[[0, 1]]], (8, 1, 1))
    trace = trace_of(ids, [1] * 8)
    on = cluster(SLOW | {"bandwidth_gb_s": 1.0}, attention=1, experts=2)
    one = policy(placement="eplb", window=1, interval=1, redundant=0, migrate="async", migrate_share=0.2)
    found = lane(trace, on, one)
    # From step 1 on 1 MB flows at 0.2 GB/s: 5 ms, during which rows have 0.8 GB/s. A step takes 3.0 ms: two of them.
    wire = 4e-3  # ms of two rows, both ways
    assert ms(found)[:4] == pytest.approx([3 + wire / 2, 3 + wire / 2 / 0.8, 3 + wire / 2 / 0.8, 2 + wire], rel=1e-6)
    assert found.books.clock["pauses"][0] == 0
    assert found.books.total["moved_bytes"][0] == 2 * MB
    assert found.books.clock["plans"][0] == 6  # at step 1, and from step 3 on, as nothing is planned meanwhile


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 10**6),
    placement=st.sampled_from(["eplb", "ep-lpt", "ep", "ep-block"]),
    copies=st.sampled_from(["even", "row", "random"]),
    migrate=st.sampled_from(["pause", "async"]),
)
def test_blocks_change_nothing(seed, placement, copies, migrate):
    trace = drawn_trace(seed, steps=14)
    fields = {"copies": copies} if placement == "eplb" else {}
    fields |= {"window": 3, "interval": 4, "migrate": migrate} if placement in ("eplb", "ep-lpt") else {}
    fields |= {"seed": 7} if fields.get("copies") == "random" else {}
    one = policy("pipeline:2,2", placement=placement, **fields)
    on = cluster({"bandwidth_gb_s": 10, "dispatch_latency_us": 50, "combine_latency_us": 70}, gpus=4)
    whole = lane(trace, on, one)
    with StepStore(1 << 20) as store:
        (folded,) = of(trace, on, one, store)
        assert folded.duration_s.tolist() == whole.duration_s.tolist()
    block, trace_blocks = type(trace)._blocks, type(trace)._blocks
    try:
        type(trace)._blocks = lambda self, rows, ahead, compare: block(self, 4, ahead, compare)
        cut = lane(trace, on, one)
    finally:
        type(trace)._blocks = trace_blocks
    assert cut.duration_s.tolist() == whole.duration_s.tolist()
    assert cut.books.total.tolist() == whole.books.total.tolist()
    assert cut.log.unit.tolist() == whole.log.unit.tolist()


@pytest.mark.parametrize("placement", ["ep", "ep-block"])
def test_imbalance_is_that_of_analyze_balance(placement):
    trace = drawn_trace(3, steps=12)
    found = lane(trace, cluster(gpus=4), policy(placement=placement))
    expected = balance(trace, [placement], tier=Tier(4), window=0).layers["imbalance"].to_numpy()
    layers = found.log.layer
    np.testing.assert_allclose(layers["imbalance_rows_sum"] / layers["imbalance_count"], expected)


@pytest.mark.parametrize("copies", ["even", "row", "random"])
def test_copies_share_rows_as_in_analyze_balance(copies, tmp_path):
    trace = drawn_trace(4, steps=12)
    plan = tmp_path / "plan.json"
    slots = [0, 1, 0, 2, 3, 1, 4, 5, 6, 7, 0, 6]
    plan.write_text(json.dumps({"physical_to_logical_map": [slots] * 3}))
    seed = {"seed": 9} if copies == "random" else {}
    found = lane(trace, cluster(gpus=4), policy(placement="plan", plan=str(plan), copies=copies, **seed))
    from moetrace.analyze.balance.plans import Plan

    given_plan = Plan(1, np.tile(np.array(slots, np.int32).reshape(1, 4, 3), (3, 1, 1)))
    expected = balance(trace, [], tier=Tier(4), window=0, plans={"p": given_plan}, copies=copies, **seed)
    layers = found.log.layer
    np.testing.assert_allclose(
        layers["imbalance_rows_sum"] / layers["imbalance_count"], expected.layers["imbalance"].to_numpy()
    )


@pytest.mark.parametrize("shared", ["with-attention", "apart", "auto"])
def test_auto_takes_the_least_of_the_first_steps(shared):
    trace = drawn_trace(8, steps=12, rows=30)
    on = cluster({"bandwidth_gb_s": 1e-3, "dispatch_latency_us": 50, "combine_latency_us": 70}, attention=2, experts=2)
    # Little weight: a layer that is cut into parts costs little more.
    more = {"dense_params_per_layer": 1000, "shared_params_per_layer": 400, "activation_bytes": 2}
    auto = lane(trace, on, policy("pipeline:auto", plan_steps=4, shared=shared), **more)
    places = {"with-attention": [0], "apart": [1], "auto": [0, 1]}[shared]
    for phase in np.unique(trace.phase).tolist():
        first = np.flatnonzero(trace.phase == phase)[:4]
        spent = {}  # by what ties are to be broken: micro-batches, chunks, apart, order
        for r1 in (1, 2, 4, 8):
            for r2 in (1, 2, 4, 8):
                for apart in places:
                    for number, order in enumerate(("asas", "aass")):
                        where = ("with-attention", "apart")[apart]
                        tried = lane(trace, on, policy(f"pipeline:{r1},{r2}", order=order, shared=where), **more)
                        spent[r1, r2, apart, number] = tried.duration_s[first].sum()
        best = min(spent.values())
        r1, r2, first_all, apart = auto.fabric.cut[phase].tolist()
        assert (r1, r2, apart, first_all) == min(cut for cut, s in spent.items() if s <= best * (1 + 1e-12))
        assert (r1, r2) != (1, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": "tp"}, r"placement wants one of ep, ep-block, .* on a cluster.*got 'tp'"),
        ({"schedule": "pipelined"}, r"schedule wants serial, pipeline:auto or pipeline:r1,r2 .* got 'pipelined'"),
        ({"schedule": "pipeline:0,1"}, r"schedule wants serial"),
        ({"schedule": "pipeline:1,257"}, r"schedule wants serial"),
        ({"schedule": "pipeline:2,2", "execution": "fused"}, r"execution applies to schedule serial only"),
        ({"shared": "auto"}, r"shared wants with-attention or apart; auto goes with schedule pipeline:auto"),
        ({"schedule": "pipeline:2,2", "shared": "auto"}, r"shared wants with-attention or apart"),
        ({"order": "aass"}, r"order applies to schedule pipeline:r1,r2 only"),
        ({"redundant": 4}, r"redundant applies to placement eplb or eplb-hierarchical only"),
        ({"placement": "ep", "interval": 4}, r"interval applies to placement ep-lpt, eplb"),
        ({"placement": "eplb", "nodes": 2}, r"nodes applies to placement eplb-hierarchical only"),
        ({"placement": "eplb", "migrate_share": 0.2}, r"migrate_share applies to migrate"),
        ({"placement": "eplb", "seed": 2}, r"seed applies to copies"),
        ({"placement": "plan"}, r"plan wants the path of a plan file"),
        ({"residency": "lru"}, r"residency applies to policies of one GPU, which have no schedule, only"),
        ({"schedule": None, "interval": 4}, r"interval applies to policies of a cluster, which have a schedule, only"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(UsageError, match=message):
        load_policy(
            PolicySpec(name="p"),
            {name: value for name, value in ({"schedule": "serial"} | fields).items() if value is not None},
        )


def test_the_other_kind_of_machine_is_refused():
    trace = drawn_trace(1)
    with pytest.raises(UsageError, match=r"Policy monde is one of a single GPU, and system c is a cluster of 4 GPUs"):
        lane(trace, cluster(gpus=4), load_policy("monde"))
    from moetrace.spec import load_system

    with pytest.raises(UsageError, match=r"Policy p has a schedule, .* system edge-ndp has one GPU; use a system with"):
        lane(trace, load_system("edge-ndp"), policy())


@pytest.mark.parametrize(
    ("one", "message"),
    [
        ({"placement": "eplb", "redundant": 3}, r"8 experts and 3 redundant ones are 11 slots, .* set redundant = 4"),
        ({"placement": "eplb-hierarchical", "nodes": 3}, r"cannot share 4 GPUs among 3 nodes equally"),
        ({"placement": "eplb-hierarchical", "nodes": 2, "groups": 3}, r"cannot share 3 groups among 2 nodes equally"),
        ({"shared": "apart"}, r"model by-hand does not say; set model.shared_params_per_layer, to 0 if"),
        ({"schedule": "pipeline:auto", "shared": "auto"}, r'shared = "auto" needs to know which weights are shared'),
    ],
)
def test_plans_that_cannot_be(one, message):
    with pytest.raises(UsageError, match=message):
        lane(drawn_trace(1), cluster(gpus=4), policy(**one))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"physical_to_logical_map": [[0, 1, 2, 3, 4, 5, 6, 7]]}', r"plan.json"),
        ('{"physical_to_logical_map": [[0, 1, 2], [0, 1, 2], [0, 1, 2]]}', r"3 slots a layer, which 4 units"),
        ('{"physical_to_logical_map": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]}', r"has no slot for expert 4"),
    ],
)
def test_plans_of_another_shape(text, message, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(text)
    with pytest.raises(MoetraceError, match=message):
        lane(drawn_trace(1), cluster(gpus=4), policy(placement="plan", plan=str(plan)))


def test_experts_that_fit_no_gpu():
    trace = drawn_trace(1)  # 3 layers of 8 experts, 1 MB each, and 3 MB of dense weights on each of 4 GPUs
    fits = {"memory_gb": 9.5e-3}
    assert lane(trace, cluster(gpu=fits, gpus=4), policy()).plan.shape == (3, 4, 2)
    with pytest.raises(UsageError, match=r"0\.0 GB of experts do not fit the 0\.0 GB that a GPU of system c has"):
        lane(trace, cluster(gpu=fits, gpus=4), policy(placement="eplb"))  # three slots a layer
    with pytest.raises(UsageError, match=r"0\.0 GB that the 4 GPUs of system c have left; .*use more GPUs"):
        lane(trace, cluster(gpu={"memory_gb": 8e-3}, gpus=4), policy())
    # The GPUs for experts have no dense weights.
    assert lane(trace, cluster(gpu={"memory_gb": 6.1e-3}, attention=2, experts=4), policy()).plan.shape == (3, 4, 2)
