"""The gate shown red by a policy, a preset and the engine's arithmetic in turn, and shown green under noise."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moetrace as mt
from moetrace.batch.verdict import VERDICTS

POLICIES = ["monde", "on-demand", "ndp-ep", "edge-ndp"]
# A machine without units refuses every policy but one: those cells fail, before and after.
MACHINES = ["edge-ndp", "rtx4090-offload"]
GRID = {"trace": "t.h5", "system": MACHINES, "policy": POLICIES, "slots": 48}
SCRIPT = f"import sys, moetrace as mt; mt.sweep({GRID!r} | {{'trace': sys.argv[1]}}, sys.argv[2])"


def swept(package: Path, trace: Path, folder: Path) -> Path:
    """Run the package whose folder lies in `package`, in a process of its own, as plain Python."""
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(package)}
    subprocess.run([sys.executable, "-c", SCRIPT, trace, folder], env=environment, cwd=package, check=True)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a copy of the package, a trace, and the baseline of what the copy computes."""
    folder = tmp_path_factory.mktemp("red")
    home = Path(mt.__file__).parent
    shutil.copytree(home, folder / "package" / "moetrace", ignore=shutil.ignore_patterns("__pycache__"))
    mt.generate_trace("tiny-olmoe", requests=2, prompt=6, output=4, batch=2, seed=3).write(folder / "t.h5")
    found = mt.gate(swept(folder / "package", folder / "t.h5", folder / "was"), folder / "b.json", update=True)
    assert len(found.cells) == len(MACHINES) * len(POLICIES)
    return folder


@pytest.mark.parametrize(
    ("file", "old", "new", "verdict", "red", "why"),
    [
        (
            "spec/presets/policies/on-demand.toml",
            'residency = "lru"',
            'residency = "none"',
            "worse",
            ["edge-ndp/on-demand", "rtx4090-offload/on-demand"],
            "policy changed: residency lru -> none",
        ),
        (
            "spec/presets/policies/edge-ndp.toml",
            'scope = "global"',
            'scope = "layer"',
            None,  # better or worse: the cell changes
            ["edge-ndp/edge-ndp"],
            "policy changed: scope global -> layer",
        ),
        (
            "spec/presets/systems/rtx4090-offload.toml",
            "bandwidth_gb_s = 25.0 ",
            "bandwidth_gb_s = 26.0 ",
            "changed",  # faster, but of another machine: nothing better is claimed
            ["rtx4090-offload/on-demand"],
            "system changed: link.bandwidth_gb_s 25 -> 26",
        ),
        (
            "engine/cost.py",
            "active.ndp_s = expert_s(machine.device[home], rows, weight_bytes)",
            "active.ndp_s = 1.001 * expert_s(machine.device[home], rows, weight_bytes)",
            "worse",
            ["edge-ndp/monde", "edge-ndp/ndp-ep"],
            "only the code changed: the engine, ",
        ),
        (  # all units share every expert
            "engine/cost.py",
            "active.ndp_s = expert_s(prices.home, rows, weight_bytes)",
            "active.ndp_s = 1.001 * expert_s(prices.home, rows, weight_bytes)",
            "worse",
            ["edge-ndp/edge-ndp"],
            "only the code changed: the engine, ",
        ),
    ],
)
def test_a_change_turns_exactly_the_cells_concerned_red(made, tmp_path, file, old, new, verdict, red, why):
    package = tmp_path / "package"
    shutil.copytree(made / "package", package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / "moetrace" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    found = mt.gate(swept(package, made / "t.h5", tmp_path / "now"), made / "b.json")
    assert found.failed == tuple(f"t/{name}" for name in red)
    for cell in found.cells:
        assert (cell.name in found.failed) == (cell.verdict != "same")
        if cell.name in found.failed:
            assert verdict in (cell.verdict, None)
            assert why in cell.why


def test_an_engine_that_changed_only_in_text_is_only_noted(made, tmp_path):
    package = tmp_path / "package"
    shutil.copytree(made / "package", package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "moetrace/engine/cost.py").open("a", encoding="utf-8") as file:
        file.write("# Nothing.\n")
    found = mt.gate(swept(package, made / "t.h5", tmp_path / "now"), made / "b.json")
    assert found.counts["same"] == len(found.cells)
    assert found.notes[-1] == "the engine's code changed since the baseline, and moved no figure."


def test_compiled_code_processes_and_blocks_are_no_change(made, tmp_path, monkeypatch):
    """The baseline is of plain Python; figures are equal to the bit, whatever does not enter the arithmetic."""
    grid = GRID | {"trace": str(made / "t.h5")}
    before = (made / "b.json").read_bytes()
    for number, (jobs, block_bytes) in enumerate([(1, 1 << 22), (1, 1), (1, 100), (2, 1 << 22)]):
        monkeypatch.setattr("moetrace.trace.format.BLOCK_BYTES", block_bytes)
        mt.sweep(grid, tmp_path / str(number), jobs=jobs)
        found = mt.gate(tmp_path / str(number), made / "b.json", tolerance="0%", fail_on=VERDICTS[:-1])
        assert found.passed and found.counts["same"] == len(found.cells)
        mt.gate(tmp_path / str(number), made / "b.json", update=True)
        assert (made / "b.json").read_bytes() == before


def test_threads_of_a_replay_are_no_change(tmp_path):
    trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=6, output=4, batch=2, seed=3)
    for jobs in (1, 2, 4):
        mt.replay(trace, policies=POLICIES, slots=48, jobs=jobs).write(tmp_path / "now")
        assert mt.gate(tmp_path / "now", tmp_path / "b.json", tolerance="0%", update=jobs == 1).passed
