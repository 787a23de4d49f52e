"""Regret: what decisions cost beside those of `optimal`, against the oracle, in random mixes; it changes nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support.drawn_machines import MachineCase, machine_cases, machine_policies
from support.drawn_machines import plain_policy as in_full
from support.drawn_tiers import own_dispatch, tier_cases, tier_policies
from support.plain_python import as_plain_python
from support.tier_runs import run_of, with_what_goes_together
from support.tiers_oracle import Figures, from_specs
from support.tiers_oracle import replay as simulate

import moetrace as mt
from moetrace.engine.against_optimal import DECISION, NOT_SEARCHED
from moetrace.engine.dispatch import OPTIMAL_UP_TO
from moetrace.engine.run import Run
from moetrace.engine.state import CPU, HOME, ON_GPU
from moetrace.engine.tiers.tier_search import OPTIMAL_OF_THREE_UP_TO
from moetrace.spec import PolicySpec

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
    made = np.concatenate([np.zeros(0, DECISION), *lane.decision_log.slices()])
    searched = made[made["optimal"] != NOT_SEARCHED]
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


def compare(case: MachineCase, policy: dict[str, Any], folder: Path) -> None:
    """Check a case; the CPU is a device of `optimal` where the dispatch runs experts on it."""
    own, with_cpu = own_dispatch(policy), policy.get("with_cpu")
    uses_cpu = with_cpu is True if own else policy["dispatch"] in ("cheapest", "bottleneck") and with_cpu is not False
    specs = case.trace, case.model, case.plain, SimpleNamespace(**policy), case.slots
    machine, plain = from_specs(*specs, dispatch=own, cpu_takes_part=uses_cpu)
    run = run_of(case, policy, folder, **ON)
    event(f"tiers: {run.lanes[0].tiers is not None}")
    check(run, simulate(case.trace, machine, plain, dispatch=own, regret=True))
    same_to_the_last_bit(run, run_of(case, policy, folder))


@as_plain_python
# Each mix of tiers is one more replay to compile. Here are those without losses, rates and relayout, which cost no
# decision anything that `test_tiers` does not hold to the oracle.
@settings(max_examples=40, **DRAWN)
@given(case=tier_cases(max_steps=3, max_experts=5), data=st.data())
def test_any_mix_of_tiers_against_the_oracle(case, data, tmp_path_factory):
    for name in ("loss", "rates"):
        case.system["link"].pop(name, None)
    case.system.pop("remote", None)
    with_what_goes_together(case)
    policy = data.draw(tier_policies(case, relayout=False), label="policy")
    compare(case, policy, tmp_path_factory.mktemp("drawn"))


@settings(max_examples=40, **DRAWN)
@given(case=machine_cases(max_steps=4, max_experts=6), data=st.data())
def test_plain_machines_against_the_oracle(case, data, tmp_path_factory):
    policy = data.draw(machine_policies(case), label="policy")
    compare(case, vars(in_full(policy)), tmp_path_factory.mktemp("drawn"))


def test_layers_that_no_search_tries_are_left_out():
    """Two devices are tried up to 20 active experts, three up to 12; a layer of more counts in neither sum."""
    for dispatch, most in (("balance", OPTIMAL_UP_TO), ("cheapest", OPTIMAL_OF_THREE_UP_TO)):
        tally = {rows: books(dispatch, rows) for rows in (most, most + 1)}
        assert (tally[most]["layers"], tally[most]["left_out"], tally[most]["experts"]) == (1, 0, most)
        assert (tally[most + 1]["layers"], tally[most + 1]["left_out"], tally[most + 1]["experts"]) == (0, 1, 0)
        assert tally[most + 1]["optimal_s"] == tally[most + 1]["excess_s"] == 0.0


def books(dispatch: str, active: int) -> Any:
    """Return the books of one layer of so many active experts, on units with a CPU beside them."""
    experts = np.arange(active, dtype=np.uint8).reshape(active, 1, 1)
    trace = mt.Trace.from_arrays(experts, num_experts=32, steps=np.array([active]), request=np.arange(active))
    policy = PolicySpec(name=dispatch, placement="tp", dispatch=dispatch)
    model = {"model.moe_layers": 1, "model.top_k": 1}
    cpu = {"system.cpu.tflops": 1.0, "system.cpu.bandwidth_gb_s": 40.0, "system.cpu.command_us": 5.0}
    found = mt.replay(trace, model="tiny-olmoe", policies=policy, overrides=model | cpu, regret=True)
    return found.run.lanes[0].aside.regret.tally[0]
