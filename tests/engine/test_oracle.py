"""The oracle's tables and yardsticks on cases worked out by hand, and what must hold of any replay."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import strategies
from support.by_hand import MB, hits_of, model_of, ms, one, policy_of, system_of, trace_of
from support.oracle import simulate


def test_requests_go_by_the_phase_of_their_rows():
    # Steps of 2 ms (1 dense, 1 resident expert... all resident without a link). Request 3: prefill in steps 1 and 2,
    # decode in 2 (mixed) and 4; request 1: decode only, in 3; request 5: prefill only, in 2.
    system = system_of(0)
    system.link = None
    rows = [[one(0)], [one(0)] * 3, [one(0)], [one(0)]]
    trace = trace_of(*rows, requests=[3, 3, 3, 5, 1, 3])
    trace.row_phase = np.array([0, 0, 1, 0, 1, 1])
    outcome = simulate(trace, model_of(), system, policy_of())
    assert outcome.steps["phase"].tolist() == [0, 2, 1, 1]
    assert (outcome.prefill_s, outcome.mixed_s, outcome.decode_s) == (ms(2), ms(2), ms(4))
    requests = outcome.requests
    assert requests["request"].tolist() == [1, 3, 5]
    assert requests["prompt_rows"].tolist() == [0, 2, 1]
    assert requests["output_rows"].tolist() == [1, 2, 0]
    np.testing.assert_allclose(requests["ttft_s"], [np.nan, 4e-3, 2e-3])
    np.testing.assert_allclose(requests["tpot_s"], [2e-3, (8 - 4) / 2 * 1e-3, np.nan])
    np.testing.assert_allclose(requests["e2e_s"], [2e-3, 8e-3, 2e-3])
    assert outcome.tokens_per_s == pytest.approx(3 / 8e-3)


def test_without_a_link_everything_is_resident():
    system = system_of(0)
    system.link = None
    outcome = simulate(trace_of([one(0, 1)], [one(1)]), model_of(), system, policy_of(residency="lru"))
    assert (outcome.hits, outcome.misses) == (3, 0)
    assert outcome.total_s == outcome.clairvoyant_s == ms(2 + 1 + 1 + 1)
    assert outcome.units["unit"].tolist() == ["gpu", "cpu", "link_in", "link_out"]


def test_slots_are_what_the_memory_leaves():
    # 10 MB less 1 reserved, 2 of dense weights and 1 of the head: 6 MB, in experts of up to 2.5 MB: 2, one a layer.
    system = system_of()
    system.gpu.memory_gb, system.gpu.reserve_gb = 0.010, 0.001
    model = model_of(layers=2, once_params=MB)
    sizes = np.array([[MB, MB], [MB, 2.5 * MB]])
    trace = trace_of([[[0, 1], []]], [[[0, 1], []]], expert_bytes=sizes)
    assert simulate(trace, model, system, policy_of(residency="lru")).hits == 1
    assert simulate(trace, model, system, policy_of(residency="lru", scope="global")).hits == 2


def test_the_yardsticks():
    # Work bound: 1 ms of dense, then 2 MB at 1 + 0.5 GB/s (compute: 20 MFLOP of 22 GFLOP/s, 0.9 ms).
    # Clairvoyant, one slot: 0, with more rows, is resident, 1 is fetched: 5 ms.
    trace = trace_of([one(0)] * 9 + [one(1)])
    outcome = simulate(trace, model_of(), system_of(), policy_of(residency="lru"), slots=1)
    assert outcome.work_bound_s == ms(1 + 2 / 1.5)
    assert outcome.clairvoyant_s == ms(1 + 5)
    assert outcome.total_s == ms(1 + 9)
    # The slots of all layers count under each scope.
    policy = policy_of(residency="lru")
    outcome = simulate(trace_of([[[0, 1], []]]), model_of(layers=2), system_of(), policy, slots=2)
    assert outcome.clairvoyant_s == ms(2 + 2)
    # hot and ndp are their own yardstick
    for dispatch in ("hot", "ndp"):
        outcome = simulate(trace, model_of(), system_of(), policy_of(dispatch=dispatch), slots=1)
        assert outcome.clairvoyant_s == outcome.total_s


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_conservation(tmp_path_factory, data):
    case = data.draw(strategies.cases())
    trace, model, system = case.trace, case.model, case.system
    units = system.units
    folder = tmp_path_factory.mktemp("files")
    loads, static = (
        strategies.write_loads(folder / "loads.csv", case),
        strategies.write_static(folder / "static.csv", case),
    )
    policy = data.draw(strategies.policies(units, loads, static))
    outcome = simulate(trace, model, system, policy, case.slots)
    cells = int((trace.experts >= 0).sum())
    active = sum(len(trace.demand(step, layer)) for step in range(trace.steps) for layer in range(model.moe_layers))

    assert outcome.units["rows"].sum() == pytest.approx(cells)
    placed = outcome.layers["gpu_experts"].sum() + outcome.layers["ndp_experts"].sum()
    if policy.dispatch == "split":  # shares at most one expert in a layer, which then counts on both sides
        assert active <= placed <= active + trace.steps * model.moe_layers
    else:
        assert placed == active
    assert outcome.hits + outcome.misses == active
    assert outcome.steps["hits"].sum() == outcome.layers["hits"].sum()
    assert (outcome.steps["duration_s"] > 0).all()
    assert outcome.prefill_s + outcome.decode_s + outcome.mixed_s == pytest.approx(outcome.total_s)
    assert outcome.work_bound_s <= outcome.total_s * (1 + 1e-12)
    assert outcome.layers["demand_bytes"].sum() == pytest.approx(outcome.demand_bytes)
    names = outcome.units["unit"].tolist()
    computing = [name == "gpu" or name.startswith("ndp") for name in names]
    assert (outcome.units["utilization"][computing] <= 1 + 1e-12).all()
    assert outcome.units["bytes"][names.index("link_in")] == pytest.approx(
        outcome.demand_bytes + outcome.prefetch_bytes + outcome.units["bytes"][names.index("link_out")]
    )
    assert outcome.requests["prompt_rows"].sum() + outcome.requests["output_rows"].sum() == len(trace.request)
    assert np.nanmax(outcome.requests["e2e_s"]) <= outcome.total_s * (1 + 1e-12)
    completed = outcome.units["experts"][names.index("link_in")]
    assert outcome.used <= completed
    if policy.prefetch == "none":
        assert (outcome.prefetch_bytes, outcome.late, outcome.wasted, outcome.used) == (0, 0, 0, 0)
    if policy.residency == "none":
        assert outcome.hits == 0
    if policy.dispatch == "gpu":
        assert outcome.layers["ndp_experts"].sum() == 0


@settings(max_examples=30, deadline=None)
@given(strategies.cases(max_experts=7, max_units=3))
def test_optimal_is_not_beaten_when_nothing_is_kept(case):
    if case.system.units == 0:
        return
    best = simulate(case.trace, case.model, case.system, policy_of(dispatch="optimal"), case.slots)
    for dispatch in ("ndp", "gpu", "hot", "balance"):
        other = simulate(case.trace, case.model, case.system, policy_of(dispatch=dispatch), case.slots)
        assert (best.steps["moe_s"] <= other.steps["moe_s"] * (1 + 1e-9)).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 6))
def test_belady_is_not_beaten_one_demand_at_a_time(demands, slots):
    trace = trace_of(*[[one(e)] for e in demands])
    best = sum(hits_of(trace, "belady", slots, model_of(experts=7)))
    for residency in ("lru", "lfu", "ewma"):
        assert best >= sum(hits_of(trace, residency, slots, model_of(experts=7)))
