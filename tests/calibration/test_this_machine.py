"""What `calibrate --measure` times: shapes, order of sizes and units, on this machine's CPU and disk."""

import numpy as np
import polars as pl
import pytest

import moetrace as mt
from moetrace.calibration import disk, read_measured, this_machine
from moetrace.calibration.repeated_times import doubts_of_repeats, repeated


@pytest.fixture
def quick(monkeypatch):
    """Measure little: what is measured counts here, not how well."""
    monkeypatch.setattr(this_machine, "SHAPES", ((64, 32), (128, 64)))
    monkeypatch.setattr(this_machine, "POOL_BYTES", 1 << 20)
    monkeypatch.setattr(this_machine, "_LEAST_S", 0.0)
    monkeypatch.setattr(disk, "FILE_BYTES", 2 << 20)
    monkeypatch.setattr(disk, "READ_BYTES", (1 << 16, 1 << 20))


def test_cpu_and_disk_are_measured_and_read_back(quick, tmp_path):
    said = []
    found = this_machine.measure(("cpu", "disk"), folder=tmp_path, report=said.append)
    assert list(tmp_path.iterdir()) == [] and len(said) == 4
    kernels = found.kernels["cpu"]
    assert len(kernels) == 2 * len(this_machine.ACTIVE) * len(this_machine.ROWS)
    assert (kernels["seconds"] > 0).all() and (kernels["active"] <= kernels["experts"]).all()
    assert found.copies["disk"]["bytes"].to_list() == [1 << 16, 1 << 20]
    path = tmp_path / "t.csv"
    this_machine.to_frame(found).write_csv(path)
    again = read_measured(path)
    assert again.kernels["cpu"].equals(kernels.select(again.kernels["cpu"].columns))
    assert again.copies["disk"]["seconds"].to_list() == pytest.approx(found.copies["disk"]["seconds"].to_list())


def test_an_expert_runs_gate_up_and_down():
    """One expert of NumPy's runner takes no longer than eight, and reads what the rows say."""
    run = this_machine._numpy_runner().prepare(64, 32, 16)
    run(0, 8, 4)
    with pytest.raises(IndexError):
        run(9, 8, 4)  # there are 16 experts: the pool's end is its end


def test_turns_touch_every_expert_of_the_pool():
    seen: list[int] = []
    turns = this_machine._turns(lambda first, active, rows: seen.extend(range(first, first + active)), 10, 3, 1)
    for _ in range(8):
        next(turns)
    assert set(seen) == set(range(9)) | set(seen) and max(np.diff(seen)) == 1


def test_measured_cpu_calibrates_a_system(quick, tmp_path):
    measured = this_machine.measure(("cpu",))
    toml = tmp_path / "box.toml"
    toml.write_text(
        'name = "box"\n[gpu]\nname = "g"\ntflops = 1.0\nbandwidth_gb_s = 1.0\nmemory_gb = 1.0\nreserve_gb = 0.0\n'
        "launch_us = 1.0\n[cpu]\ntflops = 10.0\nbandwidth_gb_s = 500.0\ncommand_us = 1.0\n"
        "[link]\nbandwidth_gb_s = 20.0\nlatency_us = 5.0\n"
    )
    found = mt.calibrate(measured, toml)
    assert 0 < found.system.cpu.memory_efficiency <= 1 and found.system.cpu.launch == "layer"
    assert isinstance(found.frame, pl.DataFrame) and "cpu calibrated" in found.system.how_known


def test_unknown_parts_and_folders_are_refused(tmp_path):
    with pytest.raises(mt.UsageError, match="use one of cpu, disk, cuda"):
        this_machine.measure(("tpu",))
    with pytest.raises(mt.MoetraceError, match="Cannot measure the disk"):
        this_machine.measure(("disk",), folder=tmp_path / "none")


def test_repeats_are_summarized_by_median_and_quartiles():
    assert repeated([1.0, 2.0, 3.0, 4.0, 50.0]) == (3.0, pytest.approx(2 / 3))
    assert repeated([2.0] * 5) == (2.0, 0.0)
    assert doubts_of_repeats("cpu", [0.02, 0.1, 3.0]) == []  # one disturbed time is no busy machine
    (note,) = doubts_of_repeats("cpu", [0.02, 0.5, 3.0])
    assert "on the cpu" in note and "50% of the median" in note
