"""The kernels against the oracle: every allowed combination of choices, on random and on captured traces."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle
from support.drawn_runs import replay
from support.strategies import Case, all_policies, arrivals, cases, routing, write_loads, write_static

from moetrace.engine.run import Run
from moetrace.engine.state import FIRST_GROUP, GPU, LINK_IN, LINK_OUT
from moetrace.spec import Gpu, Link, Model, Ndp, PolicySpec, System, load_model, load_policy, load_system
from moetrace.spec.errors import UsageError
from moetrace.trace import Trace

PRESETS = ("on-demand", "monde", "ndp-ep", "ndp-tp", "edge-ndp-tp-lb", "edge-ndp")
STEP_TIMES = ("duration_s", "dense_s", "moe_s", "head_s", "wait_s", "demand_bytes", "prefetch_bytes", "imbalance")
COUNTS = ("hits", "misses", "late")


def close(actual, expected) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-18)


def unit_column(lane, units: int, column: str) -> list[float]:
    """One figure of the GPU, each NDP unit and both link directions, in the oracle's order (its idle CPU left out)."""
    share, log = lane.machine.share, lane.log.unit[column]
    part = share if column in ("rows", "bytes") else 1
    return [log[GPU], *(log[FIRST_GROUP + u // share] / part for u in range(units)), log[LINK_IN], log[LINK_OUT]]


def check(case: Case, outcome: Run, index: int, expected: oracle.Outcome) -> None:
    lane = outcome.lanes[index]
    log = lane.log
    for name in COUNTS:
        assert log.step[name].tolist() == expected.steps[name].astype(int).tolist(), name
    for name in STEP_TIMES:
        close(log.step[name], expected.steps[name])
    close(log.step["duration_s"].sum(), expected.total_s)
    for name in ("hits", "misses", "gpu_experts", "ndp_experts"):
        assert log.layer[name].tolist() == expected.layers[name].astype(int).tolist(), name
    for name in ("dense_s", "moe_s", "demand_bytes"):
        close(log.layer[name], expected.layers[name])
    with np.errstate(invalid="ignore"):
        close(log.layer["imbalance_sum"] / log.layer["imbalance_count"], expected.layers["imbalance"])
    in_order = [i for i, name in enumerate(expected.units["unit"]) if name != "cpu"]
    for column in ("busy_s", "experts", "rows", "bytes"):
        close(unit_column(lane, case.system.units, column), expected.units[column][in_order])
    working_s = np.subtract(*(unit_column(lane, case.system.units, column) for column in ("busy_s", "shared_s")))
    close(working_s / expected.total_s, expected.units["utilization"][in_order])
    assert log.tally["wasted"][0] == expected.wasted
    assert log.tally["used"][0] == expected.used
    assert log.fallbacks[0] == expected.optimal_fallbacks
    close(outcome.work_bound_s, expected.work_bound_s)
    close(lane.clairvoyant_s, expected.clairvoyant_s)


def small_case(rng: np.random.Generator, steps: int = 14, experts: int = 6, top_k: int = 2, most: int = 4) -> Case:
    """A trace of 3 layers and a machine of 4 units on which every decision goes both ways."""
    offset = np.concatenate(([0], np.cumsum(rng.integers(1, most + 1, steps))))
    rows = int(offset[-1])
    ids = routing(rng, rows, (3, experts, top_k), 0.05)
    sizes = rng.integers(500_000, 1_500_000, (3, experts))
    trace = oracle.OracleTrace(ids, *arrivals(rng, rows, False), offset, sizes)
    model = Model(
        name="small",
        moe_layers=3,
        experts=experts,
        top_k=top_k,
        hidden=512,
        expert_intermediate=1024,
        expert_matrices=1,
        weight_bits=16,
        dense_weight_bits=16,
        dense_params_per_layer=2**19,
        once_params=2**20,
        kv_bytes_per_token_layer=1000,
    )
    gpu = Gpu(name="g", tflops=0.01, bandwidth_gb_s=1.1, memory_gb=1.0, reserve_gb=0.0, launch_us=30.0)
    ndp = Ndp(units=4, gmac_s=0.3, bandwidth_gb_s=0.4, capacity_gb=1.0, command_us=20.0)
    link = Link(bandwidth_gb_s=0.9, latency_us=10.0)
    return Case(trace, model, System(name="small", gpu=gpu, ndp=ndp, link=link), 7)


def compare(case: Case, policies) -> None:
    outcome = replay(case, policies)
    for i, policy in enumerate(policies):
        check(case, outcome, i, oracle.simulate(case.trace, case.model, case.system, policy, slots=case.slots))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), data=st.data())
def test_random_traces(case, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    loads, static = write_loads(folder / "loads.csv", case), write_static(folder / "static.csv", case)
    allowed = all_policies(case.system.units, loads, static)
    compare(case, data.draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=6), label="policies"))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(max_steps=6), data=st.data())
def test_random_traces_every_dispatch(case, data, tmp_path_factory):
    """One policy of each dispatch, so that the rarer ones are met as often as the others."""
    allowed = all_policies(case.system.units)
    dispatches = sorted({policy.dispatch for policy in allowed})
    compare(case, [data.draw(st.sampled_from([p for p in allowed if p.dispatch == name])) for name in dispatches])


def test_every_combination(tmp_path):
    """Each allowed combination of placement, dispatch, residency, prefetch and scope at least once."""
    rng = np.random.default_rng(5)
    case = small_case(rng)
    loads, static = write_loads(tmp_path / "loads.csv", case), write_static(tmp_path / "static.csv", case)
    policies = all_policies(case.system.units, loads, static)
    assert len(policies) > 500
    compare(case, policies)


@pytest.mark.parametrize("experts", [4, 8, 12])
def test_placements_of_equally_many_experts(tmp_path, experts):
    """`eplb` without copies, and a plan's file, which may have any expert anywhere."""
    rng = np.random.default_rng(experts)
    case = small_case(rng, experts=experts)
    rows = [rng.permutation(experts).tolist() for _ in range(case.model.moe_layers)]
    (tmp_path / "plan.json").write_text(json.dumps({"physical_to_logical_map": rows}))
    fields = [
        {"placement": "eplb", "loads": str(write_loads(tmp_path / "loads.csv", case))},
        {"placement": "plan", "plan": str(tmp_path / "plan.json")},
    ]
    dispatches = ("ndp", "balance", "hot")
    compare(case, [PolicySpec(name="a", dispatch=kind, **given) for given in fields for kind in dispatches])


def test_what_units_cannot_hold(tmp_path):
    case = small_case(np.random.default_rng(1))
    loads = write_loads(tmp_path / "loads.csv", case)
    with pytest.raises(UsageError, match="placement eplb gives units equally many experts, but 4 units cannot share 6"):
        replay(case, [PolicySpec(name="a", dispatch="ndp", placement="eplb", loads=str(loads))])
    (tmp_path / "plan.json").write_text(json.dumps({"physical_to_logical_map": [[0, 1, 2, 3, 4, 5, 0, 1]] * 3}))
    policy = PolicySpec(name="a", dispatch="ndp", placement="plan", plan=str(tmp_path / "plan.json"))
    with pytest.raises(UsageError, match=r"plan.json has 8 slots for 6 experts; a replay has one copy of each"):
        replay(case, [policy])


@pytest.mark.parametrize("experts", [255, 256, 300])
def test_many_experts_and_rows(experts):
    """Ids of one and of two bytes, and enough of them for the other way of sorting."""
    case = small_case(np.random.default_rng(experts), steps=4, experts=experts, top_k=8, most=40)
    case.slots = 40
    compare(case, [load_policy(name) for name in PRESETS])


def test_without_link_everything_is_resident():
    case = small_case(np.random.default_rng(6))
    system = msgspec.structs.replace(case.system, ndp=None, link=None)
    layers, experts = case.model.moe_layers, case.model.experts
    case = Case(case.trace, case.model, system, layers * experts)
    compare(case, [load_policy("on-demand")])


def test_user_dispatch(tmp_path):
    """A user's dispatch that sends what is resident to the GPU, against the same in the oracle."""
    path = tmp_path / "mine.py"
    path.write_text(
        "def mine(state, view, layer, load, plan):\n"
        "    for i in range(load.size):\n"
        "        plan[i] = view.active[i].resident and load[i] > 1\n"
    )
    case = small_case(np.random.default_rng(7))
    spec = load_policy(PolicySpec(name="mine", placement="ep", dispatch=f"{path}:mine", residency="lru"))

    def same(layer, active, n, resident):
        return {e for e in active if e in resident and n[e] > 1}

    expected = oracle.simulate(case.trace, case.model, case.system, spec, slots=case.slots, dispatch=same)
    check(case, replay(case, [spec]), 0, expected)


def test_user_residency(tmp_path):
    """A user's residency, most recent load first to go, against the same in the oracle."""
    path = tmp_path / "mine.py"
    path.write_text(
        "def mine(state, view, layer, load, plan):\n"
        "    for i in range(load.size):\n"
        "        state[layer, view.active[i].expert].score = -load[i]\n"
    )
    case = small_case(np.random.default_rng(8))
    spec = load_policy(PolicySpec(name="mine", dispatch="balance", residency=f"{path}:mine", scope="global"))

    def same(layer, n, T, scores):
        return [-float(rows) if rows else score for rows, score in zip(n, scores, strict=True)]

    expected = oracle.simulate(case.trace, case.model, case.system, spec, slots=case.slots, residency=same)
    check(case, replay(case, [spec]), 0, expected)


def test_captured_trace():
    """Four requests of the shipped captured trace, at the README's number of slots."""
    path = Path(__file__).parents[2] / "traces" / "tiny-olmoe.h5"
    with Trace.open(path) as trace:
        steps = int(np.searchsorted(trace.offset, 256 * 2))
        block = next(trace.blocks(rows=int(trace.offset[steps])))
    rows = int(block.offset[steps])
    experts = np.where(block.experts[:rows] == 255, -1, block.experts[:rows].astype(np.int64))
    offset = block.offset[: steps + 1]
    parts = (block.request[:rows], block.position[:rows], block.phase[:rows].astype(np.int64), offset)
    case = Case(oracle.OracleTrace(experts, *parts, None), load_model("tiny-olmoe"), load_system("edge-ndp"), 48)
    compare(case, [load_policy(name) for name in PRESETS])


@pytest.mark.pure
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # 64-bit hashing is meant to overflow
def test_pure_python_selection():
    """A few policies that meet every kernel; the suite runs this once with NUMBA_DISABLE_JIT=1 too."""
    case = small_case(np.random.default_rng(9), steps=6)
    chosen = [
        PolicySpec(name="a", placement="tp", dispatch="balance", residency="prefill", prefetch="prefill"),
        PolicySpec(name="b", dispatch="optimal", residency="ewma", prefetch="online:2"),
        PolicySpec(name="c", dispatch="gpu", residency="lfu", prefetch="oracle:2", half_life=2, p=0.5),
        PolicySpec(name="d", dispatch="hot"),
        PolicySpec(name="e", dispatch="balance", residency="belady", scope="global"),
        PolicySpec(name="f", dispatch="ndp", residency="lru", prefetch="oracle:1", prefetch_blocks=True),
        PolicySpec(name="g", dispatch="balance", residency="sieve", scope="global"),
        PolicySpec(name="h", dispatch="gpu", residency="fifo", prefetch="oracle:2"),
        PolicySpec(name="i", dispatch="gpu", residency="lfu-in-cache"),
        PolicySpec(name="j", dispatch="gpu", residency="least-stale", scope="global"),
        PolicySpec(name="k", dispatch="gpu", residency="static-hindsight"),
        PolicySpec(name="l", dispatch="balance", residency="lfuda", prefetch="online:2", scope="global"),
    ]
    compare(case, chosen)
