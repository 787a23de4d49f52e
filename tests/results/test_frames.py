"""Frames and figures against the oracle, and against a replay small enough to be worked out by hand."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle, strategies

import moetrace as mt
from moetrace.results import frames
from moetrace.spec import Gpu, Link, Ndp

STEPS = """policy step phase rows start_s duration_s dense_s moe_s head_s wait_s hits misses demand_bytes
    prefetch_bytes late imbalance"""
UNITS = "policy unit busy_s utilization experts rows bytes"
LAYERS = "policy layer dense_s moe_s hits misses imbalance gpu_experts ndp_experts demand_bytes"
EXPERTS = "layer expert rows steps"
REQUESTS = """policy request prompt_rows output_rows ttft_s tpot_s e2e_s turns tokens recomputed_rows drafted_rows
    accepted_rows ttft_max_s tokens_per_s itl_s_p50 itl_s_p95 itl_s_p99"""


def ms(*values):
    return pytest.approx([value * 1e-3 for value in values], rel=1e-9)


@pytest.fixture(scope="module")
def by_hand():
    """Two units; expert 0, which lives on unit 0, takes 2 ms there and 8 us each way for a row's activations.

    dense takes 1 ms. Request 7 has its prompt in step 0 and tokens in steps 2 and 3, request 3 its prompt in step 1
    and a token in step 2. So steps take 3.016 ms, but the one of two rows 3.032.
    """
    model = mt.Model(
        name="two",
        moe_layers=1,
        experts=2,
        top_k=1,
        hidden=1000,
        expert_intermediate=1000,
        expert_matrices=1,
        weight_bits=8,
        dense_weight_bits=8,
        dense_params_per_layer=1_000_000,
        once_params=0,
        kv_bytes_per_token_layer=0,
    )
    gpu = Gpu(name="slow", tflops=0.02, bandwidth_gb_s=1, memory_gb=1, reserve_gb=0, launch_us=0)
    ndp = Ndp(units=2, gmac_s=1, bandwidth_gb_s=0.5, capacity_gb=1, command_us=0)
    system = mt.System(name="slow", gpu=gpu, ndp=ndp, link=Link(bandwidth_gb_s=0.25, latency_us=0))
    trace = mt.Trace.from_arrays(
        np.zeros((5, 1, 1), np.uint8),
        num_experts=2,
        request=np.array([7, 3, 7, 3, 7], np.int32),
        steps=np.array([1, 1, 2, 1]),
        phase=np.array([0, 0, 1, 1], np.uint8),
    )
    return mt.replay(trace, model=model, system=system, policies="ndp-ep")


def test_columns_are_those_of_the_contract(by_hand):
    assert by_hand.steps.columns == STEPS.split()
    assert by_hand.units.columns == UNITS.split()
    assert by_hand.layers.columns == LAYERS.split()
    assert by_hand.requests.columns == REQUESTS.split()
    assert by_hand.experts.columns == EXPERTS.split()


def test_experts_count_rows_and_steps_once_for_all_policies():
    trace = mt.generate_trace("tiny-olmoe", requests=5, prompt=7, output=9, batch=3)
    found = mt.replay(trace, policies=["ndp-ep", "monde"]).experts
    rows, steps = np.zeros((6, 32), int), np.zeros((6, 32), int)
    chosen = np.concatenate([block.experts for block in trace.blocks()])
    for begin, end in zip(trace.offset[:-1], trace.offset[1:], strict=True):
        for layer in range(6):
            ids = chosen[begin:end, layer].ravel().tolist()
            for expert in ids:
                rows[layer, expert] += 1
            for expert in set(ids):
                steps[layer, expert] += 1
    assert found["layer"].to_list() == [layer for layer in range(6) for _ in range(32)]
    assert found["expert"].to_list() == list(range(32)) * 6
    assert found["rows"].to_list() == rows.ravel().tolist()
    assert found["steps"].to_list() == steps.ravel().tolist()


@pytest.mark.parametrize("block_bytes", [1, 1000])
def test_experts_are_not_counted_again_where_a_policy_looks_ahead(monkeypatch, block_bytes):
    trace = mt.generate_trace("tiny-olmoe", requests=5, prompt=7, output=9, batch=3)
    plain = mt.replay(trace, policies="on-demand").experts
    monkeypatch.setattr("moetrace.trace.format.BLOCK_BYTES", block_bytes)
    ahead = mt.PolicySpec(name="ahead", residency="lru", prefetch="oracle:13")
    assert mt.replay(trace, policies=[ahead]).experts.equals(plain)


def test_steps_and_requests_by_hand(by_hand):
    steps, requests = by_hand.steps, by_hand.requests
    assert steps["phase"].to_list() == ["prefill", "prefill", "decode", "decode"]
    assert steps["rows"].to_list() == [1, 1, 2, 1]
    assert steps["duration_s"].to_list() == ms(3.016, 3.016, 3.032, 3.016)
    assert steps["start_s"].to_list() == ms(0, 3.016, 6.032, 9.064)
    assert steps["imbalance"].to_list() == [2.0] * 4
    assert requests["request"].to_list() == [3, 7]
    assert requests["prompt_rows"].to_list() == [1, 1]
    assert requests["output_rows"].to_list() == [1, 2]
    assert requests["ttft_s"].to_list() == ms(3.016, 3.016)
    assert requests["tpot_s"].to_list() == ms(3.032, 9.064 / 2)
    assert requests["e2e_s"].to_list() == ms(6.048, 12.08)
    # Request 7 waits in step 1: its tokens come 6.048 and 3.016 ms after their predecessors.
    assert requests["itl_s_p50"].to_list() == ms(3.032, (6.048 + 3.016) / 2)
    assert requests["tokens_per_s"].to_list() == pytest.approx([1 / 0.003032, 2 / 0.009064])
    assert requests["tokens"].to_list() == [1, 2]


def test_units_by_hand(by_hand):
    units = {row["unit"]: row for row in by_hand.units.to_dicts()}
    assert list(units) == ["gpu", "ndp0", "ndp1", "cpu", "link_in", "link_out"]
    assert [units[name]["busy_s"] for name in units] == ms(4, 8, 0, 0, 0.04, 0.04)
    assert units["ndp0"]["utilization"] == pytest.approx(8 / 12.08)
    assert (units["ndp0"]["experts"], units["ndp0"]["rows"], units["ndp0"]["bytes"]) == (4, 5, 4e6)
    assert (units["gpu"]["experts"], units["gpu"]["bytes"]) == (0, 4e6)


def test_summary_by_hand(by_hand):
    (policy,) = by_hand.to_dict()["policies"]
    assert [policy[name] for name in ("total_s", "prefill_s", "decode_s", "mixed_s")] == ms(12.08, 6.032, 6.048, 0)
    assert policy["tokens_per_s"] == pytest.approx(3 / 0.01208)
    # Four steps, linear: the 95th percentile lies 0.85 of the way from the third to the fourth.
    spread = {"mean": 3.02, "p50": 3.016, "p95": 3.016 + 0.85 * 0.016, "p99": 3.016 + 0.97 * 0.016, "max": 3.032}
    assert policy["step_s"] == {name: pytest.approx(value * 1e-3) for name, value in spread.items()}
    assert policy["itl_s"] == {
        name: pytest.approx(value * 1e-3)
        for name, value in {
            "mean": (3.032 + 6.048 + 3.016) / 3,
            "p50": 3.032,
            "p95": 3.032 + 0.9 * 3.016,
            "p99": 3.032 + 0.98 * 3.016,
            "max": 6.048,
        }.items()
    }
    assert policy["request_tokens_per_s"]["p50"] == pytest.approx((1 / 0.003032 + 2 / 0.009064) / 2)
    assert policy["tpot_s"]["p50"] == pytest.approx((3.032 + 4.532) / 2 * 1e-3)
    assert (policy["hits"], policy["misses"], policy["hit_rate"], policy["imbalance_mean"]) == (0, 4, 0.0, 2.0)
    # 1 MB over 1 + 2 x 0.5 GB/s beside 1 ms of dense; what runs on units only ignores residency.
    assert [policy["work_bound_s"], policy["clairvoyant_s"]] == ms(6, 12.08)
    assert policy["speedup"] == 1.0
    utilization = policy["utilization"]
    assert utilization["ndp"] == [pytest.approx(8 / 12.08), 0.0]
    assert (utilization["link_in"], utilization["cpu"]) == (pytest.approx(0.04 / 12.08), 0.0)
    (row,) = by_hand.summary.to_dicts()
    assert row["total_s"] == policy["total_s"]
    assert row["tpot_s_p50"] == policy["tpot_s"]["p50"]
    assert row["utilization_ndp"] == pytest.approx(4 / 12.08)


def same(ours: pl.Series, theirs):
    """Floats to 1e-9, counts and names exactly, null where the oracle has NaN."""
    assert not (ours.dtype.is_float() and ours.is_nan().any())
    theirs = np.asarray(theirs)
    if theirs.dtype.kind == "f":
        np.testing.assert_allclose(ours.cast(pl.Float64).to_numpy(), theirs, rtol=1e-9, atol=1e-12, err_msg=ours.name)
    else:
        assert ours.to_list() == theirs.tolist(), ours.name


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_column_is_the_oracle_s(data):
    case = data.draw(strategies.cases(max_steps=8))
    units = case.system.ndp.units if case.system.ndp else 0
    policies = [data.draw(strategies.policies(units), label=f"policy {number}") for number in range(2)]
    trace = mt.Trace.from_arrays(num_experts=case.model.experts, **strategies.as_arrays(case.trace, case.model.experts))
    options = {"model": case.model, "system": case.system, "slots": case.slots, "ignore_capacity": True}
    result = mt.replay(trace, policies=policies, jobs=2, **options)
    phases = np.array(["prefill", "decode", "mixed"])
    names = [lane.policy.name for lane in result.run.lanes]
    outcomes = [oracle.simulate(case.trace, case.model, case.system, policy, case.slots) for policy in policies]
    for name, outcome, figures in zip(names, outcomes, result.to_dict()["policies"], strict=True):
        for ours, theirs in (
            (result.steps, outcome.steps | {"phase": phases[outcome.steps["phase"].astype(int)]}),
            (result.units, outcome.units),
            (result.layers, outcome.layers),
            (result.requests, outcome.requests),
        ):
            mine = ours.filter(pl.col("policy") == name)
            for column in set(mine.columns) - {"policy", "step", "layer"}:
                same(mine[column], theirs[column])
        for figure in ("prefill_s", "decode_s", "mixed_s", "tokens_per_s", "demand_bytes", "prefetch_bytes"):
            assert figures[figure] == pytest.approx(getattr(outcome, figure), rel=1e-9, abs=1e-12), figure
        for figure in ("total_s", "work_bound_s", "clairvoyant_s"):
            assert figures[figure] == pytest.approx(getattr(outcome, figure), rel=1e-9), figure
        for figure in ("hits", "misses", "late", "wasted", "used", "optimal_fallbacks"):
            assert figures[figure] == getattr(outcome, figure), figure
        mean = None if np.isnan(outcome.imbalance_mean) else pytest.approx(outcome.imbalance_mean)
        assert figures["imbalance_mean"] == mean
        assert figures["speedup"] == pytest.approx(outcomes[0].total_s / outcome.total_s)
        steps_s = outcome.steps["duration_s"]
        assert figures["step_s"]["p99"] == pytest.approx(np.quantile(steps_s, 0.99))


def test_slices_of_a_mapped_log_are_the_whole(by_hand, tmp_path, monkeypatch):
    lane = by_hand.run.lanes[0]
    mapped = np.memmap(tmp_path / "log", lane.log.step.dtype, "w+", shape=lane.log.step.shape)
    mapped[:] = lane.log.step
    run = replace(by_hand.run, lanes=[replace(lane, log=lane.log._replace(step=mapped))])
    monkeypatch.setattr(frames, "SLICE_STEPS", 3)
    slices = list(frames.step_slices(run))
    assert [len(each) for each in slices] == [3, 1]
    assert pl.concat(slices).equals(by_hand.steps)


def test_times_are_null_where_undefined():
    trace = mt.Trace.from_arrays(
        np.full((3, 6, 4), 255, np.uint8),
        num_experts=32,
        model="tiny-olmoe",
        request=np.array([0, 1, 0], np.int32),
        phase=np.array([0, 1, 0], np.uint8),
    )
    result = mt.replay(trace, policies=["edge-ndp"])
    assert result.requests["ttft_s"].is_null().to_list() == [False, True]
    assert result.requests["tpot_s"].is_null().to_list() == [True, False]
    # No row chooses anything: nothing hits, misses or is out of balance.
    assert result.steps["imbalance"].null_count() == 3
    assert result.layers["imbalance"].null_count() == 6
    (policy,) = result.to_dict()["policies"]
    assert (policy["hit_rate"], policy["imbalance_mean"]) == (None, None)
    assert result.summary["hit_rate"].to_list() == [None]
