"""The oracle on machines of version 2, by hand: a CPU, launches, rooflines, efficiencies, dispatches."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import strategies
from support.by_hand import MB, cpu_of, model_of, ms, one, policy_of, system_of, trace_of, unit
from support.drawn_machines import machine_cases, machine_policies, plain_policy
from support.oracle import simulate


def moe_of(trace, system, dispatch="gpu", model=None, slots=None, **policy):
    outcome = simulate(
        trace, model or model_of(activation_bytes=0), system, policy_of(dispatch=dispatch, **policy), slots
    )
    return outcome.steps["moe_s"]


def with_cpu(units=0, **changed):
    system = system_of(units)
    system.cpu = cpu_of(**changed)
    return system


# --- Launches, rooflines, efficiencies -------------------------------------------------------------------------------


def test_a_layer_starts_its_residents_once():
    # Starts of 0.5 ms. Step 1 fetches 0, 1: there at 4 and 8, 1 ms and a start each: 9.5. Step 2: both resident, 1 ms
    # each: 3 ms with two starts, 2.5 with one. Step 3 fetches 2, which starts itself: 4 + 1 + 0.5, and 0 once.
    trace = trace_of([one(0), one(1)], [one(0), one(1)], [one(0), one(2)])
    system = system_of(0)
    system.gpu.launch_us = 500.0
    seen = moe_of(trace, system, model=model_of(experts=3), residency="lru", slots=3)
    np.testing.assert_allclose(seen, [9.5e-3, 3e-3, 5.5e-3])
    system.gpu.launch = "layer"
    outcome = simulate(trace, model_of(experts=3), system, policy_of(residency="lru"), slots=3)
    np.testing.assert_allclose(outcome.steps["moe_s"], [9.5e-3, 2.5e-3, 5.5e-3])
    assert unit(outcome, "gpu")["busy_s"] == ms(3 * (1.5 + 0.5) + 3 + 2.5 + 3)


def test_a_unit_with_a_shard_starts_once():
    # Two units, commands of 0.5 ms; 0 and 2 on unit 0, 1 on unit 1; 2 ms each.
    trace = trace_of([one(0), one(1), one(2)])
    system = system_of(2)
    system.ndp.command_us = 500.0
    model = model_of(experts=3, activation_bytes=0)
    assert moe_of(trace, system, "ndp", model) == ms(5)
    system.ndp.launch = "layer"
    assert moe_of(trace, system, "ndp", model) == ms(4.5)
    outcome = simulate(trace, model, system, policy_of("tp", "ndp"))  # 1 ms of each on both
    np.testing.assert_allclose(outcome.units["busy_s"][1:3], [3.5e-3, 3.5e-3])
    # expert 1 by itself leaves unit 0 without a start
    outcome = simulate(trace_of([one(1)]), model, system, policy_of(dispatch="ndp"))
    np.testing.assert_allclose(outcome.units["busy_s"][1:3], [0, 2.5e-3])


def test_a_roofline_that_adds_up():
    # 5 rows: 0.5 ms of compute and 1 ms of weights on the GPU; 5 and 2 ms at home.
    trace = trace_of([one(0)] * 5)
    for part, dispatch, times in (("gpu", "gpu", (5, 5.5)), ("ndp", "ndp", (5, 7)), ("cpu", "ndp", (5, 7))):
        for roofline, time in zip(("max", "sum"), times, strict=True):
            system = with_cpu() if part == "cpu" else system_of(1)
            getattr(system, part).roofline = roofline
            assert moe_of(trace, system, dispatch) == ms(time), part
    # only what experts cost: dense is 1 ms of weights, and 5 rows of 0.1 ms
    system = system_of()
    system.gpu.roofline = "sum"
    assert simulate(trace, model_of(), system, policy_of()).steps["dense_s"] == ms(1)


def test_efficiencies():
    trace = trace_of([one(0)], [one(0)] * 10)
    system = system_of(1)
    system.ndp.memory_efficiency, system.ndp.compute_efficiency = 0.5, 0.8
    np.testing.assert_allclose(moe_of(trace, system, "ndp"), [4e-3, 12.5e-3])
    system = with_cpu(memory_efficiency=0.5, compute_efficiency=0.8)
    np.testing.assert_allclose(moe_of(trace, system, "ndp"), [4e-3, 12.5e-3])
    system = system_of(1)
    system.link.efficiency = 0.5
    np.testing.assert_allclose(moe_of(trace, system, "gpu"), [9e-3, 9e-3])


def test_the_overhead_of_a_layer():
    # Two layers: 2 ms of dense, 5 + 5 of moe, and 0.25 a layer, in which nothing is busy.
    model = model_of(layers=2)
    trace = trace_of([[[0], [1]]], [[[], []]])
    system = system_of(0)
    system.gpu.layer_overhead_us = 250.0
    outcome = simulate(trace, model, system, policy_of())
    np.testing.assert_allclose(outcome.steps["duration_s"], [12.5e-3, 2.5e-3])
    np.testing.assert_allclose(outcome.steps["overhead_s"], [0.5e-3, 0.5e-3])
    assert unit(outcome, "gpu")["busy_s"] == ms(2 + 2 + 2)
    plain = simulate(trace, model, system_of(0), policy_of())
    assert outcome.work_bound_s == pytest.approx(plain.work_bound_s + 1e-3)
    assert outcome.clairvoyant_s == pytest.approx(plain.clairvoyant_s + 1e-3)


# --- A CPU as home ---------------------------------------------------------------------------------------------------


def test_a_cpu_is_home_without_units():
    # 0 has 8 rows: 8 ms on the CPU, 5 on the GPU; 1 has one: 2 ms on the CPU, behind 0's fetch 9 on the GPU.
    trace = trace_of([one(0)] * 8 + [one(1)])
    for dispatch, time in (("ndp", 10), ("gpu", 9), ("hot", 5), ("balance", 5), ("optimal", 5)):
        assert moe_of(trace, with_cpu(), dispatch) == ms(time), dispatch
    outcome = simulate(trace, model_of(), with_cpu(), policy_of(dispatch="balance"))
    assert outcome.units["unit"].tolist() == ["gpu", "cpu", "link_in", "link_out"]
    assert unit(outcome, "cpu")["busy_s"] == ms(2)
    assert unit(outcome, "cpu")["bytes"] == MB
    assert unit(outcome, "link_out")["bytes"] == 2000
    assert [outcome.layers[f"{name}_experts"][0] for name in ("gpu", "ndp", "cpu")] == [1, 0, 1]
    assert np.isnan(outcome.imbalance_mean)
    # the bound counts it: 9 rows of 2 MFLOP at 22 GFLOP/s, 2 MB at 1.5 GB/s; and 1 ms of dense
    assert outcome.work_bound_s == ms(1 + 2 / 1.5)


def test_the_link_is_no_faster_than_what_it_reads():
    # 10 MB/s of host memory: 100 ms; the CPU's efficiency does not change it. A policy of version 1 does not know the
    # CPU.
    trace = trace_of([one(0)])
    slow = with_cpu(bandwidth_gb_s=0.01, memory_efficiency=0.25)
    hot = policy_of(dispatch="balance", residency="lru")
    assert simulate(trace, model_of(activation_bytes=0), slow, hot).steps["moe_s"] == ms(101)
    assert moe_of(trace, slow, "gpu") == ms(5)
    slow.link.host_read = True
    assert moe_of(trace, slow, "gpu") == ms(101)
    slow.ndp = system_of(1).ndp  # the experts live there now
    assert moe_of(trace, slow, "gpu") == ms(5)


def test_units_leave_the_cpu_out_but_where_a_dispatch_knows_it():
    trace = trace_of([one(0)] * 8 + [one(1)])
    for dispatch in ("ndp", "hot", "balance", "optimal", "gpu", "fiddler"):
        plain = simulate(trace, model_of(), system_of(1), policy_of(dispatch=dispatch))
        same = simulate(trace, model_of(), with_cpu(1), policy_of(dispatch=dispatch))
        assert (plain.total_s, plain.work_bound_s) == (same.total_s, same.work_bound_s), dispatch
    outcome = simulate(trace, model_of(), with_cpu(1), policy_of(dispatch="home"))
    assert outcome.work_bound_s == ms(1 + 2 / 2)  # 2 MB at 1 + 0.5 + 0.5 GB/s
    assert unit(outcome, "cpu")["busy_s"] == 0


@settings(max_examples=20, deadline=None)
@given(case=strategies.cases(max_steps=4), data=st.data())
def test_a_cpu_is_one_unit_by_another_name(case, data):
    policy = data.draw(st.sampled_from([p for p in strategies.all_policies(1) if p.dispatch != "gpu"]))
    gpu, link = case.system.gpu, case.system.link
    rate = data.draw(st.floats(1, 4)) * link.bandwidth_gb_s  # so that the link has no cap
    ndp = SimpleNamespace(units=1, gmac_s=0.5, bandwidth_gb_s=rate, capacity_gb=1.0, command_us=7.0)
    cpu = SimpleNamespace(tflops=0.001, bandwidth_gb_s=rate, command_us=7.0)
    of_unit = SimpleNamespace(gpu=gpu, link=link, ndp=ndp, cpu=None)
    of_cpu = SimpleNamespace(gpu=gpu, link=link, ndp=None, cpu=cpu)
    one_unit = simulate(case.trace, case.model, of_unit, policy, case.slots)
    same = simulate(case.trace, case.model, of_cpu, policy, case.slots)
    for name in ("total_s", "hits", "misses", "late", "wasted", "used", "work_bound_s", "clairvoyant_s"):
        assert getattr(one_unit, name) == getattr(same, name), name
    for column in ("busy_s", "experts", "rows", "bytes"):
        of_home = one_unit.units[column]
        assert same.units[column].tolist() == [of_home[0], of_home[1], *of_home[3:]]


# --- Dispatches that look at each expert by itself -------------------------------------------------------------------


def test_in_place_fetches_nothing(tmp_path):
    (tmp_path / "static.csv").write_text("0,0\n")
    policy = {"residency": "static", "static": str(tmp_path / "static.csv"), "slots": 1}
    trace = trace_of([one(0), one(1)], [one(0), one(1), one(1)])
    for system in (system_of(1), with_cpu()):
        np.testing.assert_allclose(moe_of(trace, system, "in-place", **policy), [2e-3, 2e-3])
        # steps of at least 3 rows run on the GPU: 1 is fetched
        np.testing.assert_allclose(moe_of(trace, system, "in-place", gpu_rows=3, **policy), [2e-3, 5e-3])
        np.testing.assert_allclose(moe_of(trace, system, "in-place", gpu_rows=2, **policy), [5e-3, 5e-3])


def test_fiddler_compares_one_expert_at_a_time():
    # A miss costs 5 ms by fetch, n at home: 0 (6 rows) and 1 (6) are fetched, although the second waits for the first.
    # 2 (5 rows) costs the same either way and stays; 3 (1 row) stays.
    trace = trace_of([one(0)] * 6 + [one(1)] * 6 + [one(2)] * 5 + [one(3)])
    model = model_of(experts=4, activation_bytes=0)
    for system in (system_of(1), with_cpu()):
        outcome = simulate(trace, model, system, policy_of(dispatch="fiddler"))
        assert outcome.steps["moe_s"] == ms(9)
        assert (outcome.layers["gpu_experts"], outcome.demand_bytes) == (2, 2 * MB)
    # what is resident always runs on the GPU, even if home is faster
    fast = with_cpu(bandwidth_gb_s=100.0, tflops=1.0)
    seen = moe_of(
        trace_of([one(0)], [one(0)]),
        fast,
        "fiddler",
        residency="static-layers",
        slots=2,
        gpu_layers=1,
        gpu_layers_end="last",
    )
    np.testing.assert_allclose(seen, [1e-3, 1e-3])


def test_own_costs_are_without_the_start_of_the_layer():
    # Home takes 4.9 ms of 4.9 rows' work and 0.2 of start: more than 5 by fetch; less if the layer pays the start.
    trace = trace_of([one(0)])
    system = system_of(1)
    system.ndp.gmac_s, system.ndp.command_us = 1 / 4.9, 200.0
    assert moe_of(trace, system, "fiddler") == ms(5)
    system.ndp.launch = "layer"
    assert moe_of(trace, system, "fiddler") == ms(5.1)
    # a fetched expert starts itself: 5 ms and 0.2
    system.gpu.launch, system.gpu.launch_us, system.ndp.launch = "layer", 200.0, "expert"
    assert moe_of(trace, system, "fiddler") == ms(5.1)


def test_cheapest_knows_three_devices():
    # One row each: a unit takes 2 ms, the CPU 1 (1 GB/s), the GPU 5 by fetch. All three go to the CPU.
    trace = trace_of([one(0), one(1), one(2)])
    model = model_of(experts=3)
    outcome = simulate(trace, model, with_cpu(1, bandwidth_gb_s=1.0), policy_of(dispatch="cheapest"))
    assert outcome.steps["moe_s"] == ms(3 + 2 * 3 * 0.008)
    assert (outcome.layers["cpu_experts"], outcome.layers["ndp_experts"]) == (3, 0)
    assert unit(outcome, "cpu")["busy_s"] == ms(3)
    assert unit(outcome, "link_in")["bytes"] == unit(outcome, "link_out")["bytes"] == 6000
    # equal costs: the CPU before the unit
    outcome = simulate(trace, model, with_cpu(1), policy_of(dispatch="cheapest"))
    assert outcome.layers["cpu_experts"] == 3
    # without a CPU: the GPU (1 ms) if resident, else the unit
    outcome = simulate(trace, model, system_of(1), policy_of(dispatch="cheapest"))
    assert outcome.layers["ndp_experts"] == 3


def test_a_row_goes_to_the_host_once():
    # 3 rows of both experts on two units: 3 rows to each, or 3 to the host.
    trace = trace_of([one(0, 1)] * 3)
    system = system_of(2)
    assert moe_of(trace, system, "ndp", model_of()) == ms(3 + 2 * 0.048)
    system.ndp.activations = "host"
    assert moe_of(trace, system, "ndp", model_of()) == ms(3 + 2 * 0.024)


def test_a_plan_names_devices():
    def by_id(layer, active, n, resident):
        return {e: e for e in active}

    trace = trace_of([one(0), one(1), one(2)])
    for system, dispatch, said in (
        (with_cpu(0), by_id, "home or absent"),
        (system_of(1), by_id, "home or absent"),
        (system_of(0), lambda layer, active, n, resident: {}.fromkeys(active, 0), "at home, and there is none"),
    ):
        with pytest.raises(ValueError, match=said):
            simulate(trace, model_of(experts=3), system, policy_of(), dispatch=dispatch)


def test_whole_layers_are_resident():
    # Three layers, all demand 0. The two last, of two experts each, are there from the start; layer 0 is never kept.
    model = model_of(layers=3, experts=2)
    trace = trace_of([[[0], [0], [1]]], [[[0], [0], [0]]])
    for end, kept in (("last", [0, 2, 2]), ("first", [2, 2, 0])):
        policy = policy_of(residency="static-layers", gpu_layers=2, gpu_layers_end=end)
        assert simulate(trace, model, system_of(), policy, 4).layers["hits"].tolist() == kept
    with pytest.raises(ValueError, match="4 experts, 3 slots"):
        simulate(trace, model, system_of(), policy, 3)


def test_defaults_are_version_1():
    trace = trace_of([one(0)] * 8 + [one(1)], [one(0), one(1)])
    said = system_of(2)
    vars(said.gpu).update(launch="expert", roofline="max", layer_overhead_us=0.0)
    vars(said.ndp).update(launch="expert", roofline="max", compute_efficiency=1.0, memory_efficiency=1.0)
    vars(said.ndp).update(activations="per-unit")
    vars(said.link).update(efficiency=1.0, host_read=False)
    for dispatch in ("ndp", "gpu", "balance", "hot"):
        one_way, other = (simulate(trace, model_of(), s, policy_of(dispatch=dispatch)) for s in (said, system_of(2)))
        assert one_way.total_s == other.total_s


@settings(max_examples=40, deadline=None)
@given(case=machine_cases(max_steps=5), data=st.data())
def test_each_active_expert_runs_once_on_any_machine(case, data):
    """On any machine nothing is lost, nothing runs twice, no device is busy for longer than all, no bound is beaten."""
    policy = plain_policy(data.draw(machine_policies(case)))
    outcome = simulate(case.trace, case.model, case.plain, policy, case.slots)
    names = outcome.units["unit"].tolist()
    layers = case.model.moe_layers
    active = [len(case.trace.demand(step, layer)) for step in range(case.trace.steps) for layer in range(layers)]
    ran = [outcome.layers[f"{name}_experts"].sum() for name in ("gpu", "ndp", "cpu")]
    assert sum(ran) == sum(active) == outcome.hits + outcome.misses
    assert outcome.units["rows"].sum() == pytest.approx((case.trace.experts >= 0).sum())
    computing = [name for name in names if not name.startswith("link")]
    assert all(outcome.units["utilization"][names.index(name)] <= 1 + 1e-9 for name in computing)
    assert outcome.work_bound_s <= outcome.total_s * (1 + 1e-9)
    moved = outcome.units["bytes"][names.index("link_out")]
    carried = outcome.demand_bytes + outcome.prefetch_bytes + moved
    assert outcome.units["bytes"][names.index("link_in")] == pytest.approx(carried)
    overhead_s = (case.system["gpu"].get("layer_overhead_us") or 0.0) * 1e-6 * layers * case.trace.steps
    assert outcome.steps["overhead_s"].sum() == pytest.approx(overhead_s)
    if policy.dispatch == "gpu" or "cpu" not in case.system:
        assert ran[2] == 0
    if policy.dispatch == "in-place" and policy.gpu_rows is None:
        assert outcome.demand_bytes == 0
    if policy.residency == "static-layers":
        kept = (
            range(layers)[: policy.gpu_layers]
            if policy.gpu_layers_end == "first"
            else range(layers)[-policy.gpu_layers :]
        )
        assert outcome.hits == sum(n for i, n in enumerate(active) if i % layers in kept)


@settings(max_examples=20, deadline=None)
@given(case=machine_cases(max_steps=3, max_experts=6), data=st.data())
def test_optimal_is_not_beaten_on_any_machine(case, data):
    if "ndp" not in case.system and "cpu" not in case.system:
        return
    kinds = (
        ("ndp", "gpu", "hot", "balance") if "ndp" in case.system else ("ndp", "hot", "balance", "in-place", "fiddler")
    )
    other = data.draw(st.sampled_from(kinds))
    best, others = (
        simulate(case.trace, case.model, case.plain, plain_policy({"dispatch": kind}), case.slots)
        for kind in ("optimal", other)
    )
    assert (best.steps["moe_s"] <= others.steps["moe_s"] * (1 + 1e-9)).all()
