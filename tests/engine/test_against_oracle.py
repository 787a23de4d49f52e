"""The kernels against the oracle: every allowed combination of choices, on random and on captured traces."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle
from support.compared import check, compare, small_case
from support.drawn_runs import replay
from support.strategies import Case, all_policies, cases, write_loads, write_static

from moetrace.spec import PolicySpec, load_model, load_policy, load_system
from moetrace.spec.errors import UsageError
from moetrace.trace import Trace

PRESETS = ("on-demand", "monde", "ndp-ep", "ndp-tp", "edge-ndp-tp-lb", "edge-ndp")


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


def test_placements_that_units_cannot_hold_are_refused(tmp_path):
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
