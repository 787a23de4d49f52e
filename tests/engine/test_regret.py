"""Regret: what decisions cost beside those of `optimal`, against the oracle, in random mixes; it changes nothing."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support.drawn_machines import machine_cases, machine_policies
from support.drawn_runs import replay_machine
from support.drawn_tiers import tier_cases, tier_policies
from support.tiers_oracle import Figures, from_specs
from support.tiers_oracle import replay as simulate

from moetrace.engine.run import Run
from moetrace.engine.state import CPU, HOME, ON_GPU

DRAWN: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
ON = {"regret": True, "decisions": True}


def check(run: Run, expected: Figures) -> None:
    """Check the books of a run against the oracle, and what was kept of each decision against these books."""
    (lane,) = run.lanes
    tally = lane.aside.regret.tally[0]
    np.testing.assert_allclose(tally["optimal_s"], expected.regret_base_s, rtol=1e-9)
    np.testing.assert_allclose(tally["excess_s"], expected.regret_s, rtol=1e-9, atol=1e-12 * expected.regret_base_s)
    assert (tally["experts"], tally["equal_experts"]) == (expected.decisions, expected.equal_decisions)
    assert tally["excess_s"] >= -1e-12 * tally["optimal_s"]
    made = np.concatenate([*lane.decision_log.slices()])
    searched = made[made["optimal"] != 255]
    assert len(made) == lane.log.layer["hits"].sum() + lane.log.layer["misses"].sum()
    assert len(searched) == tally["experts"]
    assert (searched["device"] == searched["optimal"]).sum() == tally["equal_experts"]
    on_gpu = made["device"] == ON_GPU
    assert on_gpu.sum() == lane.log.layer["gpu_experts"].sum()
    assert made["resident"].sum() == lane.log.layer["hits"].sum()
    fetched_bytes = made["weight_bytes"][on_gpu & (made["resident"] == 0)].sum()
    assert fetched_bytes == pytest.approx(lane.log.layer["demand_bytes"].sum())
    assert np.isin(made["device"], (HOME, ON_GPU, CPU)).all()


def same_to_the_last_bit(one: Run, other: Run) -> None:
    """Check that regret changes no other figure."""
    for mine, its in zip(one.lanes, other.lanes, strict=True):
        for name in ("step", "layer", "unit", "tally", "fallbacks"):
            assert getattr(mine.log, name).tobytes() == getattr(its.log, name).tobytes(), name
        for name in ("work_bound_s", "clairvoyant_s", "lower_bound_s", "losses"):
            assert getattr(mine, name) == getattr(its, name), name


@settings(max_examples=60, **DRAWN)
@given(case=tier_cases(max_steps=4, max_experts=5), data=st.data())
def test_any_mix_of_tiers_against_the_oracle(case, data, tmp_path_factory):
    policy = data.draw(tier_policies(case), label="policy")
    for fields, names in ((case.system, ("remote",)), (policy, ("remote", "replicas", "plan_steps"))):
        for name in names:
            fields.pop(name, None)
    if "disk" in case.system:
        case.system["cpu"].pop("chunks", None)
    folder = tmp_path_factory.mktemp("drawn")
    machine, plain = from_specs(case.trace, case.model, case.plain, SimpleNamespace(**policy), case.slots)
    run = replay_machine(case, policy, folder, **ON)
    event(f"tiers: {run.lanes[0].tiers is not None}")
    check(run, simulate(case.trace, machine, plain, regret=True))
    same_to_the_last_bit(run, replay_machine(case, policy, folder))


@settings(max_examples=60, **DRAWN)
@given(case=machine_cases(max_steps=5, max_experts=6), data=st.data())
def test_plain_machines_against_the_oracle(case, data, tmp_path_factory):
    policy = data.draw(machine_policies(case), label="policy")
    folder = tmp_path_factory.mktemp("drawn")
    machine, plain = from_specs(case.trace, case.model, case.plain, SimpleNamespace(**policy), case.slots)
    run = replay_machine(case, policy, folder, **ON)
    event(f"tiers: {run.lanes[0].tiers is not None}")
    check(run, simulate(case.trace, machine, plain, regret=True))
    same_to_the_last_bit(run, replay_machine(case, policy, folder))
