"""What a replay compares where no policy is named, on every preset system, and who pays the hand-off to a CPU."""

import pytest

import moetrace as mt
from moetrace.spec import list_presets, load_system

TINY, QWEN = "traces/tiny-olmoe.h5", "traces/qwen3-30b-a3b-b1.h5"


@pytest.mark.parametrize(("trace", "bits"), [(TINY, 16), (QWEN, 4.5)])
@pytest.mark.parametrize("name", list_presets("systems"))
def test_two_policies_run_and_the_first_moves_nothing_where_all_experts_fit(name, trace, bits):
    system = load_system(name)
    result = mt.replay(trace, system=system, overrides={"model.weight_bits": bits})
    rows = result.summary.rows(named=True)
    assert len(rows) == (1 if system.link is None and system.cluster is None else 2)
    fits = result.run.slots == result.run.model.all_experts
    assert fits or trace == QWEN
    assert any("policy resident would keep them" in said for said in result.warnings) == (fits and system.units > 0)
    if fits and not system.units and system.cluster is None:
        assert (rows[0]["demand_bytes"], rows[0]["hit_rate"]) == (0, 1)


def seconds(system, policy, phase, changes=None):
    result = mt.replay(TINY, system=system, policies=policy, overrides=changes or {})
    return result.summary[f"{phase}_s"].item()


@pytest.mark.parametrize("name", ["rtx3060-ddr4", "rtx3090-ddr4", "rtx4090-ddr5", "rtx5090-ddr5", "epyc-ktransformers"])
def test_only_a_layer_that_runs_experts_on_the_cpu_pays_the_hand_off(name):
    free = {"system.cpu.command_us": 0.0}
    assert seconds(name, "n-cpu-moe", "total") == seconds(name, "n-cpu-moe", "total", free)
    layers_done = mt.load_model("tiny-olmoe").moe_layers * 6981
    saved_s = seconds(name, "ktransformers", "total") - seconds(name, "ktransformers", "total", free)
    assert saved_s == pytest.approx(5e-6 * layers_done)


def test_gpus_differ_by_their_memory_in_decode_and_by_their_arithmetic_in_prefill():
    no_starts = {"system.gpu.launch_us": 0.0}
    decode, prefill = (
        seconds("rtx3090-ddr4", "n-cpu-moe", phase, no_starts) / seconds("rtx4090-ddr5", "n-cpu-moe", phase, no_starts)
        for phase in ("decode", "prefill")
    )
    assert decode == pytest.approx(1008 / 936, rel=0.02)  # and the arithmetic of a row, which the memory does not hide
    assert 1008 / 936 < prefill < 165 / 71
