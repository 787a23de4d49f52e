"""The gate shown red by a policy, a preset and the engine's arithmetic in turn, and shown green under noise."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moetrace as mt
from moetrace.batch.baseline import read_baseline

POLICIES = ["monde", "on-demand", "ndp-ep", "edge-ndp"]
# A machine with units, and one without, where only what the GPU runs alone makes sense.
MACHINES = {"edge-ndp": POLICIES, "rtx4090-offload": ["on-demand"]}
CELLS = [f"tiny-olmoe/{system}/{policy}" for system, policies in MACHINES.items() for policy in policies]
SCRIPT = """
import sys
import moetrace as mt

trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=6, output=4, batch=2, seed=3)
for system, policies in {machines!r}.items():
    mt.replay(trace, system=system, policies=policies, slots=48).write(f"{{sys.argv[1]}}/{{system}}")
"""


def replayed(package: Path, folder: Path) -> Path:
    """Run the package whose folder lies in `package`, in a process of its own, as plain Python."""
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(package)}
    script = SCRIPT.format(machines=MACHINES)
    subprocess.run([sys.executable, "-c", script, folder], env=environment, cwd=package, check=True)
    return folder


def verdicts(folder: Path, baselines: Path, **options) -> dict[str, mt.Gate]:
    """Gate both machines."""
    return {name: mt.gate(folder / name, baselines / f"{name}.json", **options) for name in MACHINES}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package, and the baselines of what it computes."""
    folder = tmp_path_factory.mktemp("red")
    package = folder / "package"
    home = Path(mt.__file__).parent
    shutil.copytree(home, package / "moetrace", ignore=shutil.ignore_patterns("__pycache__"))
    replayed(package, folder / "was")
    verdicts(folder / "was", folder, update=True)
    return package


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
            None,  # whichever way it goes, the cell holds something else
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
            "return max(rows * s_per_row, weight_bytes * s_per_byte) + command_s",
            "return max(rows * s_per_row, weight_bytes * s_per_byte) * 1.001 + command_s",
            "worse",
            ["edge-ndp/monde", "edge-ndp/ndp-ep", "edge-ndp/edge-ndp"],
            "no recorded input changed",
        ),
    ],
)
def test_a_change_turns_exactly_the_cells_concerned_red(copy, tmp_path, file, old, new, verdict, red, why):
    package = tmp_path / "package"
    shutil.copytree(copy, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / "moetrace" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    found = verdicts(replayed(package, tmp_path / "now"), copy.parent)
    assert [name for gate in found.values() for name in gate.failed] == [f"tiny-olmoe/{name}" for name in red]
    for gate in found.values():
        for cell in gate.cells:
            assert (cell.name in gate.failed) == (cell.verdict != "same")
            if cell.name in gate.failed:
                assert verdict in (cell.verdict, None)
                assert why in cell.why


def test_compiled_code_threads_and_blocks_are_no_change(copy, tmp_path, monkeypatch):
    """The baselines are of plain Python; to the last digit whatever does not enter the arithmetic."""
    trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=6, output=4, batch=2, seed=3)
    written = set()
    for jobs, block_bytes in ((1, 1 << 22), (2, 1 << 22), (4, 1), (1, 100)):
        monkeypatch.setattr("moetrace.trace.format.BLOCK_BYTES", block_bytes)
        for system, policies in MACHINES.items():
            mt.replay(trace, system=system, policies=policies, slots=48, jobs=jobs).write(tmp_path / system)
        found = verdicts(tmp_path, copy.parent)
        assert [gate.counts["same"] for gate in found.values()] == [len(policies) for policies in MACHINES.values()]
        written.add(tuple((tmp_path / system / "summary.json").read_bytes() for system in MACHINES))
    assert len(written) == 1
    before = {name: (copy.parent / f"{name}.json").read_bytes() for name in MACHINES}
    verdicts(tmp_path, copy.parent, update=True)
    after = {name: read_baseline(copy.parent / f"{name}.json") for name in MACHINES}
    assert {name: (copy.parent / f"{name}.json").read_bytes() for name in MACHINES} == before
    assert [cell for baseline in after.values() for cell in sorted(baseline.cells)] == sorted(CELLS)
