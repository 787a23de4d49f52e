"""`moetrace analyze balance`: what it prints and writes, and what it says when something is wrong."""

import csv
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import moetrace as mt
from moetrace.analyze.balance import units as library
from moetrace.cli.commands import analyze_balance
from moetrace.engine.placement import group_of_expert, place_experts
from moetrace.spec.policy_files import load_loads
from moetrace.trace.writer import CountsWriter

TRACES = Path(__file__).parents[2] / "traces"
MIXTRAL = str(TRACES / "mixtral-8x7b-b16.h5")


@pytest.fixture
def run(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return partial(run, "analyze", "balance")


def test_tables_fit_80_columns(run):
    code, out, err = run(MIXTRAL, "--system", "edge-ndp", "--placement", "eplb", "--placement", "tp")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for part in ("Losses of a kept plan:", "In seconds on edge-ndp:", "break-even", "on 6 units", "(7 times)"):
        assert part in " ".join(out.split())  # wherever the name of the trace makes the lines break
    assert sum(line.startswith("eplb ") for line in out.splitlines()) == 3 + 3 + 1 + 3 + 1
    out = run(MIXTRAL, "--units", 4, "--placement", "ep")[1]
    assert "kept" not in out and "seconds" not in out and "In seconds" not in out


def test_copies_are_shared_as_asked(run):
    """16 slots on 8 units: evenly as no engine does, by the place in the batch as engines do."""
    plan = (MIXTRAL, "--units", 8, "--redundant", 8, "--window", 0, "--placement", "eplb")
    found = {}
    for copies in ("even", "row", "random"):
        code, out, err = run(*plan, "--copies", copies, "--format", "json")
        assert (code, err) == (0, "")
        found[copies] = json.loads(out)
        assert found[copies]["trace"]["copies"] == copies
    imbalance = {copies: round(each["summary"][0]["imbalance"], 3) for copies, each in found.items()}
    assert (imbalance["even"], imbalance["row"]) == (1.433, 1.563) and imbalance["random"] > 1.563
    assert run(*plan, "--copies", "random", "--seed", 1, "--format", "json")[1] != json.dumps(found["random"])
    out = run(*plan, "--copies", "row")[1]
    assert "Copies are chosen by the row's place in the step." in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_a_long_name_takes_no_column_away(run, tmp_path):
    plan = tmp_path / f"{'long' * 20}.json"
    assert run(MIXTRAL, "--units", 4, "--placement", "ep", "--export", plan)[0] == 0
    title, *rows = [line.split() for line in run(MIXTRAL, "--units", 4, "--plan", plan)[1].splitlines()[1:4]]
    assert title == ["placement", "plan", "slots", "mean", "layer", "p99", "possible", "Jain"]
    assert rows[1][:3] == [plan.name, "given", "8"] and len(rows[1]) == len(title)


def test_json_and_csv_are_the_frames(run):
    arguments = (MIXTRAL, "--units", 4, "--window", 60, "--interval", 50, "--phase", "decode", "--placement", "eplb")
    with mt.Trace.open(MIXTRAL) as trace:
        found = library.balance(trace, ["eplb"], tier=4, window=60, interval=50, phase="decode")
    assert json.loads(run(*arguments, "--format", "json")[1]) == json.loads(json.dumps(found.to_dict()))
    for frame in analyze_balance.FRAMES:
        out = run(*arguments, "--format", "csv", "--frame", frame)[1]
        assert out == getattr(found, frame).write_csv()
    rows = list(csv.DictReader(io.StringIO(run(*arguments, "--format", "csv")[1])))
    assert len(rows) == 3 * 32 and {row["plan"] for row in rows} == {"kept", "re-made", "clairvoyant"}


@pytest.mark.parametrize("name", ["plan.json", "plan.yaml"])
def test_a_plan_that_was_exported_is_the_one_that_is_kept(run, tmp_path, name):
    """Made from the first part of a trace, written, read, and judged on the rest: the same figures."""
    with mt.Trace.open(MIXTRAL) as trace:
        experts, rows = trace.read("experts", 0, int(trace.offset[60])), np.diff(trace.offset[:61])
        part = mt.Trace.from_arrays(experts, num_experts=8, steps=rows, phase=trace.phase[:60], model="mixtral-8x7b")
    part.write(tmp_path / "part.h5")
    code, _, err = run(
        tmp_path / "part.h5", "--placement", "eplb", "--window", 59, "--units", 4, "--export", tmp_path / name
    )
    assert (code, err) == (0, "")
    arguments = (MIXTRAL, "--units", 4, "--window", 60, "--format", "json", "--placement", "eplb")
    both = json.loads(run(*arguments, "--plan", tmp_path / name)[1])["layers"]
    with mt.Trace.open(tmp_path / "part.h5") as trace:
        plan = library.plan_for_next(trace, "eplb", library.Tier(4), 59)
    with mt.Trace.open(MIXTRAL) as trace:
        found = library.balance(trace, [], tier=4, window=60, plans={name: plan})
    given = [row for row in both if row["plan"] == "given"]
    assert given == found.layers.to_dicts() and {row["placement"] for row in given} == {name}


def test_plans_of_one_name_are_shown_with_their_folders(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for name, placement in (("a/p.json", "ep"), ("p.json", "ep-block")):
        assert run(MIXTRAL, "--units", 4, "--placement", placement, "--export", name)[0] == 0
    found = json.loads(run(MIXTRAL, "--units", 4, "--plan", "a/p.json", "--plan", "p.json", "--format", "json")[1])
    assert [row["placement"] for row in found["summary"]] == ["a/p.json", "p.json"]
    assert found["summary"][0]["imbalance"] != found["summary"][1]["imbalance"]


def test_a_replay_places_by_the_loads_that_were_exported(run, tmp_path):
    arguments = (MIXTRAL, "--placement", "ep-lpt", "--window", 90, "--units", 4)
    assert run(*arguments, "--export", tmp_path / "loads.csv")[0] == 0
    with mt.Trace.open(MIXTRAL) as trace:
        plan = library.plan_for_next(trace, "ep-lpt", library.Tier(4), 90)
        loads = load_loads(tmp_path / "loads.csv", trace.layers, 8)
    unit_of_expert = group_of_expert("ep-lpt", len(loads), 8, 4, 1, loads)
    for layer, units in enumerate(plan.expert_of_slot.tolist()):
        assert all(unit_of_expert[layer, e] == unit for unit, held in enumerate(units) for e in held if e >= 0)


@pytest.mark.parametrize("placement", ["eplb", "eplb-hierarchical"])
def test_a_replay_places_as_the_plan_that_was_exported(run, tmp_path, placement):
    tier = ("--units", 4, "--redundant", 0, *(() if placement == "eplb" else ("--nodes", 2, "--groups", 4)))
    arguments = (MIXTRAL, "--placement", placement, "--window", 90, *tier)
    for name in ("p.json", "p.yaml", "loads.csv")[: 3 if placement == "eplb" else 2]:
        assert run(*arguments, "--export", tmp_path / name)[0] == 0
    with mt.Trace.open(MIXTRAL) as trace:
        plan = library.plan_for_next(trace, placement, library.Tier(4, 0, 2, 4), 90)
        layer_index = trace.layer_index
    policies = [mt.PolicySpec(name="p", placement="plan", plan=str(tmp_path / name)) for name in ("p.json", "p.yaml")]
    if placement == "eplb":
        policies.append(mt.PolicySpec(name="p", placement="eplb", loads=str(tmp_path / "loads.csv")))
    for policy in policies:
        unit_of_expert = place_experts(policy, layer_index, 8, 4)
        for layer, units in enumerate(plan.expert_of_slot.tolist()):
            assert [[unit_of_expert[layer, e] for e in held] for held in units] == [[u] * 2 for u in range(4)]


def test_a_trace_of_counts_is_enough(run, tmp_path):
    facts = {"model": "", "num_experts": 4, "top_k": 1, "layers": 1, "rows": 12, "steps": 3, "source": {}}
    with CountsWriter(tmp_path / "a.h5", **facts) as writer:
        counts = np.array([[[4, 0, 0, 0]], [[2, 2, 0, 0]], [[1, 1, 1, 1]]])
        writer.append_counts(counts, np.array([4, 4, 4]), np.ones(3, np.uint8))
    code, out, _ = run(tmp_path / "a.h5", "--placement", "ep", "--units", 2, "--window", 1, "--format", "json")
    (row,) = json.loads(out)["layers"]
    assert code == 0 and row["imbalance"] == 1.0 and row["imbalance_max"] == 1.0 and row["steps"] == 2


def test_one_table_of_counts_is_enough_for_figures_and_a_plan(run, tmp_path):
    facts = {"model": "", "num_experts": 4, "top_k": 1, "layers": 1, "rows": 12, "steps": 1, "source": {}}
    with CountsWriter(tmp_path / "a.h5", **facts) as writer:
        writer.append_counts(np.array([[[7, 3, 1, 1]]]), np.array([12]), np.array([2], np.uint8))
    code, out, _ = run(
        tmp_path / "a.h5", "--units", 2, "--format", "json", "--placement", "ep", "--placement", "ep-lpt"
    )
    ep, lpt = json.loads(out)["layers"]
    assert code == 0 and (ep["plan"], ep["imbalance"]) == ("fixed", 8 / 6)  # experts 0 and 2, 1 and 3
    assert (lpt["plan"], lpt["imbalance"]) == ("clairvoyant", 7 / 6)  # expert 0, and the others
    arguments = (tmp_path / "a.h5", "--units", 2, "--redundant", 2, "--placement", "eplb", "--export")
    code, out, _ = run(*arguments, tmp_path / "p.json")
    assert code == 0 and "judged on 1 step, clairvoyant ones are made from the same" in " ".join(out.split())
    # The two further copies go to expert 0; units get {0, 1, 2 or 3} and the rest.
    slots = json.loads((tmp_path / "p.json").read_text())["physical_to_logical_map"][0]
    assert sorted(slots) == [0, 0, 0, 1, 2, 3] and 0 in slots[:3] and 0 in slots[3:]
    assert run(*arguments, tmp_path / "p.csv")[0] == 0 and (tmp_path / "p.csv").read_text() == "7,3,1,1\n"


def test_picture(run, tmp_path):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    code, _, err = run(MIXTRAL, "--units", 4, "--plot", tmp_path / "a.html")
    assert (code, err) == (0, "") and (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_errors_are_one_sentence(run, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "bad.yaml").write_text("num_slots: 8\n")
    for arguments, code, sentence in (
        ((MIXTRAL, "--placement", "best"), 2, "there is no placement 'best'"),
        ((MIXTRAL, "--units", 0), 2, "units are 0: give 1 to 4096"),
        ((MIXTRAL, "--units", 3, "--redundant", 2), 2, "cannot share equally: give 4 redundant ones"),
        ((MIXTRAL, "--frame", "summary"), 2, "--frame goes with --format csv"),
        ((MIXTRAL, "--window", 160), 2, "the window is 160 steps"),
        ((MIXTRAL, "--system", "none"), 2, "none"),
        ((MIXTRAL, "--system", "edge-ndp", "--set", "system.ndp.units=0"), 2, "ndp.units"),
        (
            (MIXTRAL, "--system", "h20-x32"),
            2,
            "h20-x32 is a cluster, whose seconds moetrace replay says: give 24 units",
        ),
        ((MIXTRAL, "--set", "system.ndp.units=4"), 2, "--set system.FIELD needs --system"),
        ((MIXTRAL, "--model", "olmoe-1b-7b"), 2, "name the right one with --model"),
        ((MIXTRAL, "--plan", tmp_path / "none.json"), 1, "there is no plan file"),
        ((MIXTRAL, "--plan", tmp_path / "bad.json"), 1, "bad.json is no plan of SGLang's"),
        ((MIXTRAL, "--plan", tmp_path / "bad.yaml"), 1, "bad.yaml has no layer 0 among"),
        ((MIXTRAL, "--plan", "a.pt"), 2, "does not say whose plan it is"),
        ((MIXTRAL, "--export", tmp_path / "a.json"), 2, "give one --placement"),
        ((MIXTRAL, "--export", tmp_path / "a.txt", "--placement", "ep"), 2, "does not say whose plan it is"),
        (
            (MIXTRAL, "--export", tmp_path / "a.json", "--placement", "tp", "--units", 4),
            2,
            "splits experts among units",
        ),
        ((MIXTRAL, "--export", tmp_path / "a.csv", "--placement", "ep"), 2, ".csv is for the loads of ep-lpt"),
        ((MIXTRAL, "--frame", "summary"), 2, "--frame goes with --format csv"),
        ((MIXTRAL, "--plot", "a.pdf"), 2, "must end with .png or .html"),
        ((MIXTRAL, "--plot", MIXTRAL), 2, "is also an input"),
        ((tmp_path / "b.h5",), 1, "b.h5"),
    ):
        found, out, err = run(*arguments)
        assert (found, out) == (code, "") and sentence in err and err.count("\n") == 1, (arguments, err)
    assert not (tmp_path / "a.json").exists()


def test_intervals_and_fan_out_are_columns(run):
    arguments = (MIXTRAL, "--units", 4, "--placement", "eplb", "--fan-out", "--nodes", 2)
    once = run(*arguments, "--interval", 20)[1]
    assert "every" not in once.splitlines()[0] and "re-made ones every 20 (3 times)" in " ".join(once.split())
    out = run(*arguments, "--interval", 20, "--interval", 10)[1]
    rows = [line.split() for line in out.splitlines() if line.startswith("eplb")]
    assert [row[1:3] for row in rows if row[1] == "re-made"][:2] == [["re-made", "20"], ["re-made", "10"]]
    said = " ".join(out.split())
    assert "re-made ones every 20 (3 times), 10 (7 times)." in said
    assert "Fan-out: units (and those of the 2 nodes) on which the experts of one row are" in said
    assert max(map(len, out.splitlines())) <= 100


def test_options_without_effect_are_refused(run):
    for arguments, sentence in (
        (("--nodes", 2), "--nodes is for --placement eplb-hierarchical or --fan-out."),
        (("--groups", 1, "--placement", "eplb"), "--groups is for --placement eplb-hierarchical"),
        (("--redundant", 8, "--placement", "ep-lpt"), "--redundant is for --placement eplb"),
        (
            ("--interval", 4, "--placement", "ep", "--placement", "tp:2"),
            "--interval is for placements that are re-made",
        ),
        (("--copies", "row", "--placement", "ep"), "--copies is for plans with copies"),
        (("--copies", "row", "--seed", 1), "--seed is for --copies random"),
    ):
        code, out, err = run(MIXTRAL, *arguments)
        assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1


def test_a_plan_that_no_file_can_hold_is_refused_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr("moetrace.analyze.balance.units.balance", None)
    code, out, err = run(MIXTRAL, "--placement", "ep", "--units", 3, "--export", tmp_path / "a.json")
    assert (code, out) == (2, "") and "gives units unequal numbers of experts" in err


def test_units_and_model_come_from_the_system_and_the_trace_by_default(run):
    out = run(MIXTRAL, "--system", "edge-ndp", "--set", "system.ndp.units=2", "--placement", "ep", "--format", "json")[
        1
    ]
    assert json.loads(out)["trace"]["units"] == 2
    arguments = ("--placement", "eplb", "--units", 4, "--format", "json")
    moved = [
        json.loads(run(MIXTRAL, *arguments, *more)[1])["summary"][1]["migration_bytes"]
        for more in ((), ("--set", "model.weight_bits=8"))
    ]
    assert moved[0] == 2 * moved[1] > 0


def test_a_picture_does_not_replace_a_spec(run, tmp_path):
    spec = tmp_path / "a.html"
    spec.write_text("name = 'some'\n")
    for option in ("--system", "--model"):
        code, out, err = run(MIXTRAL, option, spec, "--plot", spec)
        assert (code, out) == (2, "") and "a.html is also an input" in err
    assert spec.read_text() == "name = 'some'\n"


def test_help_names_what_there_is():
    assert analyze_balance.FRAMES == library.FRAMES
