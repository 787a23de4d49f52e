"""`moetrace replay`: what the lines below the table say of the machine, and small figures in it."""

from pathlib import Path

import pytest

TINY = Path(__file__).parents[2] / "traces/tiny-olmoe.h5"


@pytest.mark.parametrize(
    ("system", "policy", "home", "parts"),
    [
        ("h100-amx-dimm", "trimoe", " with 16 NDP units and a CPU", "gpu, ndp, cpu, host, link"),
        ("h100-amx-dimm", "monde", " with 16 NDP units", "gpu, ndp, host, link"),
        ("rtx4090-nvme", "on-demand", " with a CPU", "gpu, host, link, disk"),
        ("remoe", "remoe", " with a CPU", "gpu, cpu, link, remote"),
        ("remoe", "all-gpu", " with a CPU", "gpu, link"),
    ],
)
def test_the_footer_names_every_part_that_a_policy_uses(run, system, policy, home, parts):
    code, out, _ = run("replay", TINY, "--system", system, "--policy", policy, "--slots", 48)
    out = " ".join(out.split())
    assert code == 0
    assert f"Model tiny-olmoe on {system}{home}; the GPU keeps up to" in out
    assert f"Constants of {system}: {parts} from data sheets and assumptions, not calibrated." in out


def test_the_footer_of_a_calibrated_machine_names_uncalibrated_parts(run):
    code, out, _ = run("replay", TINY, "--system", "l40s")
    out = " ".join(out.split())
    assert code == 0
    assert "Constants of l40s: gpu calibrated (error " in out and " at p90), link from data sheets" in out


def test_small_figures_do_not_read_as_zero(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(
        "replay", TINY, "--system", "remoe", "--policy", "remoe", "--set", "system.remote.usd_per_gb_s=1e-9"
    )
    lines = out.splitlines()
    assert code == 0
    at = next(at for at, line in enumerate(lines) if "functions" in line)
    usd = float(lines[at + 3].split()[lines[at + 1].split().index("USD")])
    assert 0 < usd < 1e-3
