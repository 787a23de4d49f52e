"""`moetrace replay --energy`: energy and price by part of the machine."""

import csv
import io
import json
from pathlib import Path

import pytest

import moetrace as mt

TINY = str(Path(__file__).parents[2] / "traces" / "tiny-olmoe.h5")
RATES = """name = "priced"
[gpu]
name = "some GPU"
tflops = 112.0
bandwidth_gb_s = 960.0
memory_gb = 16.0
reserve_gb = 2.0
launch_us = 5.0
[ndp]
units = 6
gmac_s = 256.0
bandwidth_gb_s = 102.4
capacity_gb = 32.0
command_us = 2.0
[link]
bandwidth_gb_s = 55.0
latency_us = 5.0
[energy]
gpu = { idle_w = 20, active_w = 360 }
link = { joule_per_gb = 0.1 }
[price]
usd_hour = 0.05
gpu = { usd_hour = 0.4 }
"""


def test_energy_is_a_table_by_part_and_one_of_price(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "priced.toml").write_text(RATES)
    command = ("replay", TINY, "--slots", 48, "--system", tmp_path / "priced.toml", "--energy")
    code, out, _ = run(*command)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    energy, price = (part.split("\n\n")[0].splitlines() for part in out.split("policy    part")[1:])
    assert energy[0].split() == ["J", "J", "J", "J", "%", "token"]
    assert [line.split() for line in energy[2:]] == [
        ["monde", "GPU", "259.1", "1,289", "-", "1,548", "97.8", "0.2239"],
        ["link", "-", "-", "34.89", "35", "2.2", "0.0050"],
        ["all", "259.1", "1,289", "34.89", "1,583", "100.0", "0.2289"],
        ["edge-ndp", "GPU", "118.7", "1,802", "-", "1,920", "99.8", "0.2776"],
        ["link", "-", "-", "3.13", "3", "0.2", "0.0005"],
        ["all", "118.7", "1,802", "3.13", "1,924", "100.0", "0.2781"],
    ]
    assert [line.split()[-4:] for line in price[2:4]] == [
        ["GPU", "0.001440", "88.9", "0.2081"],
        ["machine", "0.000180", "11.1", "0.0260"],
    ]
    words = " ".join(out.split())
    assert "Not in the account and its sum, as [energy] of priced does not list it: NDP." in words
    assert "Price: 0.45 USD an hour, for the whole time" in words
    assert "Tokens are the 6,917 decode rows of the trace." in words

    rows = list(csv.DictReader(io.StringIO(run(*command, "--format", "csv")[1])))
    assert [(row["policy"], row["part"]) for row in rows[:3]] == [
        ("monde", name) for name in ("gpu", "link", "machine")
    ]
    found = json.loads(run(*command, "--format", "json")[1])
    assert [row["part"] for row in found["accounts"]] == ["gpu", "link", "machine"] * 2
    assert sum(row["energy_j"] or 0.0 for row in found["accounts"][:3]) == pytest.approx(
        found["policies"][0]["energy_j"]
    )
    assert found["accounts"][0]["idle_j"] == float(rows[0]["idle_j"])


def test_energy_of_a_system_without_rates_is_one_sentence(run):
    code, out, err = run("replay", TINY, "--energy")
    assert (code, out) == (2, "")
    assert err.startswith("moetrace: --energy needs the watts or prices of edge-ndp, which has neither [energy] nor")
    code, _, err = run("replay", TINY, "--set", "system.energy.gpu.idle_w=3")
    assert code == 2 and "there is no [energy.gpu] to set energy.gpu.idle_w in: set energy.gpu.active_w, too" in err


def test_devices_that_no_account_holds_are_named_below_the_table(run, tmp_path):
    """A disk without watts, and remote functions."""
    path = tmp_path / "t.h5"
    mt.generate(path, "tiny-olmoe", requests=1, prompt=2, output=2)
    watts = ("--set", "system.energy.gpu.idle_w=5", "--set", "system.energy.gpu.active_w=9", "--energy")
    for system, policy, said in (
        ("rtx4090-nvme", "hybrid", "as [energy] of rtx4090-nvme does not list it: CPU, disk, link."),
        ("remoe", "remoe", "does not list it: CPU, link. Remote functions are not in it: their power is not known to"),
    ):
        _, out, _ = run("replay", path, "--system", system, "--policy", policy, *watts)
        assert said in " ".join(out.split())


@pytest.mark.parametrize("name", ["remoe", "edge-ndp"])
def test_a_preset_without_rates_says_which_option_is_enough(run, tmp_path, name):
    path = tmp_path / "t.h5"
    mt.generate(path, "tiny-olmoe", requests=1, prompt=2, output=2)
    code, _, err = run("replay", path, "--system", name, "--energy")
    assert code == 2 and err.count(".") == err.count("docs/energy.md") + err.count("system.price.usd_hour") * 2 + 1
    assert f"watts or prices of {name}" in err and "--set system.price.usd_hour=USD" in err
    code, out, _ = run("replay", path, "--system", name, "--energy", "--set", "system.price.usd_hour=2")
    assert code == 0 and "Price: 2 USD an hour" in out


def test_the_robot_of_intra_dp_has_its_watts(run, tmp_path):
    path = tmp_path / "t.h5"
    mt.generate(path, "tiny-olmoe", requests=1, prompt=2, output=2)
    code, out, _ = run("replay", path, "--system", "edge-robot", "--policy", "resident", "--energy")
    assert code == 0 and "of edge-robot does not list it: CPU, link." in " ".join(out.split())


def test_a_column_of_nothing_is_left_out(run, tmp_path):
    (tmp_path / "watts.toml").write_text(RATES.partition("link = { joule")[0])
    mt.generate(tmp_path / "t.h5", "tiny-olmoe", requests=1, prompt=4, output=0)
    _, out, _ = run("replay", tmp_path / "t.h5", "--system", tmp_path / "watts.toml", "--policy", "monde", "--energy")
    energy = out.split("policy  part")[1].split("\n\n")[0].splitlines()
    assert energy[0].split() == ["J", "J", "J", "%"]  # no link, and without decode rows no token
    assert [line.split()[:2] for line in energy[2:]] == [["monde", "GPU"]]
    assert "Price" not in out and "Tokens are" not in out
