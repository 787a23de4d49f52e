"""Kernels above a disk against the oracle of version 2, on random machines with other mechanisms beside it."""

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.drawn_machines import MachineCase, fields, machine_cases
from support.drawn_runs import replay
from support.drawn_tiers import HOST_RESIDENCIES
from support.strategies import Case
from support.tiers_oracle import from_specs
from support.tiers_oracle import replay as simulate

from moetrace.engine.lane import Lane
from moetrace.results.frames import unit_frame
from moetrace.spec import PolicySpec, System, load_policy

KEPT = ("none", "lru", "lfu", "ewma")


@st.composite
def disk_machines(draw) -> MachineCase:
    """Draw a machine without units, a disk, and host memory for some of the experts."""
    case = draw(machine_cases(max_steps=8, max_experts=7))
    system, rate = case.system, case.system["link"]["bandwidth_gb_s"]
    system.pop("ndp", None)
    system["gpu"] |= draw(fields(evict_us=(0.0, 130.0)))
    system["link"] |= draw(fields(stream=(1, 0, 2, 5)))
    system["disk"] = {"bandwidth_gb_s": rate * draw(st.sampled_from([0.2, 1.0, 4.0]))}
    system["disk"] |= {"latency_us": draw(st.sampled_from([0.0, 50.0]))}
    system["host"] = {"slots": draw(st.integers(0, case.model.all_experts), label="host slots")}
    return case


@st.composite
def disk_policies(draw, case: MachineCase) -> dict[str, Any]:
    at_home = ["home", "in-place", "hot", "balance", "fiddler"] if "cpu" in case.system else []
    dispatch = draw(st.sampled_from(["gpu", *at_home]), label="dispatch")
    kept = "none" if dispatch == "hot" else draw(st.sampled_from(KEPT), label="kept")
    chosen = {"dispatch": dispatch, "residency": kept, "scope": draw(st.sampled_from(["layer", "global"]))}
    return chosen | {"host_residency": draw(st.sampled_from([*HOST_RESIDENCIES]), label="host residency")}


def close(actual: Any, expected: Any, name: str) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15, err_msg=name)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=disk_machines(), data=st.data())
def test_against_the_oracle(case, data):
    policy = data.draw(disk_policies(case), label="policy")
    spec = load_policy(msgspec.convert({"name": "drawn"} | policy, PolicySpec))
    run = replay(Case(case.trace, case.model, msgspec.convert(case.system, System), case.slots), [spec])
    told = SimpleNamespace(placement="ep", **policy)
    expected = simulate(case.trace, *from_specs(case.trace, case.model, case.plain, told, case.slots))
    lane: Lane = run.lanes[0]
    for name in ("hits", "misses"):
        assert lane.log.step[name].tolist() == expected.per_step(name).astype(int).tolist(), name
    for name in ("duration_s", "dense_s", "moe_s", "demand_bytes"):
        close(lane.log.step[name], expected.per_step(name), name)
    assert lane.tiers is not None
    books = lane.tiers.host.books[0]
    assert (books["hits"], books["misses"]) == (expected.host_hits, expected.host_misses)
    close(books["disk_bytes"], expected.disk_bytes, "disk_bytes")
    close(books["busy_s"], expected.disk_busy_s, "disk_busy_s")
    close(lane.work_bound_s, expected.work_bound_s, "work_bound_s")
    close(lane.clairvoyant_s, expected.clairvoyant_s, "clairvoyant_s")
    units = unit_frame(run).filter(unit="gpu").vstack(unit_frame(run).filter(unit="link_in"))
    for unit, busy_s, moved in units.select("unit", "busy_s", "bytes").iter_rows():
        close(busy_s, expected.unit[unit]["busy_s"], unit)
        close(moved, expected.unit[unit]["bytes"], unit)
