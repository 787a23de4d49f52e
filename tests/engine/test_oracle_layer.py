"""The oracle on single layers: time line, placement and dispatch, worked out by hand."""

import numpy as np
import pytest
from support.by_hand import MB, model_of, ms, one, policy_of, system_of, trace_of, unit
from support.oracle import simulate
from support.oracle_layer import longest_first


def test_gpu_runs_each_expert_as_it_arrives():
    # Expert 0 has 100 rows: 10 ms on the GPU, from 4 to 14. Expert 1 has one: there at 8, runs from 14 to 15.
    trace = trace_of([one(0)] * 100 + [one(1)])
    outcome = simulate(trace, model_of(), system_of(), policy_of(dispatch="gpu"))
    assert outcome.steps["moe_s"] == ms(15)
    # dense: 101 rows x 2 MFLOP / 20 GFLOP/s = 10.1 ms, more than the 1 ms of its weights
    assert outcome.total_s == ms(10.1 + 15)
    assert (outcome.hits, outcome.misses, outcome.demand_bytes) == (0, 2, 2 * MB)
    assert unit(outcome, "gpu")["busy_s"] == ms(10.1 + 11)
    assert unit(outcome, "gpu")["bytes"] == 3 * MB
    assert unit(outcome, "link_in")["busy_s"] == ms(8)
    assert unit(outcome, "link_in")["utilization"] == pytest.approx(8 / 25.1)


def test_fetches_go_one_after_another_in_demand_order():
    # Expert 1 has more rows, so it comes first: at 4, runs until 5; expert 0 is there at 8 and ends at 9.
    outcome = simulate(trace_of([one(1), one(1), one(0)]), model_of(), system_of(), policy_of())
    assert outcome.steps["moe_s"] == ms(9)


def test_resident_experts_run_while_the_rest_is_fetched():
    # Step 2 demands 0 (resident) and 1 (4 ms away): 0 runs from 0 to 1, 1 from 4 to 5.
    trace = trace_of([one(0)], [one(0), one(1)])
    outcome = simulate(trace, model_of(), system_of(), policy_of(residency="lru"), slots=2)
    np.testing.assert_allclose(outcome.steps["moe_s"], [5e-3, 5e-3])
    assert outcome.steps["hits"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("placement", "busiest", "sent"),
    [
        ("ep", 7, 11),  # {0, 2} 4 + 3 and {1, 3} 3 + 2
        ("ep-block", 8, 11),  # {0, 1} 4 + 4 and {2, 3} 2 + 2
        ("tp", 6, 22),  # half of each on both: 2 + 1.5 + 1.5 + 1, all rows to both
        ("tp:1", 7, 11),  # as ep
    ],
)
def test_placement_decides_the_busiest_unit(placement, busiest, sent):
    # Experts 0..3 have 4, 3, 3, 1 rows (for ep-block 4, 4, 2, 1); a unit takes max(2, n) ms, half of it max(1, n / 2).
    counts = (4, 4, 2, 1) if placement == "ep-block" else (4, 3, 3, 1)
    trace = trace_of([one(e) for e, n in enumerate(counts) for _ in range(n)])
    outcome = simulate(trace, model_of(experts=4), system_of(units=2), policy_of(placement, "ndp"))
    assert outcome.steps["moe_s"] == ms(busiest + 2 * 0.008 * sent)
    assert outcome.units["rows"].sum() == 11


def test_ep_lpt_takes_the_longest_first():
    # 5 -> unit 0, 4 -> unit 1, 3 -> unit 1 (4), tie 3 -> unit 0 (5): 8 and 7; ties go to the lower id, the lower unit.
    assert longest_first(np.array([3.0, 5.0, 4.0, 3.0]), 2) == [[1], [0], [1], [0]]


def test_groups_of_units_share_an_expert(tmp_path):
    # tp:2 of 4 units: even experts on units 0 and 1, odd ones on 2 and 3; expert 1 has 4 rows: 2 ms on each.
    trace = trace_of([one(1)] * 4 + [one(2)])
    outcome = simulate(trace, model_of(experts=3), system_of(units=4), policy_of("tp:2", "ndp"))
    np.testing.assert_allclose(outcome.units["busy_s"][1:5], [1e-3, 1e-3, 2e-3, 2e-3])
    np.testing.assert_allclose(outcome.units["rows"][1:5], [0.5, 0.5, 2, 2])
    np.testing.assert_allclose(outcome.units["bytes"][1:5], [MB / 2] * 4)
    assert outcome.imbalance_mean == pytest.approx(2 / 1.5)
    # ep-lpt by loads that put experts 0 and 2 apart from 1
    (tmp_path / "loads.csv").write_text("1,5,1\n")
    policy = policy_of("ep-lpt", "ndp", loads=str(tmp_path / "loads.csv"))
    outcome = simulate(trace, model_of(experts=3), system_of(units=2), policy)
    np.testing.assert_allclose(outcome.units["busy_s"][1:3], [4e-3, 2e-3])


def test_a_unit_gets_each_row_once():
    # 3 rows that choose both experts of the only unit: it is sent 3 rows, not 6. It works 3 + 3 ms.
    outcome = simulate(trace_of([one(0, 1)] * 3), model_of(), system_of(), policy_of(dispatch="ndp"))
    assert outcome.steps["moe_s"] == ms(6 + 2 * 0.024)
    for direction in ("link_in", "link_out"):
        assert unit(outcome, direction)["bytes"] == 6000
        assert unit(outcome, direction)["busy_s"] == ms(0.024)
    # on two units each gets 3 rows
    outcome = simulate(trace_of([one(0, 1)] * 3), model_of(), system_of(2), policy_of(dispatch="ndp"))
    assert outcome.steps["moe_s"] == ms(3 + 2 * 0.048)
    # one row absent: expert 1 has 2 rows, so unit 1 gets 2
    outcome = simulate(trace_of([one(0, 1), one(0, 1), one(0)]), model_of(), system_of(2), policy_of(dispatch="ndp"))
    assert outcome.steps["moe_s"] == ms(3 + 2 * 0.040)


def test_an_empty_layer_costs_its_dense():
    outcome = simulate(trace_of([one()], [one(0)]), model_of(), system_of(), policy_of(dispatch="ndp"))
    assert outcome.steps["moe_s"][0] == 0
    assert outcome.steps["duration_s"][0] == ms(1)
    assert np.isnan(outcome.steps["imbalance"][0])
    assert outcome.imbalance_mean == 1


def test_dense_attends_to_the_cached_tokens():
    # Requests 0 (positions 4, 5) and 7 (position 0): C = 6 + 1; 1000 bytes each: 7 us more. Head: 2 MB, 2 ms.
    trace = trace_of([one(0), one(0), one(0)], requests=[0, 7, 0])
    trace.position = np.array([4, 0, 5])
    model = model_of(kv_bytes_per_token_layer=1000, once_params=2 * MB)
    outcome = simulate(trace, model, system_of(), policy_of())
    assert outcome.steps["dense_s"] == ms(1.007)
    assert outcome.steps["head_s"] == ms(2)
    assert unit(outcome, "gpu")["bytes"] == 4 * MB


# --- Dispatch --------------------------------------------------------------------------------------------------------


def test_balance_moves_what_helps():
    # One unit. Expert 0 has 8 rows, 1 to 3 one each: D = A takes 8+2+2+2 = 14 ms (+ twice 11 rows out).
    # Move 0: fetched 4, ends at 5; units 6 -> 6. Move 1: GPU 9, units 4 -> worse. Moves 2 and 3 are as move 1.
    trace = trace_of([one(0)] * 8 + [one(1), one(2), one(3)])
    outcome = simulate(trace, model_of(experts=4), system_of(), policy_of(dispatch="balance"))
    assert outcome.steps["moe_s"] == ms(6 + 2 * 0.024)
    assert (outcome.layers["gpu_experts"], outcome.layers["ndp_experts"]) == (1, 3)
    assert unit(outcome, "gpu")["rows"] == 8
    # optimal cannot do better here, hot neither: its H = 1 is the same split
    for dispatch in ("optimal", "hot"):
        assert simulate(trace, model_of(experts=4), system_of(), policy_of(dispatch=dispatch)).total_s == pytest.approx(
            outcome.total_s, rel=1e-12
        )


def test_a_dispatch_of_the_users_own():
    # The caller sees the active experts in demand order, their rows and the resident ones. So does the clairvoyant run,
    # in which the first expert of each layer is resident. Expert 0 goes to the GPU: fetched in step 1 (5 ms), a hit in
    # step 2.
    seen = []

    def zero_to_gpu(layer, active, n, resident):
        seen.append((layer, active, n, sorted(resident)))
        return {0}

    trace = trace_of([one(0)], [one(0)] + [one(1)] * 9)
    outcome = simulate(trace, model_of(), system_of(), policy_of(residency="lru"), slots=1, dispatch=zero_to_gpu)
    assert seen == [
        (0, [0], {0: 1}, []),
        (0, [0], {0: 1}, [0]),
        (0, [1, 0], {0: 1, 1: 9}, [0]),
        (0, [1, 0], {0: 1, 1: 9}, [1]),
    ]
    np.testing.assert_allclose(outcome.steps["moe_s"], [5e-3, 9e-3 + 2 * 9 * 8e-6])
    # clairvoyant: 1 ms; then 0 must be fetched, and 1 still takes its 9 ms on the unit. dense: 1 ms each.
    assert outcome.clairvoyant_s == ms(1 + 1 + 1 + 9 + 0.144)


def test_static_experts_tip_the_balance(tmp_path):
    (tmp_path / "static.csv").write_text("0,0\n")
    policy = policy_of(dispatch="balance", residency="static", static=str(tmp_path / "static.csv"))
    # 0 (1 row, resident), 1 (3 rows) on two units, free activations: 3 ms wherever 0 runs, so it goes to the GPU.
    trace = trace_of([one(0), one(1), one(1), one(1)])
    outcome = simulate(trace, model_of(activation_bytes=0), system_of(2), policy, slots=1)
    assert outcome.steps["moe_s"] == ms(3)
    assert (outcome.layers["gpu_experts"], outcome.hits, outcome.misses) == (1, 1, 1)
    with pytest.raises(ValueError, match="does not fit"):
        simulate(trace, model_of(), system_of(2), policy, slots=0)


def test_optimal_prefers_few_then_early(tmp_path):
    # Two units, free activations, both experts resident with 1 row: G = {} 2 ms, {0} or {1} max(1, 2), {0, 1} 2.
    (tmp_path / "static.csv").write_text("0,0\n0,1\n")
    policy = policy_of(dispatch="optimal", residency="static", static=str(tmp_path / "static.csv"))
    model = model_of(activation_bytes=0)
    outcome = simulate(trace_of([one(0), one(1)]), model, system_of(2), policy, slots=2)
    assert outcome.steps["moe_s"] == ms(2)
    assert outcome.layers["gpu_experts"] == 0
    # One unit, nothing resident, 9 rows each: {} 18, {0} or {1} max(5, 9), {0, 1} fetched at 4 and 8, ends at 9.
    trace = trace_of([one(1)] * 9 + [one(0)] * 9)
    seen = simulate(trace, model, system_of(1), policy_of(dispatch="optimal"))
    assert seen.steps["moe_s"] == ms(9)
    assert unit(seen, "gpu")["rows"] == 9
    assert seen.optimal_fallbacks == 0


def test_optimal_falls_back_above_twenty():
    trace = trace_of([one(e) for e in range(21)])
    model = model_of(experts=21)
    outcome = simulate(trace, model, system_of(), policy_of(dispatch="optimal"))
    balance = simulate(trace, model, system_of(), policy_of(dispatch="balance"))
    assert outcome.optimal_fallbacks == 1
    assert outcome.total_s == balance.total_s
