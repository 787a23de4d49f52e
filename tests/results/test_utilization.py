"""How busy the link is: what passes it at the same time counts once, so that no share is above 1."""

import numpy as np
import pytest

import moetrace as mt
from moetrace.spec import Gpu, Link, Ndp

HOT = mt.PolicySpec(name="hot", dispatch="hot")


def link_in(unit_ms: float, dense_ms: float):
    """One row of four experts: `hot` fetches three (1 ms each, 0 to 3 ms); one runs on the unit, 0.5 ms each way."""
    model = mt.Model(
        name="tiny",
        moe_layers=1,
        experts=4,
        top_k=4,
        hidden=1000,
        expert_intermediate=1000,
        expert_matrices=1,
        weight_bits=8,  # 1 MB an expert
        dense_weight_bits=8,
        activation_bytes=500,  # 0.5 MB a row
        dense_params_per_layer=round(dense_ms * 1e9),
        once_params=0,
        kv_bytes_per_token_layer=0,
    )
    system = mt.System(
        name="slow link",
        gpu=Gpu(name="fast", tflops=1e6, bandwidth_gb_s=1e3, memory_gb=10, reserve_gb=0, launch_us=0),
        ndp=Ndp(units=1, gmac_s=1e6, bandwidth_gb_s=1 / unit_ms, capacity_gb=1, command_us=0),
        link=Link(bandwidth_gb_s=1.0, latency_us=0),
    )
    trace = mt.Trace.from_arrays(np.arange(4).reshape(1, 1, 4), num_experts=4)
    units = mt.replay(trace, model=model, system=system, policies=[HOT], slots=0).units
    return units.filter(unit="link_in").row(0, named=True)


def test_activations_that_return_beside_weights_count_once():
    """They return from 2.5 to 3 ms, while the third expert comes in: 3.5 ms of transfers in 3 ms."""
    found = link_in(unit_ms=2, dense_ms=0)
    assert found["busy_s"] == pytest.approx(3.5e-3)
    assert found["utilization"] == pytest.approx(1, rel=1e-3) and found["utilization"] <= 1


@pytest.mark.parametrize(
    ("unit_ms", "busy_ms"),
    [
        (2, 3),  # back from 2.5 to 3 ms: all of it beside weights
        (2.2, 3.2),  # from 2.7 to 3.2: 0.3 ms of it
        (2.9, 3.5),  # from 3.4 to 3.9, a gap of 0.4 ms after the weights
    ],
)
def test_only_what_overlaps_counts_once(unit_ms, busy_ms):
    found = link_in(unit_ms, dense_ms=1)
    assert found["busy_s"] == pytest.approx(3.5e-3)
    assert found["utilization"] == pytest.approx(busy_ms / (1 + max(3, unit_ms + 1)), rel=1e-3)


def test_no_part_of_any_preset_is_busier_than_always():
    trace = mt.generate_trace("tiny-olmoe", requests=4, prompt=8, output=8, batch=4)
    free = {"gpu.launch_us": 0, "ndp.command_us": 0, "link.latency_us": 0}
    for policy in ("monde", "edge-ndp", "edge-ndp-tp-lb", "on-demand"):
        units = mt.replay(trace, system=mt.load_system("edge-ndp", free), policies=policy, slots=24).units
        assert units["utilization"].is_between(0, 1).all(), policy
