"""Derived figures, against sums done by hand."""

import pytest

from moetrace.spec import load_model, load_system
from moetrace.spec.derived import model_figures, pair_figures, system_figures


def values(figures):
    return {figure.name: figure.value for figure in figures}


def test_model_figures():
    found = values(model_figures(load_model("mixtral-8x7b")))
    assert found["expert_mb"] == pytest.approx(3 * 4096 * 14336 * 2 / 1e6)
    assert found["expert_mflop_per_row"] == pytest.approx(2 * 3 * 4096 * 14336 / 1e6)
    assert found["kv_token_kb"] == pytest.approx(32 * 2 * 8 * 128 * 2 / 1e3)
    dense = 32 * 41_975_808 * 2
    assert found["weights_per_token_gb"] == pytest.approx((64 * 3 * 4096 * 14336 * 2 + dense + 32000 * 4096 * 2) / 1e9)
    assert "expert_mb_min" not in found
    uneven = values(model_figures(load_model("mixtral-8x7b", {"weight_bits": [16] * 31 + [8]})))
    assert uneven["expert_mb_min"] == uneven["expert_mb"] / 2


def test_system_figures():
    found = values(system_figures(load_system("edge-ndp", {"gpu.compute_efficiency": 0.5})))
    assert found["gpu_tflops"] == 56
    assert found["ndp_tflops"] == pytest.approx(6 * 0.512)
    assert found["ndp_bandwidth_gb_s"] == pytest.approx(614.4)
    assert found["ndp_flop_per_byte"] == pytest.approx(5)
    assert not any(name.startswith("ndp") for name in values(system_figures(load_system("jetson-orin"))))


def test_times_and_crossovers():
    found = values(pair_figures(load_model("qwen3-30b-a3b"), load_system("edge-ndp")))
    weight = flop = 9437184
    act = 4096 / 55e9 + 5e-6
    assert found["gpu_us"] == pytest.approx(1e6 * (weight / 960e9 + 5e-6))
    assert found["fetch_us"] == pytest.approx(1e6 * (weight / 55e9 + 5e-6))
    assert found["unit_us"] == pytest.approx(1e6 * (weight / 102.4e9 + 2e-6 + 2 * act))
    assert found["all_units_us"] == pytest.approx(1e6 * (weight / 614.4e9 + 2e-6 + 2 * (6 * 4096 / 55e9 + 5e-6)))
    # At 5 rows a unit computes for exactly as long as it reads: compute-bound only from the 6th on.
    assert found["ndp_compute_bound_rows"] == 6
    assert found["gpu_compute_bound_rows"] == 117

    def fetched_and_run(rows):
        return weight / 55e9 + 5e-6 + max(weight / 960e9, flop * rows / 112e12) + 5e-6

    def on_units(rows, g):
        work = max(weight / (g * 102.4e9), flop * rows / (g * 512e9)) + 2e-6
        return work + 2 * (g * rows * 4096 / 55e9 + 5e-6)

    for name, g in {"unit": 1, "all_units": 6}.items():
        rows = found[f"fetch_beats_{name}_rows"]
        assert fetched_and_run(rows) < on_units(rows, g)
        assert fetched_and_run(rows - 1) >= on_units(rows - 1, g)


def test_a_crossover_that_never_comes_is_undefined():
    weak = load_system("edge-ndp", {"gpu.tflops": 0.01})
    assert values(pair_figures(load_model("mixtral-8x7b"), weak))["fetch_beats_all_units_rows"] is None


def test_one_unit_is_all_units():
    found = values(pair_figures(load_model("mixtral-8x7b"), load_system("monde-cxl")))
    assert found["ndp_units_needed"] == 1
    assert len(found) == len(pair_figures(load_model("mixtral-8x7b"), load_system("monde-cxl")))


def test_a_cpu_is_priced_as_a_unit_is():
    cpu = {"tflops": 3.072, "bandwidth_gb_s": 614.4, "command_us": 2}
    given = {f"cpu.{name}": value for name, value in cpu.items()}
    base = {"link.bandwidth_gb_s": 55, "gpu.roofline": "sum", "gpu.layer_overhead_us": 30}
    on_cpu = load_system("rtx4090-offload", base | given | {"cpu.roofline": "sum", "cpu.memory_efficiency": 0.5})
    found = values(pair_figures(load_model("qwen3-30b-a3b"), on_cpu))
    weight = flop = 9437184
    act = 4096 / 55e9 + 5e-6
    assert found["cpu_us"] == pytest.approx(1e6 * (weight / 307.2e9 + flop / 3.072e12 + 2e-6 + 2 * act))
    assert found["gpu_us"] == pytest.approx(1e6 * (weight / 1008e9 + flop / 165e12 + 5e-6))
    assert found["dense_us"] == pytest.approx(1e6 * (19_136_512 * 2 / 1008e9 + 5e-6 + 30e-6))
    assert found["host_gb_needed"] == pytest.approx(6144 * weight / 1e9)
    assert values(system_figures(on_cpu))["cpu_bandwidth_gb_s"] == 307.2
    fed = load_system("rtx4090-offload", given | {"cpu.bandwidth_gb_s": 10})
    fetch_us = values(pair_figures(load_model("qwen3-30b-a3b"), fed))["fetch_us"]
    assert fetch_us == pytest.approx(1e6 * (weight / 10e9 + 5e-6))
    said = {
        next(row.meaning for row in system_figures(load_system(name, given)) if row.name == "cpu_tflops")
        for name in ("edge-ndp", "rtx4090-offload", "jetson-orin")
    }
    assert len(said) == 3


def test_without_units_or_link_there_is_less_to_say():
    offload = values(pair_figures(load_model("olmoe-1b-7b"), load_system("rtx4090-offload")))
    assert "fetch_us" in offload and "unit_us" not in offload
    assert "fetch_us" not in values(pair_figures(load_model("olmoe-1b-7b"), load_system("jetson-orin")))
