"""Stragglers: GPUs of a cluster that compute and read at a factor of the others' rates."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.clusters import SLOW, cluster, drawn_trace, lane, ms, of, policy, trace_of

KINDS = ("ep-block", "eplb")


def with_factors(folder, factors, network=None, gpu=None, **gpus):
    path = folder / "factors.csv"
    path.write_text("".join(f"{name},{factor!r}\n" for name, factor in factors.items()))
    return cluster(network, gpu, rate_factors=str(path), **gpus)


def test_times_by_hand(tmp_path):
    """Four experts on two GPUs of two, as in test_cluster: attention 1 ms, an expert 1 ms, 5 rows of 1 ms out."""
    trace = trace_of([[[0, 1]], [[0, 2]], [[0, 3]]])
    apart = {"attention": 1, "experts": 2}
    slow = with_factors(tmp_path, {"experts1": 0.5}, SLOW, {"launch_us": 100}, **apart)
    found = lane(trace, slow, policy(placement="ep-block"))
    # GPU 1 reads its two experts in 2 ms each; starts of 0.1 ms are those of every GPU.
    assert ms(found) == pytest.approx([1.1 + 5 + 4.2 + 5 + 0.1])
    assert (found.log.unit["busy_s"] * 1e3).tolist() == pytest.approx([1.2, 2.2, 4.2, 1.2, 5, 4.2, 5])
    assert found.log.step["imbalance"].tolist() == pytest.approx([4.2 / 3.2])
    slow = with_factors(tmp_path, {"gpu0": 0.25}, SLOW, {"launch_us": 100}, gpus=2)
    found = lane(trace, slow, policy(placement="ep-block"), once_params=1_000_000)
    # Attention and head wait for GPU 0. GPU 1 takes a quarter of the time, apart from the starts.
    assert ms(found) == pytest.approx([4.1 + 1.5 + 8.2 + 1.5 + 4.1])
    assert (found.log.unit["busy_s"] * 1e3).tolist() == pytest.approx([8.2 + 8.2, 2.2 + 2.2, 8.2 + 8.2, 3])


def test_further_kernels_wait_for_the_slowest(tmp_path):
    trace = trace_of([[[0, 1]], [[2, 3]]])
    slow = with_factors(tmp_path, {"attention1": 0.5}, SLOW, {"launch_us": 100}, attention=2, experts=1)
    plain = cluster(SLOW, {"launch_us": 100}, attention=2, experts=1)
    changed = {"activation_bytes": 1000.0}  # a row of 1 MB: written and read in 2 ms
    for kernels in (1, 3):
        bulk = policy(kernels_per_layer=kernels)
        found, before = lane(trace, slow, bulk, **changed), lane(trace, plain, bulk, **changed)
        assert ms(found)[0] - ms(before)[0] == pytest.approx(1 + 2 * (kernels - 1))
        assert found.log.unit["busy_s"][0] == pytest.approx(before.log.unit["busy_s"][0], rel=1e-12)
        assert found.log.unit["busy_s"][1] - before.log.unit["busy_s"][1] == pytest.approx(1e-3 * (2 * kernels - 1))


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6),
    factors=st.lists(st.floats(0.05, 2), min_size=4, max_size=4),
    gpus=st.sampled_from([{"gpus": 4}, {"attention": 2, "experts": 2}]),
    roofline=st.sampled_from(["max", "sum"]),
)
def test_no_schedule_and_no_placement_beats_the_bound(tmp_path, seed, factors, gpus, roofline):
    trace = drawn_trace(seed)
    named = dict(enumerate(factors))
    slow = with_factors(tmp_path, named, None, {"roofline": roofline}, **gpus)
    policies = [policy(placement=kind) for kind in KINDS] + [policy("pipeline:2,2"), policy(execution="fused")]
    found = of(trace, slow, policies)
    for one in found:
        assert one.work_bound_s <= one.duration_s.sum() * (1 + 1e-9)
    plain = of(trace, cluster(None, {"roofline": roofline}, **gpus), policies)
    slower = of(trace, with_factors(tmp_path, {0: 0.25}, None, {"roofline": roofline}, **gpus), policies)
    for one, before in zip(slower, plain, strict=True):
        assert (one.duration_s >= before.duration_s * (1 - 1e-12)).all()
        assert one.work_bound_s > before.work_bound_s


@settings(deadline=None, max_examples=10, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), gpus=st.sampled_from([{"gpus": 3}, {"attention": 2, "experts": 3}]))
def test_factors_of_one_change_no_bit(tmp_path, seed, gpus):
    trace = drawn_trace(seed)
    network = {"bandwidth_gb_s": 1e-3, "dispatch_latency_us": 50, "combine_latency_us": 70}
    policies = [policy(placement="eplb"), policy("pipeline:2,2"), policy(execution="fused")]
    plain = of(trace, cluster(network, {"launch_us": 20}, **gpus), policies)
    ones = of(trace, with_factors(tmp_path, {0: 1.0}, network, {"launch_us": 20}, **gpus), policies)
    for one, before in zip(ones, plain, strict=True):
        assert np.array_equal(one.log.step, before.log.step)
        assert np.array_equal(one.log.unit, before.log.unit)
        assert one.work_bound_s == before.work_bound_s


def test_equally_slow_gpus_are_one_slower_gpu(tmp_path):
    trace = drawn_trace(1)
    slow = with_factors(tmp_path, dict.fromkeys(range(3), 0.5), gpu={"launch_us": 20}, gpus=3)
    half = cluster(gpu={"launch_us": 20, "tflops": 0.01, "bandwidth_gb_s": 0.5}, gpus=3)
    for schedule in ("serial", "pipeline:2,2"):
        found, expected = (lane(trace, on, policy(schedule)) for on in (slow, half))
        np.testing.assert_allclose(found.duration_s, expected.duration_s, rtol=1e-12)
        np.testing.assert_allclose(found.log.unit["busy_s"], expected.log.unit["busy_s"], rtol=1e-12)
        assert found.work_bound_s == pytest.approx(expected.work_bound_s, rel=1e-12)
