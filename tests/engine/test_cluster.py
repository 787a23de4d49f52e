"""The replay of a cluster: version 1 with one GPU, times by hand, what must hold of schedules, plans and taxes."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.clusters import SLOW, cluster, drawn_trace, lane, ms, of, policy, trace_of
from support.in_ms import GPU

from moetrace.engine.run import Run, run_setups
from moetrace.engine.setup import Setup
from moetrace.spec import System, load_model, load_policy, load_system


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 10**6), launch=st.sampled_from(["expert", "layer"]), roofline=st.sampled_from(["max", "sum"])
)
def test_one_gpu_is_version_1_with_everything_resident(seed, launch, roofline):
    trace = drawn_trace(seed)
    gpu = {"launch_us": 30, "launch": launch, "roofline": roofline, "layer_overhead_us": 5}
    more = {"dense_params_per_layer": 300_000, "once_params": 70_000, "kv_bytes_per_token_layer": 900}
    found = lane(trace, cluster(gpu=gpu, gpus=1), policy(), **more)
    alone = load_system(msgspec.convert({"name": "one", "gpu": GPU | gpu}, System))
    expected = lane(trace, alone, load_policy("resident"), **more)
    np.testing.assert_allclose(found.duration_s, expected.duration_s, rtol=1e-12)
    assert found.books.total["exposed_s"][0] == pytest.approx(0, abs=1e-12)
    assert found.books.total["network_bytes"][0] == 0


def test_times_by_hand():
    """Four experts on two GPUs of two; dense 1 ms, an expert 1 ms (its weights), a row's transfer 1 ms a port."""
    trace = trace_of([[[0, 1]], [[0, 2]], [[0, 3]]])  # on GPU 0: rows 3, of which the first chose both of its experts
    found = lane(trace, cluster(SLOW, attention=1, experts=2), policy(placement="ep-block"))
    # Into GPU 0 3 rows, into GPU 1 2; out of the attention GPU 5: 5 ms. GPU 0 reads two experts, GPU 1 two: 2 ms.
    assert ms(found) == pytest.approx([1 + 5 + 2 + 5])
    assert (found.books.total["distinct"][0], found.books.total["routed"][0]) == (5, 3)
    twice = lane(trace, cluster(SLOW | {"dedup": False}, attention=1, experts=2), policy(placement="ep-block"))
    assert ms(twice) == pytest.approx([1 + 6 + 2 + 6])
    both = lane(trace, cluster(SLOW, gpus=2), policy(placement="ep-block"))
    # Each of two GPUs sends 2.5 rows and gets 3 or 2, of which half cross the wire.
    assert ms(both) == pytest.approx([1 + 1.5 + 2 + 1.5])
    more = {"dispatch_latency_us": 100, "combine_latency_us": 200, "row_ns": 10_000}
    slower = lane(trace, cluster(SLOW | more, gpus=2), policy(placement="ep-block"))
    assert ms(slower) == pytest.approx([1 + 1.5 + 2 + 1.5 + 0.3 + 2 * 2 * 0.01])
    units = found.log.unit
    assert (units["busy_s"] * 1e3).tolist() == pytest.approx([1, 2, 2, 1, 5, 2, 5])
    assert units["rows"].tolist()[:3] == [0, 4, 2]


def test_context_of_a_micro_batch_is_that_of_its_rows():
    """Two requests of 10 and 4 tokens; cut in two, the first of them is read twice."""
    ids = np.zeros((3, 1, 1), np.int64)
    trace = trace_of(ids, request=np.array([0, 0, 1]), position=np.array([8, 9, 3]), phase=np.array([0]))
    on = cluster(attention=2, experts=1)
    whole = lane(trace, on, policy(), kv_bytes_per_token_layer=1e6)
    assert ms(whole)[0] == pytest.approx(1 + 7 + 1)
    halves = lane(trace, on, policy("pipeline:2,1"), kv_bytes_per_token_layer=1e6)
    # Rows 0 and 1-2: 9 tokens, then 14 of both requests, on two GPUs; dense weights twice; the second's expert last.
    assert ms(halves)[0] == pytest.approx(1 + 4.5 + 1 + 7 + 1)


def test_nodes_count_a_row_once_to_each():
    trace = trace_of([[[0, 1]], [[2, 3]]])
    network = SLOW | {"node_bandwidth_gb_s": 0.25e-3, "node_latency_us": 500}
    plain = lane(trace, cluster(SLOW, gpus=4), policy())
    assert ms(plain) == pytest.approx([1 + 0.75 + 1 + 0.75])
    nodes = lane(trace, cluster(network, gpus=4, gpus_per_node=2), policy())
    # Into each node goes one row, half of it from the other: 2 ms at a quarter of the speed, and its latency.
    assert ms(nodes) == pytest.approx([1 + 2.5 + 1 + 2.5])


@pytest.mark.parametrize(
    ("copies", "first"),
    [("row", [3, 3]), ("even", [3, 3]), ("nearest", [2, 4])],
)
def test_rows_go_to_copies(tmp_path, copies, first):
    """Expert 0 has copies on GPUs 0 and 1 of three; six rows of a step choose it."""
    plan = tmp_path / "plan.json"
    plan.write_text('{"physical_to_logical_map": [[0, 1, 0, 2, 3, 3]]}')
    trace = trace_of(np.zeros((6, 1, 1), np.int64))
    found = lane(trace, cluster(gpus=3), policy(placement="plan", plan=str(plan), copies=copies))
    rows = found.log.unit["rows"].tolist()
    # nearest: rows 0 and 3 on GPU 0, 1 and 4 on GPU 1; rows 2 and 5 by number: 2 mod 2 and 5 mod 2.
    assert rows[:3] == [first[0] + (1 if copies == "nearest" else 0), first[1] - (1 if copies == "nearest" else 0), 0]


def test_drawn_copies_depend_on_the_seed(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text('{"physical_to_logical_map": [[0, 1, 0, 2, 3, 3]]}')
    trace = trace_of(np.zeros((400, 1, 1), np.int64))
    found = [
        lane(trace, cluster(gpus=3), policy(placement="plan", plan=str(plan), copies="random", seed=seed))
        for seed in (1, 1, 2)
    ]
    rows = [one.log.unit["rows"][0] for one in found]
    assert rows[0] == rows[1] != rows[2]
    assert 150 < rows[0] < 250


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    parts=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    gpus=st.sampled_from([{"gpus": 4}, {"attention": 3, "experts": 2}]),
    order=st.sampled_from(["asas", "aass"]),
)
def test_properties_of_all_schedules(seed, parts, gpus, order):
    trace = drawn_trace(seed)
    on = cluster({"bandwidth_gb_s": 1e-3, "dispatch_latency_us": 50, "combine_latency_us": 70}, **gpus)
    cut = f"pipeline:{parts[0]},{parts[1]}"
    serial, one, cut_up = of(trace, on, [policy(), policy("pipeline:1,1"), policy(cut, order=order)])
    assert (one.duration_s <= serial.duration_s * (1 + 1e-12)).all()
    np.testing.assert_allclose(one.books.total["network_bytes"], serial.books.total["network_bytes"])
    for found in (serial, one, cut_up):
        assert found.work_bound_s <= found.duration_s.sum() * (1 + 1e-9)
        assert (found.log.step["exposed_s"] >= 0).all()
    # Whatever the schedule, rows and distinct GPUs are the same.
    assert cut_up.books.total["distinct"][0] == serial.books.total["distinct"][0]
    assert cut_up.log.unit["rows"].tolist() == serial.log.unit["rows"].tolist()
    np.testing.assert_allclose(cut_up.log.step["imbalance_rows"], serial.log.step["imbalance_rows"])


# Each preset as it is, and with FinDEP's shares of GPUs for attention (3:5 to 1:3).
CLUSTERS = [
    ("h100-x8", None),
    ("h100-x8", (3, 5)),
    ("h200-x16", None),
    ("h200-x16", (6, 10)),
    ("h20-x32", None),
    ("gb200-nvl72", None),
    ("gb200-nvl72", (24, 48)),
]


@pytest.mark.parametrize(("name", "split"), CLUSTERS)
@pytest.mark.parametrize("model", ["deepseek-v2", "deepseek-v3"])
def test_findep_is_fastest_where_compute_binds(name, split, model):
    """Prompts of 1,024 tokens, 32,768 in a step, in two layers: naive >= PPPipe >= FinDEP on every preset."""
    system = load_system(name)
    if split is not None:
        gpus = dict(zip(("attention", "experts"), split, strict=True))
        system = replace(system, cluster=replace(system.cluster, gpus=None, **gpus))
    shape = load_model(model, {"moe_layers": 2})
    scores = np.random.default_rng(0).random((32768, 2, shape.experts), dtype=np.float32)
    ids = np.argpartition(scores, shape.top_k, axis=2)[:, :, : shape.top_k]
    more = {"position": np.arange(32768) % 1024, "request": np.arange(32768) // 1024}
    trace = trace_of(ids, experts=shape.experts, phase=np.array([0]), **more)
    names = ["dep-naive", "dep-pppipe", "findep"]
    policies = [load_policy(one) for one in names]
    (run,) = run_setups(trace, [Setup(model=shape, system=system, policies=policies, ignore_capacity=True)])
    assert isinstance(run, Run)
    naive, pppipe, findep = (one.duration_s[0] for one in run.lanes)
    assert naive > 1.1 * pppipe
    assert pppipe >= findep * (1 - 1e-12)
    if split is not None or system.cluster.gpus is None:
        assert pppipe > 1.02 * findep


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), gpus=st.sampled_from([{"gpus": 4}, {"attention": 3, "experts": 2}]))
def test_auto_is_never_slower_than_what_it_tries(seed, gpus):
    """Where it has tried all steps: each cut and order, with and without shared experts apart."""
    trace = drawn_trace(seed)
    slow = {"bandwidth_gb_s": 1e-3, "dispatch_latency_us": 50, "combine_latency_us": 70}
    more = {"dense_params_per_layer": 300_000, "shared_params_per_layer": 150_000}
    tried = [
        policy(f"pipeline:{r1},{r2}", order=order, shared=shared)
        for r1, r2 in ((1, 1), (2, 1), (8, 1), (1, 4), (4, 2))
        for order, shared in (("asas", "with-attention"), ("asas", "apart"), ("aass", "apart"))
    ]
    auto, *others = of(trace, cluster(slow, **gpus), [policy("pipeline:auto", shared="auto"), *tried], **more)
    for phase in range(2):
        own = np.asarray(trace.phase) == phase
        for other in others:
            assert auto.duration_s[own].sum() <= other.duration_s[own].sum() * (1 + 1e-11)


def test_chunks_without_rows_are_left_out():
    trace = trace_of([[[0, 1]], [[1, 2]], [[2, 3]]])
    on = cluster(SLOW, attention=1, experts=2)
    fine, coarse = (lane(trace, on, policy(cut)).log.step[0] for cut in ("pipeline:8,8", "pipeline:3,1"))
    for name in ("duration_s", "exposed_s", "attention_s", "dispatch_s", "experts_s", "combine_s"):
        assert fine[name] == pytest.approx(coarse[name], rel=1e-12, abs=1e-15), name


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    kernels=st.integers(1, 5),
    gpus=st.sampled_from([{"gpus": 1}, {"gpus": 4}, {"attention": 2, "experts": 3}]),
)
def test_taxes_are_what_bulk_takes_beyond_fused(seed, kernels, gpus):
    trace = drawn_trace(seed)
    on = cluster(
        {"bandwidth_gb_s": 1e-3, "dispatch_latency_us": 50, "combine_latency_us": 70}, gpu={"launch_us": 20}, **gpus
    )
    bulk, fused = of(
        trace, on, [policy(execution=how, kernels_per_layer=kernels) for how in ("bulk", "fused")], activation_bytes=2
    )
    taxes = sum(bulk.log.step[f"{tax}_tax_s"] for tax in ("launch", "locality", "barrier"))
    np.testing.assert_allclose(taxes, bulk.duration_s - fused.duration_s, rtol=1e-12, atol=1e-12)
    assert (bulk.log.step["barrier_tax_s"] >= -1e-15).all()
    if gpus == {"gpus": 1}:
        assert (bulk.log.step["barrier_tax_s"] == 0).all()
    launches = trace.layers * (kernels - 1) * 20e-6
    assert bulk.log.step["launch_tax_s"].tolist() == pytest.approx([launches] * trace.steps)
