"""The kernels against the oracle: every allowed combination of choices, on random and on captured traces."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Case, all_policies, as_arrays, cases, write_loads, write_static

from moetrace.engine.run import Run, run
from moetrace.engine.state import FIRST_GROUP, GPU, LINK_IN, LINK_OUT
from moetrace.trace import Trace

STEP_TIMES = ("duration_s", "dense_s", "moe_s", "head_s", "wait_s", "demand_bytes", "prefetch_bytes", "imbalance")
COUNTS = ("hits", "misses", "late")


def replay(case: Case, policies, **options) -> Run:
    trace = Trace.from_arrays(num_experts=case.model.experts, **as_arrays(case.trace, case.model.experts))
    return run(trace, case.model, case.system, policies, slots=case.slots, ignore_capacity=True, **options)


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
    assert log.tally["wasted"][0] == expected.wasted
    assert log.tally["used"][0] == expected.used
    assert log.fallbacks[0] == expected.optimal_fallbacks
    close(outcome.work_bound_s, expected.work_bound_s)
    close(lane.clairvoyant_s, expected.clairvoyant_s)


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
