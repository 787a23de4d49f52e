"""Links that lose packets or change their rate: what a system may say of them, and what is refused in one sentence."""

import json

import msgspec
import numpy as np
import pytest

import moetrace as mt
from moetrace.batch.cell import files_of
from moetrace.engine.setup import Setup
from moetrace.results.replayed import read_replayed
from moetrace.spec import MoetraceError, UsageError, canonical, load_model, load_policy, load_system
from moetrace.spec.link_rates import read_rates


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss": 0.991}, "system edge-ndp: link.loss wants a number from 0 to 0.99, got 0.991."),
        ({"loss": -0.1}, "system edge-ndp: link.loss wants a number from 0 to 0.99, got -0.1."),
        ({"mtu_bytes": 63}, "system edge-ndp: link.mtu_bytes wants a whole number from 64 to 1073741824, got 63."),
        ({"rto_ms": -1}, "system edge-ndp: link.rto_ms wants a number from 0 to 1e+09, got -1."),
        (
            {"loss_mode": "fast"},
            "system edge-ndp: link.loss_mode wants one of relaxed, reliable, got 'fast'.",
        ),
    ],
)
def test_a_bad_link_is_one_sentence(changed, said):
    with pytest.raises(UsageError) as error:
        load_system("edge-ndp", {f"link.{field}": value for field, value in changed.items()})
    assert str(error.value) == said


def test_a_loss_of_zero_may_have_its_fields():
    assert load_system("edge-ndp", {"link.loss": 0, "link.rto_ms": 5, "link.seed": 2**63 - 1}).link.rto_s == 0.005
    assert not load_system("edge-ndp", {"link.loss": 0, "link.loss_mode": "relaxed"}).link.loses_rows
    assert not load_system("edge-pi-cluster", {"link.loss": 0}).link.loses_rows
    assert load_system("edge-ndp", {"link.loss": 0.1}).link.packet_bytes == 1460
    at_bounds = load_system("edge-ndp", {"link.loss": 0.99, "link.mtu_bytes": 64}).link
    assert (at_bounds.loss, at_bounds.packet_bytes) == (0.99, 64)


def test_weights_are_never_lost_for_good():
    with pytest.raises(UsageError) as error:
        load_system("rtx4090-offload", {"link.loss": 0.1, "link.loss_mode": "relaxed"})
    assert str(error.value) == (
        'system rtx4090-offload: link.loss_mode = "relaxed" is for activations, and only weights travel without [ndp] '
        'or [cpu]: use loss_mode = "reliable".'
    )
    assert load_system("rtx4090-ddr5", {"link.loss": 0.1, "link.loss_mode": "relaxed"}).link.loses_rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "r.csv: has no line of seconds,gb_s: write one for each rate."),
        ("seconds,gb_s\n", "r.csv: has no line of seconds,gb_s: write one for each rate."),
        ("0,1\n1\n", "r.csv, line 2: wants seconds,gb_s, as 2.5,0.012."),
        ("0,1,2\n", "r.csv, line 1: wants seconds,gb_s, as 2.5,0.012."),
        ("0,fast\n", "r.csv, line 1: wants seconds,gb_s, as 2.5,0.012."),
        ("nan,1\n", "r.csv, line 1: wants seconds of at most 1e+12, got nan."),
        ("0,1\n5,0\n", "r.csv, line 2: wants a rate from 1e-09 to 1e+09 GB/s, got 0."),
        ("0,-1\n", "r.csv, line 1: wants a rate from 1e-09 to 1e+09 GB/s, got -1."),
        ("0,inf\n", "r.csv, line 1: wants a rate from 1e-09 to 1e+09 GB/s, got inf."),
        ("0,1\n# later\n5,1\n4,1\n", "r.csv, line 4: goes back in time, from 5 to 4 s: sort the lines, and give each"),
        ("0,1\n0,2\n", "r.csv, line 2: goes back in time, from 0 to 0 s: sort the lines, and give each second once."),
    ],
)
def test_bad_rates_are_one_sentence(tmp_path, text, said):
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(MoetraceError) as error:
        load_system("edge-ndp", {"link.rates": str(path)})
    assert str(error.value).startswith(f"{tmp_path}/{said}")


def test_rates_are_read_with_a_header_or_without(tmp_path):
    path = tmp_path / "r.csv"
    for header in ("seconds,gb_s\n", " seconds , gb_s\n", "# of a walk\n", ""):
        path.write_text(f"{header}-1.5,2\n\n3,0.25\n")
        assert read_rates(path).tolist() == [[-1.5, 2.0], [3.0, 0.25]]


def test_a_file_of_rates_lies_beside_its_toml_and_is_no_path_in_results(tmp_path, monkeypatch):
    (tmp_path / "r.csv").write_text("0,1\n")
    plain = load_system("edge-ndp")
    given = msgspec.to_builtins(plain)
    lines = [f"name = {given['name']!r}"]
    for table in ("gpu", "ndp", "link"):
        lines += [f"[{table}]", *(f"{key} = {value!r}" for key, value in given[table].items() if value is not None)]
    lines.append("rates = 'r.csv'")
    (tmp_path / "s.toml").write_text("\n".join(lines))
    system = load_system(tmp_path / "s.toml")
    assert system.link.rates == str(tmp_path / "r.csv")
    assert canonical(system)["link"]["rates"] == "r.csv"
    monkeypatch.chdir(tmp_path)
    assert load_system("edge-ndp", {"link.rates": "r.csv"}).link.rates == str(tmp_path / "r.csv")
    setup = Setup(model=load_model("tiny-olmoe"), system=system, policies=[load_policy("monde")])
    assert files_of(setup) == {"system.link.rates": str(tmp_path / "r.csv")}
    other = Setup(model=load_model("tiny-olmoe"), system=plain, policies=[load_policy("monde")])
    assert files_of(other) == {}


@pytest.mark.parametrize("name", ["edge-pi-cluster", "edge-robot"])
def test_presets_of_lossy_and_slow_links(name):
    system = load_system(name)
    assert system.known == "assumed" and system.home is not None
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=200, output=4)
    names = ["halo", "strict"] if name == "edge-pi-cluster" else ["ktransformers", "hybrid"]
    result = mt.replay(trace, system=system, policies=names, slots=24)
    assert ("gate_mass_dropped" in result.summary.columns) == (name == "edge-pi-cluster")
    if name == "edge-robot":  # a prompt travels in chunks, and a token in one
        whole = mt.replay(trace, system=system, policies=names, slots=24, overrides={"system.cpu.chunks": 1})
        assert (result.summary["total_s"] <= whole.summary["total_s"] * (1 + 1e-9)).all()
        assert result.summary["total_s"][0] < whole.summary["total_s"][0]


def test_losses_are_in_the_results_only_where_a_link_loses(tmp_path, capsys):
    from moetrace.cli.tables.replay_table import print_comparison

    trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=4, output=6)
    plain = mt.replay(trace, policies="monde", slots=24)
    assert not {"resent_bytes", "gate_mass_dropped"} & {*plain.summary.columns, *plain.units.columns}
    assert not {"resent_bytes", "gate_mass_dropped"} & plain.to_dict()["policies"][0].keys()
    lossy = {"system.link.loss": 0.01, "system.link.loss_mode": "relaxed"}
    found = mt.replay(trace, policies=["monde", "ndp-tp"], slots=24, overrides=lossy)
    of_links = found.units.filter(policy="monde").filter(unit="link_in")
    assert of_links["resent_bytes"][0] == found.summary["resent_bytes"][0] > 0
    assert of_links["bytes"][0] == plain.units.filter(unit="link_in")["bytes"][0]
    # of six shards of a row each may be lost
    dropped = found.summary["gate_mass_dropped"]
    assert 0 < dropped[0] < dropped[1] < 1
    print_comparison(found.to_dict(), "t")
    printed = " ".join(capsys.readouterr().out.split())
    assert "resent" in printed and "lost" in printed
    found.write(tmp_path / "out")
    written = json.loads((tmp_path / "out/summary.json").read_text())["policies"]
    assert [one["gate_mass_dropped"] for one in written] == dropped.to_list()
    assert read_replayed(tmp_path / "out").summary.policies[1].gate_mass_dropped == dropped[1]
    reliable = mt.replay(trace, policies="monde", slots=24, overrides={"system.link.loss": 0.01})
    assert reliable.summary["gate_mass_dropped"].to_list() == [0.0]
    assert np.isfinite(reliable.summary["total_s"][0]) and reliable.summary["total_s"][0] > found.summary["total_s"][0]
