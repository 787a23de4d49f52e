"""Dispatch `split` against the oracle, which tries every share in a whole time line; and what must hold of it."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.compared import compare, small_case
from support.drawn_runs import replay
from support.strategies import all_policies, cases

from moetrace.spec import PolicySpec, load_policy, load_system
from moetrace.spec.errors import UsageError
from moetrace.spec.policy import check_policy


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


def test_what_it_needs():
    with pytest.raises(UsageError, match="dispatch split goes with placement tp only, got placement ep"):
        load_policy("foresee-split", {"placement": "ep"})
    system = load_system("edge-ndp", {"ndp.launch": "layer"})
    with pytest.raises(UsageError, match="dispatch split needs experts that each start themselves"):
        check_policy(load_policy("foresee-split"), system)
