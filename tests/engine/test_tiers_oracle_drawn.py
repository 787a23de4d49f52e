"""The oracle of version 2 on random mixes of its mechanisms: what must hold whatever is on."""

from types import SimpleNamespace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.drawn_machines import machine_cases, machine_policies, plain_policy
from support.drawn_tiers import own_dispatch, tier_cases, tier_policies
from support.oracle import simulate
from support.tiers_oracle import from_specs, replay


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=machine_cases(max_steps=5, max_experts=6), data=st.data())
def test_on_without_effect_is_version_1(case, data):
    """A constant rate, caps that nobody reaches and a disk without time, through the code of version 2."""
    policy = data.draw(machine_policies(case), label="policy")
    old = simulate(case.trace, case.model, case.plain, plain_policy(policy), case.slots)
    system = case.plain
    system.gpu.evict_us = 0.0
    system.link.rates = [(1e-3, system.link.bandwidth_gb_s), (5e-3, system.link.bandwidth_gb_s)]
    if system.ndp:
        system.ndp.outside_gb_s, system.ndp.contention, system.ndp.chunks = 1e15, True, 1
        system.host = SimpleNamespace(channels_gb_s=1e15)
    elif policy.get("prefetch", "none") == "none":
        system.disk = SimpleNamespace(bandwidth_gb_s=1e15, latency_us=0.0)
        system.host = SimpleNamespace(slots=data.draw(st.integers(0, 5)))
    new = replay(case.trace, *from_specs(case.trace, case.model, system, plain_policy(policy), case.slots))
    for name in ("duration_s", "dense_s", "moe_s", "wait_s", "hits", "misses", "late", "demand_bytes"):
        np.testing.assert_allclose(new.per_step(name), old.steps[name], rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(new.prefetch_bytes, old.prefetch_bytes, rtol=1e-9)
    assert (new.wasted, new.used) == (old.wasted, old.used)
    for i, unit in enumerate(old.units["unit"]):
        np.testing.assert_allclose(new.unit[unit]["busy_s"], old.units["busy_s"][i], rtol=1e-9, atol=1e-12)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=tier_cases(), data=st.data())
def test_properties_of_any_combination(case, data):
    policy = data.draw(tier_policies(case), label="policy")
    specs, own = (case.trace, case.model, case.plain, SimpleNamespace(**policy), case.slots), own_dispatch(policy)
    machine, plain = from_specs(*specs, dispatch=own)
    seen = replay(case.trace, machine, plain, dispatch=own, regret=True)
    start_s = 0.0
    for step in seen.steps:
        np.testing.assert_allclose(step.start_s, start_s)
        parts_s = step.cold_s + step.wait_s + sum(step.dense_s) + sum(step.moe_s) + step.head_s
        np.testing.assert_allclose(step.duration_s, parts_s)
        start_s += step.duration_s
    unit = seen.unit
    carried = seen.demand_bytes + seen.prefetch_bytes + unit["link_out"]["bytes"]
    np.testing.assert_allclose(unit["link_in"]["bytes"], carried)
    assert seen.carrying_s <= seen.total_s * (1 + 1e-9)
    for name in ("gpu", "cpu", *(f"ndp{u}" for u in range(machine.N) if not machine.home_is_cpu)):
        assert 0 <= unit[name]["busy_s"] <= seen.total_s * (1 + 1e-9), name
    active = [case.trace.demand(step, layer) for step in range(case.trace.steps) for layer in range(machine.L)]
    placed = [plan for step in seen.steps for plan in step.plan]
    assert [set(plan) for plan in placed] == [set(n) for n in active]
    remote = sum(n[e] for n, plan in zip(active, placed, strict=True) for e in n if plan[e] == 3)
    rows = sum(of["rows"] for of in unit.values())
    assert unit.get("remote", {"rows": 0})["rows"] == remote
    np.testing.assert_allclose(rows, (case.trace.experts >= 0).sum())
    local = sum(device < 3 for plan in placed for device in plan.values())
    assert seen.hits + seen.misses == local
    assert 0 <= seen.gate_mass_lost <= seen.gate_mass_total * (1 + 1e-9)
    assert not seen.gate_mass_lost or (machine.relaxed and machine.loss)
    if machine.disk:
        assert seen.host_hits + seen.host_misses == seen.misses
    else:
        assert seen.host_misses == seen.disk_bytes == 0
    assert seen.moved_bytes == 0 or plain.prefetch == "relayout"
    assert seen.regret_s >= -1e-9 * seen.regret_base_s
    if plain.dispatch == "optimal":
        assert seen.equal_decisions == seen.decisions
