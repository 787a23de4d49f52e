"""What a result says of a disk below host memory, and that others say nothing."""

import json
import subprocess
import sys

import pytest

import moetrace as mt
from moetrace.results.folder import read_cells, read_summary
from moetrace.results.record import OF_A_TABLE

DISK = {"system.disk.bandwidth_gb_s": 7.0, "system.disk.latency_us": 100.0, "system.host.slots": 60}
POLICIES = ["n-cpu-moe", "hybrid"]


OF_DISK = {name for name, table in OF_A_TABLE.items() if table == "disk"}


@pytest.fixture(scope="module")
def trace():
    return mt.generate_trace("tiny-olmoe", requests=2, prompt=3, output=6)


@pytest.fixture(scope="module")
def result(trace):
    return mt.replay(trace, system="rtx4090-ddr5", policies=POLICIES, slots=20, overrides=DISK)


def test_figures_and_a_part_where_there_is_a_disk(result):
    for policy, name in zip(result.to_dict()["policies"], POLICIES, strict=True):
        units = result.units.filter(policy=name)
        (disk,) = units.filter(unit="disk").to_dicts()
        assert {*policy} >= OF_DISK
        assert policy["host_slots"] == 60
        assert policy["host_hits"] > 0 and policy["host_misses"] == disk["experts"] > 0
        assert policy["host_hit_rate"] == policy["host_hits"] / (policy["host_hits"] + policy["host_misses"])
        assert policy["host_hits"] + policy["host_misses"] == policy["misses"]  # what the GPU does not hold reaches it
        assert policy["disk_bytes"] == disk["bytes"] > 0
        assert policy["disk_busy"] == disk["utilization"] == pytest.approx(disk["busy_s"] / policy["total_s"])
        assert units["unit"].to_list() == ["gpu", "cpu", "link_in", "link_out", "disk"]
    assert {*result.summary.columns} >= OF_DISK


def test_nothing_of_it_elsewhere(trace):
    plain = mt.replay(trace, system="rtx4090-ddr5", policies=POLICIES, slots=20)
    assert not OF_DISK & {*plain.to_dict()["policies"][0]}
    assert not OF_DISK & {*plain.summary.columns}
    assert "disk" not in plain.units["unit"].to_list()


def test_a_folder_is_read_by_report_and_gate(result, tmp_path):
    result.write(tmp_path / "r")
    (summary, _), cells = read_summary(tmp_path / "r"), read_cells(tmp_path / "r")
    assert summary.policies[0].host_slots == 60
    assert cells.cells[0].figures["disk_bytes"] == summary.policies[0].disk_bytes
    mt.gate(tmp_path / "r", tmp_path / "baseline.json", metrics=["disk_bytes", "host_hit_rate"], update=True)
    assert json.loads((tmp_path / "baseline.json").read_text())["cells"]


def test_the_table_of_the_command(trace, tmp_path):
    trace.write(tmp_path / "t.h5")
    settings = [word for name, value in DISK.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "moetrace", "replay", str(tmp_path / "t.h5"), "--system", "rtx4090-ddr5"]
    said = subprocess.run([*command, "--slots", "20", *settings], capture_output=True, text=True, check=True).stdout
    assert "host memory up to 60; others are read from the disk" in " ".join(said.split())
    assert "and all else in host memory" in " ".join(said.split())
    heading = next(line for line in said.splitlines() if "hits %" in line)
    assert heading.split()[-5:] == ["hits", "%", "GB", "busy", "%"]
