"""The kernels of machines with more tiers and other links against the oracle, in random mixes of their mechanisms."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support.by_hand import one, trace_of
from support.drawn_machines import MachineCase
from support.drawn_tiers import OWN, own_dispatch, tier_cases, tier_policies
from support.machine_example import example_with_units_and_a_cpu
from support.plain_python import as_plain_python
from support.tier_runs import run_of, with_what_goes_together
from support.tiers_oracle import Figures, from_specs
from support.tiers_oracle import replay as simulate

from moetrace.engine.lane import Lane
from moetrace.engine.run import Run
from moetrace.results.frames import unit_frame

STEP_TIMES = ("duration_s", "wait_s", "head_s", "dense_s", "moe_s", "demand_bytes", "prefetch_bytes")


def close(actual: Any, expected: Any, name: str = "") -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15, err_msg=name)


def check(run: Run, expected: Figures) -> None:
    lane = run.lanes[0]
    log = lane.log
    for name in ("hits", "misses", "late"):
        assert log.step[name].tolist() == expected.per_step(name).astype(int).tolist(), name
    for name in STEP_TIMES:
        close(log.step[name], expected.per_step(name), name)
    assert (log.tally["wasted"][0], log.tally["used"][0]) == (expected.wasted, expected.used)
    check_units(run, lane, expected)
    assert log.fallbacks[0] == expected.optimal_fallbacks
    close(lane.work_bound_s, expected.work_bound_s, "work_bound_s")
    if not expected.moved_bytes:  # else the oracle has the layout in force
        close(lane.clairvoyant_s, expected.clairvoyant_s, "clairvoyant_s")
    if lane.losses is not None and expected.gate_mass_total:
        assert lane.losses.gate_mass_dropped == pytest.approx(expected.gate_mass_dropped, rel=1e-9)
        resent = expected.resent_out_bytes, expected.resent_in_bytes
        close((lane.losses.resent_out_bytes, lane.losses.resent_in_bytes), resent, "resent")
    if lane.tiers is not None:
        if lane.remote is not None:
            books = lane.remote.books
            assert books["calls"].sum() == expected.remote_calls
            close(books["work_s"].sum(), expected.remote_s, "remote_s")
        close(lane.tiers.tally["evict_s"][0], expected.per_step("evict_s").sum(), "evict_s")
        if lane.tiers.layout is not None:
            close(lane.tiers.layout.moved, (expected.moved_bytes, expected.moved_s), "moved")
        if lane.tiers.host is not None:
            books = lane.tiers.host.books
            assert (books["hits"][0], books["misses"][0]) == (expected.host_hits, expected.host_misses)
            close((books["disk_bytes"][0], books["busy_s"][0]), (expected.disk_bytes, expected.disk_busy_s), "disk")


def check_units(run: Run, lane: Lane, expected: Figures) -> None:
    units = unit_frame(run)
    names = units["unit"].to_list()
    for column in ("busy_s", "experts", "rows", "bytes"):
        wanted = [expected.unit.get(name, {}).get(column, 0.0) for name in names]
        close(units[column].to_numpy(), wanted, f"{column} of {names}")
    carrying_s = {"link_in": expected.carrying_s, "link_out": expected.sending_s}
    for name, utilization in units.select("unit", "utilization").iter_rows():
        working_s = carrying_s.get(name, expected.unit.get(name, {}).get("busy_s", 0.0))
        close(utilization, working_s / expected.total_s, f"utilization of {name}")


def compare(case: MachineCase, policy: dict[str, Any], folder: Path) -> Run:
    own = own_dispatch(policy)
    specs = case.trace, case.model, case.plain, SimpleNamespace(**policy), case.slots
    machine, plain = from_specs(*specs, dispatch=own)
    run = run_of(case, policy, folder)
    check(run, simulate(case.trace, machine, plain, dispatch=own))
    return run


@as_plain_python
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=tier_cases(), data=st.data())
def test_any_mix(case, data, tmp_path_factory):
    policy = data.draw(tier_policies(case), label="policy")
    with_what_goes_together(case)
    compare(case, policy, tmp_path_factory.mktemp("drawn"))


@as_plain_python
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=tier_cases(max_steps=9, max_experts=9, units=(2, 3)), data=st.data())
def test_relayout(case, data, tmp_path_factory):
    kinds = ("home", "balance", "gpu", "fiddler", "cheapest", "bottleneck", "optimal", "halo", "in-place", OWN)
    policy = data.draw(tier_policies(case, kinds=kinds, placements=("mixed",), relayout=True), label="policy")
    with_what_goes_together(case)
    moved = compare(case, policy, tmp_path_factory.mktemp("drawn")).lanes[0].tiers.layout.moved[0]
    event(f"bytes moved: {moved > 0}")


@as_plain_python
def test_halo_looks_at_the_gates_of_each_layer(tmp_path):
    """Two steps of the same loads, in which the other expert matters more: so it does in the clairvoyant time."""
    case = example_with_units_and_a_cpu()
    sizes = np.array([[2e6, 1e6, 1e6, 1e6, 1e6, 1e6]])
    trace = trace_of([one(0), one(1)], [one(0), one(1)], expert_bytes=sizes)
    gates = np.array([0.75, 0.25, 0.25, 0.75], np.float16).reshape(4, 1, 1)
    case.trace = replace(trace, gates=gates)
    run = compare(case, {"dispatch": "halo", "residency": "lru", "scope": "layer"}, tmp_path)
    # Dense takes 1 ms. The larger one on the GPU: 2 ms, beside 2.016 of the other. Else both run there, in 3.
    assert run.lanes[0].clairvoyant_s == pytest.approx((3.016 + 4) * 1e-3)


@as_plain_python
def test_a_cold_start_forgets_what_relayout_has_learned(tmp_path):
    """The same steps by another request take as long, wherever experts were moved for the first one."""
    case = example_with_units_and_a_cpu()
    case.system["ndp"] |= {"outside_gb_s": 0.2, "move_gb_s": 3.0}
    case.system["host"] = {"channels_gb_s": 0.8}
    steps = [[one(0), one(0), one(2)], [one(0), one(2)], [one(4), one(0), one(0)]]
    case.trace = trace_of(*steps, *steps, requests=[0] * 8 + [1] * 8)
    policy = {"placement": "mixed", "dispatch": "bottleneck", "residency": "ewma", "prefetch": "relayout"}
    lane = compare(case, policy | {"scope": "request"}, tmp_path).lanes[0]
    assert lane.tiers.layout.moved[0] > 0
    assert lane.duration_s[:3].tolist() == lane.duration_s[3:].tolist()
    warm = compare(case, policy | {"scope": "layer"}, tmp_path).lanes[0]
    assert warm.duration_s[:3].tolist() != warm.duration_s[3:].tolist()


# Compiled kernels: two machines that have most of it on, each of which compiles lines of its own.
UNITS = {
    "ndp": {"contention": True, "outside_gb_s": 0.7, "move_gb_s": 0.5, "chunks": "auto"},
    "link": {"stream": 2, "loss": 0.02, "loss_mode": "relaxed", "rto_ms": 0.3, "rates": [(0.0, 1.0), (0.005, 0.4)]},
    "host": {"channels_gb_s": 0.8},
    "gpu": {"evict_us": 130.0},
}
DISK = {
    "disk": {"bandwidth_gb_s": 0.5, "latency_us": 50.0},
    "host": {"slots": 5},
    "link": {"stream": 0},
}


@pytest.mark.parametrize(
    ("parts", "policy"),
    [
        (UNITS, {"placement": "mixed", "dispatch": "bottleneck", "residency": "ewma", "prefetch": "relayout"}),
        (DISK, {"dispatch": "optimal", "residency": "lru", "scope": "global", "host_residency": "lfu"}),
    ],
)
def test_compiled(parts, policy, tmp_path):
    case = example_with_units_and_a_cpu()
    if "disk" in parts:
        case.system.pop("ndp")
    for name, fields in parts.items():
        case.system[name] = case.system.get(name, {}) | fields
    with_what_goes_together(case)
    compare(case, policy, tmp_path)
