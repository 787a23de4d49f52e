"""The kernels against the oracle on machines of version 2: a CPU, launches, rooflines, efficiencies, an overhead."""

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle
from support.drawn_machines import AT_HOME, MachineCase, machine_cases, machine_policies, plain_policy
from support.drawn_runs import replay
from support.machine_example import example_with_units_and_a_cpu
from support.oracle_layer import machine_of
from support.strategies import Case

from moetrace.engine.run import Run
from moetrace.results.frames import unit_frame
from moetrace.spec import PolicySpec, System, load_policy
from moetrace.spec.errors import UsageError

STEP_TIMES = ("duration_s", "dense_s", "moe_s", "head_s", "wait_s", "demand_bytes", "prefetch_bytes", "imbalance")
COUNTS = ("hits", "misses", "late")


def close(actual, expected, name: str = "") -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-18, err_msg=name)


def engine_case(case: MachineCase) -> Case:
    """The case as the engine reads it."""
    return Case(case.trace, case.model, msgspec.convert(case.system, System), case.slots)


def check(outcome: Run, index: int, expected: oracle.Outcome) -> None:
    lane = outcome.lanes[index]
    log = lane.log
    for name in COUNTS:
        assert log.step[name].tolist() == expected.steps[name].astype(int).tolist(), name
    for name in STEP_TIMES:
        close(log.step[name], expected.steps[name], name)
    for name in ("hits", "misses", "gpu_experts"):
        assert log.layer[name].tolist() == expected.layers[name].astype(int).tolist(), name
    for name in ("dense_s", "moe_s", "demand_bytes"):
        close(log.layer[name], expected.layers[name], name)
    units = unit_frame(outcome).filter(policy=lane.policy.name)
    by_name = {name: i for i, name in enumerate(units["unit"])}
    rows = [by_name[name] for name in expected.units["unit"]]
    for column in ("busy_s", "experts", "rows", "bytes"):
        close(units[column].to_numpy()[rows], expected.units[column], column)
    assert log.tally["wasted"][0] == expected.wasted
    assert log.tally["used"][0] == expected.used
    assert log.fallbacks[0] == expected.optimal_fallbacks
    close(lane.lower_bound_s, expected.lower_bound_s, "lower_bound_s")
    assert lane.lower_bound_s <= lane.log.step["duration_s"].sum() * (1 + 1e-9)
    close(lane.clairvoyant_s, expected.clairvoyant_s, "clairvoyant_s")


def compare(case: MachineCase, policies: list[dict]) -> None:
    """Replay the policies one by one: the work bound of a run is that of its first policy's machine."""
    engine = engine_case(case)
    for number, fields in enumerate(policies):
        policy = load_policy(msgspec.convert({"name": f"policy {number}"} | fields, PolicySpec))
        outcome = replay(engine, [policy])
        expected = oracle.simulate(case.trace, case.model, case.plain, plain_policy(fields), case.slots)
        check(outcome, 0, expected)
        close(outcome.work_bound_s, expected.work_bound_s, "work_bound_s")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=machine_cases(), data=st.data())
def test_random_machines(case, data):
    compare(case, data.draw(st.lists(machine_policies(case), min_size=1, max_size=4), label="policies"))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=machine_cases(max_steps=4))
def test_every_dispatch(case):
    """Each dispatch in turn, so that the rarer ones are met as often as the others."""
    has_home = "ndp" in case.system or "cpu" in case.system
    compare(case, [{"dispatch": kind} for kind in (("gpu", *AT_HOME) if has_home else ("gpu",))])


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=machine_cases(max_steps=2))
def test_experts_that_do_not_fit_home_are_refused(case):
    """Experts that do not fit units or host memory are refused, and those that fit are not."""
    size_gb = float(machine_of(case.trace, case.model, case.plain, case.slots).W.sum()) / 1e9
    for share, fits in ((1.01, True), (0.99, False)):
        system = case.system | {}
        if "ndp" in system:
            system["ndp"] = system["ndp"] | {"capacity_gb": share * size_gb / system["ndp"]["units"]}
        elif "cpu" in system:
            system["host"] = {"memory_gb": share * size_gb}
        else:
            return
        engine = engine_case(MachineCase(case.trace, case.model, system, case.slots))
        policy = load_policy(msgspec.convert({"name": "a", "dispatch": "ndp"}, PolicySpec))
        if fits:
            replay(engine, [policy], ignore_capacity=False)
        else:
            with pytest.raises(UsageError, match="do not fit"):
                replay(engine, [policy], ignore_capacity=False)


def test_a_plan_of_the_users_own(tmp_path):
    """0 = home, 1 = GPU, by the expert's number. Beside units a CPU takes no part in it."""
    path = tmp_path / "mine.py"
    path.write_text(
        "def mine(state, view, layer, load, plan):\n"
        "    for i in range(load.size):\n"
        "        plan[i] = view.active[i].expert % 2\n"
    )
    case = example_with_units_and_a_cpu()
    spec = load_policy(PolicySpec(name="mine", dispatch=f"{path}:mine", residency="lru"))

    def same(layer, active, n, resident):
        return {e: e % 2 for e in active}

    fields = {"dispatch": "user", "residency": "lru"}
    expected = oracle.simulate(
        case.trace, case.model, case.plain, plain_policy(fields), slots=case.slots, dispatch=same
    )
    check(replay(engine_case(case), [spec]), 0, expected)
