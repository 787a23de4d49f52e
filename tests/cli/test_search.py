"""`moetrace sweep --search`."""

import csv
import io
import json

import pytest

import moetrace as mt
from moetrace.cli.tables.output import figure


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("t") / "small.h5"
    mt.generate(path, "tiny-olmoe", requests=6, prompt=8, output=24, stick=0.4)
    return str(path)


def searched(trace, folder):
    """A space beside the policy that it names."""
    policy = 'name = "lfu-balance"\ndispatch = "balance"\nresidency = "lfu"\nhalf_life = 8\n'
    (folder / "lfu-balance.toml").write_text(policy)
    text = f"""trace = "{trace}"
policy = ["on-demand", "lfu-balance.toml"]
slots = 24
[search]
trials = 12
range.policy.lfu-balance.half_life = {{ low = 1, high = 64 }}
"""
    (folder / "s.toml").write_text(text)
    return folder / "s.toml"


@pytest.mark.parametrize("form", ["json", "csv"])
def test_other_forms(trace, tmp_path, run, form):
    path = searched(trace, tmp_path)
    code, out, _ = run("sweep", path, "--search", "-o", tmp_path / "out", "--jobs", "1", "--format", form)
    assert code == 0
    trials = json.loads(out)["trials"] if form == "json" else list(csv.DictReader(io.StringIO(out)))
    assert len(trials) == 13


def test_best_is_what_its_command_replays(trace, tmp_path, run):
    path = searched(trace, tmp_path)
    code, out, err = run("sweep", path, "--search", "-o", tmp_path / "out", "--jobs", "1")
    assert code == 0, err
    assert "12 trials" in err
    command = out.strip().splitlines()[-1].split()
    assert command[:2] == ["moetrace", "replay"]
    _, replayed, _ = run(*command[1:], "--format", "json")
    search = json.loads((tmp_path / "out" / "search.json").read_text())
    assert json.loads(replayed)["policies"][0]["total_s"] == search["best"]["value"]


def test_the_command_leaves_out_settings_of_other_policies(trace, tmp_path, run):
    text = f'''trace = "{trace}"
policy = ["static-popular.toml", "on-demand-lfu"]
slots = 24
[set]
policy.on-demand-lfu.half_life = [16, 64]
[search]
trials = 2
'''
    (tmp_path / "s.toml").write_text(text)
    popular = 'name = "popular"\nplacement = "ep"\ndispatch = "balance"\nresidency = "static-popular"\n'
    (tmp_path / "static-popular.toml").write_text(popular)
    code, out, _ = run("sweep", tmp_path / "s.toml", "--search", "-o", tmp_path / "out", "--jobs", "1")
    assert code == 0 and "ms, of the first of each list." in out
    command = out.strip().splitlines()[-1].split()
    assert "half_life" not in command[-1]
    code, replayed, _ = run(*command[1:], "--format", "json")
    search = json.loads((tmp_path / "out" / "search.json").read_text())
    assert code == 0 and json.loads(replayed)["policies"][0]["total_s"] == search["best"]["value"]
    limit = ("--slo", "tpot_s.p99<=1us")
    _, out, _ = run("sweep", tmp_path / "s.toml", "--search", "-o", tmp_path / "out", "--jobs", "1", *limit)
    assert "No trial keeps the limits: the first of each list misses them least." in " ".join(out.split())


def test_options_that_do_not_go_together(trace, tmp_path, run):
    path = searched(trace, tmp_path)
    assert run("sweep", path, "--search", "-o", tmp_path / "out", "--dry-run")[0] == 2
    assert run("sweep", path, "-o", tmp_path / "out")[0] == 2


def test_the_table_has_the_best_five_in_ms(trace, tmp_path, run):
    path = searched(trace, tmp_path)
    code, out, _ = run("sweep", path, "--search", "-o", tmp_path / "out", "--jobs", "1", "--format", "json")
    values = sorted(
        trial["value"] for trial in json.loads(out)["trials"] if trial["state"] == "complete" and trial["trial"]
    )
    code, out, _ = run("sweep", path, "--search", "-o", tmp_path / "out", "--jobs", "1")
    lines = out.splitlines()
    assert code == 0 and "total_s ms" in lines[0]
    shown = [line.split()[-2] for line in lines[2 : lines.index("")]]
    assert shown[:-1] == [figure(1e3 * value) for value in values[:5]]
    assert lines[lines.index("") - 1].startswith("first")
    assert f"less is better: {1e3 * values[0]:.4g} ms." in out


def test_limits_are_shown(trace, tmp_path, run):
    path = searched(trace, tmp_path)
    asked = ("sweep", path, "--search", "-o", tmp_path / "out", "--jobs", "1")
    code, out, _ = run(*asked, "--slo", "total_s<=1us")
    assert code == 3 and "misses %" in out and "No trial keeps the limits" in out
    assert run(*asked, "--slo", "total_s<=1us", "--format", "json")[0] == 3
    assert run(*asked, "--slo", "total_s<=1000s")[0] == 0
    code, _, err = run("sweep", path, "--search", "-o", tmp_path / "out", "--slo", "total_s=1us")
    assert code == 2 and "An SLO is METRIC<=LIMIT" in err and err.count("\n") == 1
