"""The kernels of a cluster against a slow, obvious replay in plain Python that was written from the same text."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from support.cluster_cases import cluster_cases
from support.cluster_replays import replayed

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-13}
STAGES = {"dispatch_s": "A2E", "experts_s": "E", "combine_s": "E2A"}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cluster_cases())
def test_steps_are_those_of_the_oracle(case):
    # The timing model does not define the latency of a fused transfer over two tiers; the kernel takes the slower
    # tier's.
    nodes = "gpus_per_node" in case.system["network"]
    assume(not (nodes and case.policy.get("execution") == "fused"))
    found, expected = replayed(case).lanes[0], case.run()
    steps = found.log.step
    for phase, (r1, r2, order, where) in expected.chosen.items():
        cut = found.fabric.cut[phase]
        if case.policy.get("schedule", "serial") != "serial":
            assert (cut["micro_batches"], cut["chunks"]) == (r1, r2)
            assert bool(cut["attention_first"]) == (order == "aass")
            assert not cut["apart"] or where == "apart"  # it takes nothing where the model has no shared experts
    for name in ("duration_s", "pause_s", "head_s", "exposed_s", "moved_bytes"):
        np.testing.assert_allclose(steps[name], [getattr(step, name) for step in expected.steps], **CLOSE, err_msg=name)
    for name, stage in STAGES.items():
        np.testing.assert_allclose(steps[name], [step.stage_s[stage] for step in expected.steps], **CLOSE, err_msg=name)
    attended = [step.stage_s["A"] + step.stage_s["S"] + step.overhead_s for step in expected.steps]
    np.testing.assert_allclose(steps["attention_s"], attended, **CLOSE)
    wire = [step.dispatch_bytes + step.combine_bytes for step in expected.steps]
    np.testing.assert_allclose(steps["network_bytes"], wire, **CLOSE)
    assert steps["distinct"].tolist() == [step.fan_out_gpus for step in expected.steps]
    assert steps["routed"].tolist() == [step.fan_out_cells for step in expected.steps]
    if expected.taxes is not None and not nodes:
        for tax in ("launch", "locality", "barrier"):
            np.testing.assert_allclose(
                steps[f"{tax}_tax_s"], [step.taxes[tax] for step in expected.steps], rtol=1e-9, atol=1e-12, err_msg=tax
            )


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cluster_cases())
def test_sums_are_those_of_the_oracle(case):
    found, expected = replayed(case).lanes[0], case.run()
    clock, log = found.books.clock[0], found.log
    assert (clock["plans"], clock["pauses"]) == (expected.plans, expected.pauses)
    assert found.overhead_s == pytest.approx(expected.overhead_s, rel=1e-9)
    assert 0 < found.work_bound_s <= expected.total_s * (1 + 1e-9)
    parts = [part.name for part in found.parts]
    busy = {part: float(log.unit["busy_s"][row]) for row, part in enumerate(parts)}
    for unit in range(len(expected.busy_s)):
        name = list(expected.busy_s)[unit]
        assert busy[parts[unit]] == pytest.approx(expected.busy_s[name], rel=1e-9, abs=1e-13), name
        assert log.unit["bytes"][unit] == pytest.approx(expected.gpu_bytes[name], rel=1e-9), name
    behind = len(expected.busy_s)
    resources = list(expected.resource_s.values())
    assert [busy[name] for name in parts[behind:]] == pytest.approx(resources, rel=1e-9, abs=1e-13)
    holders = range(0 if found.fabric.gpus["colocated"][0] else int(found.fabric.gpus["attention"][0]), behind)
    assert [log.unit["rows"][row] for row in holders] == list(expected.gpu_rows.values())
    assert [log.unit["experts"][row] for row in holders] == list(expected.gpu_slots.values())
    layers = log.layer
    count = np.maximum(layers["imbalance_count"], 1)
    for name, given_layers in (
        ("imbalance_sum", expected.imbalance_s),
        ("imbalance_rows_sum", expected.imbalance_rows),
    ):
        mine = np.where(layers["imbalance_count"] > 0, layers[name] / count, np.nan)
        np.testing.assert_allclose(mine, given_layers, rtol=1e-9)
    total = found.books.total[0]
    fan_out = total["distinct"] / total["routed"] if total["routed"] else math.nan
    assert fan_out == pytest.approx(expected.fan_out, rel=1e-12, nan_ok=True)
