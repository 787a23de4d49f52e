"""Dispatch `split` against the oracle, which tries every share in a whole time line; and what must hold of it."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import in_ms
from support.compared import compare, small_case
from support.drawn_runs import replay
from support.oracle_dispatch import dispatch, share_one
from support.oracle_layer import OracleTrace, Share, demand_order, less, machine_of, time_line
from support.strategies import Case, all_policies, cases

from moetrace.spec import PolicySpec, load_policy, load_system
from moetrace.spec.errors import UsageError
from moetrace.spec.participants import check_policy


@pytest.mark.parametrize(("seed", "most"), [(1, 1), (2, 4), (3, 9)])
def test_with_foresee(seed, most):
    case = small_case(np.random.default_rng(seed), steps=40, most=most)
    compare(case, [load_policy("foresee-split"), load_policy("edge-ndp", {"dispatch": "split"})])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases().filter(lambda case: case.system.units > 0), data=st.data())
def test_random_traces(case, data):
    allowed = [policy for policy in all_policies(case.system.units) if policy.dispatch == "split"]
    compare(case, data.draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=4)))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases().filter(lambda case: case.system.units > 0))
def test_a_layer_is_never_slower_than_balance_from_the_same_state(case):
    """Nothing is kept, so both begin each layer alike; each row is counted once, and each byte read once."""
    chosen = [PolicySpec(name=kind, placement="tp", dispatch=kind) for kind in ("balance", "split")]
    balance, split = (lane.log for lane in replay(case, chosen).lanes)
    assert (split.step["moe_s"] <= balance.step["moe_s"] * (1 + 1e-9)).all()
    share = case.system.units
    rows = [log.unit["rows"][0] + log.unit["rows"][3:].sum() for log in (balance, split)]
    assert rows[1] == pytest.approx(rows[0]) and share > 0


def test_it_shares():
    case = small_case(np.random.default_rng(4), steps=40, most=1)
    chosen = [load_policy("edge-ndp-tp-lb", {"dispatch": kind, "residency": "lru"}) for kind in ("balance", "split")]
    balance, split = (lane.log for lane in replay(case, chosen).lanes)
    both = split.layer["gpu_experts"] + split.layer["ndp_experts"] - split.layer["hits"] - split.layer["misses"]
    assert both.sum() > 10
    assert split.step["moe_s"].sum() < balance.step["moe_s"].sum()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(max_steps=1).filter(lambda case: case.system.units > 0), data=st.data())
def test_no_share_of_a_grid_is_better(case, data):
    """The oracle decides in closed form, as the kernel does: here whole time lines of many shares decide."""
    m = machine_of(case.trace, case.model, case.system, case.slots, "split")
    n = case.trace.demand(0, 0)
    here = {e: data.draw(st.sampled_from([0.0, 0.25, 1.0]), label="here") for e in n}
    resident = {e for e in n if here[e] == 1.0}
    full = data.draw(st.booleans(), label="no slot is free")
    units, T = [list(range(m.N))] * m.E, len(case.trace.rows_of(0))

    def line_of(G, C=frozenset(), share=None):
        return time_line(m, 0, n, T, set(G), set(C), resident, units, share)

    G = dispatch("split", demand_order(n), resident, lambda G: line_of(G).moe)
    balanced = line_of(G)
    found_s = share_one(m, 0, n, G, resident, line_of, here, full).moe
    assert found_s <= balanced.moe
    for e in n:
        if e in G and not (e in resident and less(balanced.T_home, balanced.T_gpu)):
            continue
        for x in [k / 64 for k in range(1, 65)] + [here[e]]:
            if 0 < x <= (1.0 if full else here[e]):
                assert found_s <= line_of(G - {e}, share=Share(e, x, here[e])).moe * (1 + 1e-9), (e, x)


def test_an_expert_that_the_gpu_runs_whole_counts_as_fetched():
    """Expert 0 has arrived to two thirds: the rest is fetched in 7 of the 10 ms that the unit needs for expert 1."""
    rows_of = [*[[3]] * 12, [3] * 40, [3] * 40, [0] * 10 + [1] * 10, [0]]
    ids = np.array([e for step in rows_of for e in step])[:, None, None]
    offset = np.concatenate(([0], np.cumsum([len(step) for step in rows_of])))
    trace = OracleTrace(ids, np.arange(len(ids)), np.zeros(len(ids), int), np.ones(len(ids), int), offset)
    case = Case(trace, in_ms.model(), in_ms.system(link={"bandwidth_gb_s": 0.05}, ndp={}), 1)
    chosen = in_ms.policy("split", "lru", placement="tp", prefetch="oracle:2", scope="global")
    compare(case, [chosen])
    lane = replay(case, [chosen]).lanes[0]
    assert 0.2e6 < lane.log.step["demand_bytes"][14] < 0.5e6
    assert lane.log.step["moe_s"][14] == pytest.approx(10e-3)
    assert lane.log.step["hits"][15] == 1  # it was kept
    assert lane.log.tally["wasted"][0] == 1  # expert 1, whose layer passed


def test_dispatch_split_needs_placement_tp_and_single_starts():
    with pytest.raises(UsageError, match="dispatch split goes with placement tp only, got placement ep"):
        load_policy("foresee-split", {"placement": "ep"})
    system = load_system("edge-ndp", {"ndp.launch": "layer"})
    with pytest.raises(UsageError, match="dispatch split needs experts that each start themselves"):
        check_policy(load_policy("foresee-split"), system)
