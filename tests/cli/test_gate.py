"""`moetrace gate`: what it prints and writes, exit codes, and one sentence for whatever is wrong."""

import csv
import io
import json
import os
from xml.etree import ElementTree

import pytest
from support.gate_folders import replay, summary, sweep


@pytest.fixture(autouse=True)
def no_summary(monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture
def baseline(tmp_path, run):
    path = tmp_path / "baseline.json"
    assert run("gate", replay(tmp_path / "was", {}, {"name": "edge-ndp"}), "--baseline", path, "--update")[0] == 0
    return path


@pytest.fixture
def worse(tmp_path):
    return replay(tmp_path / "worse", {"total_s": 14.0}, {"name": "edge-ndp"})


def test_a_regression_ends_with_3_and_names_the_cell(run, baseline, worse, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, err = run("gate", worse, "--baseline", baseline)
    assert code == 3
    lines = out.splitlines()
    assert lines[0].split() == ["worse", "tiny-olmoe/edge-ndp/monde"]
    assert lines[1].split() == ["total_s", "12,957", "->", "14,000", "ms", "+8.05", "%"]
    assert "tiny-olmoe/edge-ndp/monde: no recorded input changed" in out
    assert "tiny-olmoe/edge-ndp/edge-ndp" not in out
    assert lines[-1] == "2 cells: 1 worse, 1 same."
    assert err.startswith("moetrace: 1 of 2 cells fail the gate")
    assert run("gate", worse, "--baseline", baseline, "--tolerance", "9%")[0] == 0
    assert run("gate", worse, "--baseline", baseline, "--tolerance", "total_s=1.1")[0] == 0
    assert run("gate", worse, "--baseline", baseline, "--tolerance", "9%", "--tolerance", "total_s=8%")[0] == 3
    assert run("gate", worse, "--baseline", baseline, "--fail-on", "missing, new")[0] == 0
    assert run("gate", worse, "--baseline", baseline, "--metric", "hit_rate")[0] == 0


def test_nothing_moved(run, baseline, tmp_path):
    assert run("gate", tmp_path / "was", "--baseline", baseline) == (0, "2 cells: 2 same.\n", "")


def test_any_fails_on_all_that_is_not_the_same(run, baseline, tmp_path):
    better = replay(tmp_path / "better", {"total_s": 12.0}, {"name": "edge-ndp"})
    assert run("gate", better, "--baseline", baseline)[0] == 0
    assert run("gate", better, "--baseline", baseline, "--fail-on", "any")[0] == 3


def test_update_accepts_and_says_what_it_dropped(run, baseline, tmp_path):
    now = replay(tmp_path / "now", {"total_s": 14.0}, {"name": "new"})
    code, out, err = run("gate", now, "--baseline", baseline, "--update")
    assert code == 0
    assert out.endswith("3 cells: 1 worse, 1 missing, 1 new.\n")
    assert err == (
        f"{baseline}: 2 cells accepted.\n{baseline}: dropped tiny-olmoe/edge-ndp/edge-ndp, which is no longer there.\n"
    )
    assert run("gate", now, "--baseline", baseline)[0] == 0


def test_json_and_csv_have_everything(run, baseline, worse):
    code, out, _ = run("gate", worse, "--baseline", baseline, "--format", "json")
    found = json.loads(out)
    assert (code, found["failed"]) == (3, ["tiny-olmoe/edge-ndp/monde"])
    code, out, _ = run("gate", worse, "--baseline", baseline, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (code, len(rows)) == (3, 16)
    assert float(rows[0]["value"]) == 14.0


def test_files_for_other_tools_are_written_whether_it_passes_or_not(run, baseline, worse, tmp_path, monkeypatch):
    job = tmp_path / "summary.md"
    job.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(job))
    files = ["--junit", tmp_path / "j.xml", "--markdown", tmp_path / "m.md", "--benchmark-json", tmp_path / "b.json"]
    assert run("gate", worse, "--baseline", baseline, *files)[0] == 3
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("failures") == "1"
    assert len(json.loads((tmp_path / "b.json").read_text())) == 14
    text = (tmp_path / "m.md").read_text()
    assert job.read_text() == f"before\n{text}\n"
    assert run("gate", tmp_path / "was", "--baseline", baseline, *files)[0] == 0
    assert "passed" in (tmp_path / "m.md").read_text()
    assert job.read_text().startswith(f"before\n{text}\n")


def test_long_tables_end_with_a_count(run, tmp_path):
    many = {f"cell-{number}": summary() for number in range(60)}
    path = tmp_path / "b.json"
    assert run("gate", sweep(tmp_path / "s", many), "--baseline", path, "--update")[0] == 0
    code, out, _ = run("gate", sweep(tmp_path / "t", {"other": summary()}), "--baseline", path)
    assert code == 3
    assert "11 more cells are not shown; --format csv has all." in out
    assert "cell-0 and 59 more: only in the baseline." in out


def write_bad(folder, baseline):
    """Files that are wrong in one way each."""
    text = baseline.read_text()
    raw = json.loads(text)
    (folder / "empty").mkdir()
    changes = {
        "schema.json": {"schema": "moetrace.baseline/9"},
        "cells.json": {"cells": {}},
        "list.json": {"cells": []},
        "unknown.json": {"extra": 1},
        "version.json": {"moetrace": 1},
    }
    for name, change in changes.items():
        (folder / name).write_text(json.dumps(raw | change))
    cell = "tiny-olmoe/edge-ndp/monde"
    for name, key, value in [
        ("text.json", "metrics", {"total_s": "fast"}),
        ("metric.json", "metrics", {"total": 1}),
        ("none.json", "metrics", {}),
        ("huge.json", "metrics", {"total_s": 1e305}),
        ("bool.json", "metrics", {"total_s": True}),
        ("inputs.json", "inputs", {"trace": []}),
    ]:
        changed = raw["cells"] | {cell: raw["cells"][cell] | {key: value}}
        (folder / name).write_text(json.dumps(raw | {"cells": changed}))
    (folder / "nan.json").write_text(text.replace("0.71", "NaN"))
    (folder / "inf.json").write_text(text.replace("0.71", "1e999"))
    (folder / "digits.json").write_text(text.replace("0.71", "1" * 5000))
    (folder / "twice.json").write_text(text.replace("edge-ndp/monde", "edge-ndp/edge-ndp"))
    (folder / "conflict.json").write_text(text.replace('  "cells"', '<<<<<<< HEAD\n  "cells"'))
    (folder / "half.json").write_text(text.replace("ndp/monde", "ndp/\\ud800"))
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    (folder / "big.json").write_bytes(b" " * ((16 << 20) + 1))
    for name, change in {
        "policy": {"policies": [{"name": 3}]},
        "nopolicy": {"policies": []},
        "figures": {"policies": [{"name": "monde", "choices": {}}]},
        "result": {"schema": "moetrace.result/2"},
        "slots": {"slots": "many"},
    }.items():
        (folder / name).mkdir()
        (folder / name / "summary.json").write_text(json.dumps(summary() | change))
    (folder / "twice").mkdir()
    (folder / "twice/summary.json").write_text(json.dumps(summary({"name": "a"}, {"name": "a"})))
    escaping = sweep(folder / "escape", {"a": summary()})
    swept = json.loads((escaping / "sweep.json").read_text())
    swept["cells"][0]["cell"] = "../../../etc/passwd"
    (escaping / "sweep.json").write_text(json.dumps(swept))
    swept["cells"][0]["cell"] = "0" * 64
    (sweep(folder / "lost", {"a": summary()}) / "sweep.json").write_text(json.dumps(swept))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{was}"], 2, "--baseline"),
        (["{was}", "--baseline", "{bad}/no.json"], 1, "There is no file {bad}/no.json: --update makes it"),
        (["{was}", "--baseline", "{bad}"], 1, "not an ordinary file"),
        (["{was}", "--baseline", "{bad}/schema.json"], 1, "schema wants 'moetrace.baseline/1'"),
        (["{was}", "--baseline", "{bad}/cells.json"], 1, "holds no cell"),
        (["{was}", "--baseline", "{bad}/list.json"], 1, "cells: Expected `object`"),
        (["{was}", "--baseline", "{bad}/unknown.json"], 1, "unknown field `extra`"),
        (["{was}", "--baseline", "{bad}/version.json"], 1, "moetrace: Expected `str`"),
        (
            ["{was}", "--baseline", "{bad}/text.json"],
            1,
            "cells.tiny-olmoe/edge-ndp/monde.metrics.total_s wants a number",
        ),
        (["{was}", "--baseline", "{bad}/bool.json"], 1, "monde.metrics.total_s wants a number or null"),
        (["{was}", "--baseline", "{bad}/metric.json"], 2, "'total' is no metric (the nearest is 'total_s')"),
        (["{was}", "--baseline", "{bad}/none.json"], 1, "monde.metrics is empty"),
        (["{was}", "--baseline", "{bad}/huge.json"], 1, "monde.metrics.total_s wants a finite number"),
        (["{was}", "--baseline", "{bad}/inputs.json"], 1, "cells.tiny-olmoe/edge-ndp/monde.inputs"),
        (["{was}", "--baseline", "{bad}/nan.json"], 1, "NaN is no number of JSON"),
        (["{was}", "--baseline", "{bad}/inf.json"], 1, "1e999 is too large a number"),
        (["{was}", "--baseline", "{bad}/digits.json"], 1, "{bad}/digits.json"),
        (["{was}", "--baseline", "{bad}/twice.json"], 1, "'tiny-olmoe/edge-ndp/edge-ndp' is there twice"),
        (["{was}", "--baseline", "{bad}/conflict.json"], 1, "line 5: not JSON: "),
        (["{was}", "--baseline", "{bad}/half.json"], 1, "a text in it is no Unicode"),
        (["{was}", "--baseline", "{bad}/deep.json"], 1, "too deep"),
        (["{was}", "--baseline", "{bad}/binary.json"], 1, "not a UTF-8 text file"),
        (["{was}", "--baseline", "{bad}/big.json"], 1, "more than 16 MiB"),
        (["{bad}/none", "--baseline", "{good}"], 2, "is no folder"),
        (["{bad}/empty", "--baseline", "{good}"], 2, "holds neither sweep.json nor summary.json"),
        (["{bad}/policy", "--baseline", "{good}"], 1, "the name of a policy wants a text"),
        (["{bad}/nopolicy", "--baseline", "{good}"], 1, "holds no cell"),
        (["{bad}/figures", "--baseline", "{good}"], 1, "has no total_s"),
        (["{bad}/result", "--baseline", "{good}"], 1, "schema wants 'moetrace.result/1'"),
        (["{bad}/slots", "--baseline", "{good}"], 1, "slots: Expected `int`"),
        (["{bad}/twice", "--baseline", "{good}"], 1, "two cells are called"),
        (["{bad}/escape", "--baseline", "{good}"], 1, "the cell of a is no hash"),
        (["{bad}/lost", "--baseline", "{good}"], 1, "Cannot read {bad}/lost/cells/0000"),
        (["{was}", "--baseline", "{good}", "--tolerance", "5"], 2, "in which metric's unit"),
        (["{was}", "--baseline", "{good}", "--metric", "total"], 2, "the nearest is 'total_s'"),
        (["{was}", "--baseline", "{good}", "--metric", "misses"], 2, "has no misses"),
        (["{was}", "--baseline", "{good}", "--fail-on", "worst"], 2, "'worst' is no verdict to fail on (the nearest"),
        (["{was}", "--baseline", "{good}", "--fail-on", ""], 2, "gates nothing"),
        (["{was}", "--baseline", "{good}", "--fail-on", "same"], 2, "'same' is no verdict to fail on"),
        (["{was}", "--baseline", "{good}", "--junit", "{good}"], 2, "--baseline and --junit are the same file"),
        (["{was}", "--baseline", "{good}", "--junit", "{bad}/x", "--markdown", "{bad}/x"], 2, "are the same file"),
        (["{was}", "--baseline", "{good}", "--junit", "{was}/summary.json"], 2, "is also an input"),
        (["{was}", "--baseline", "{good}", "--junit", "{bad}/no/j.xml"], 1, "could not be written"),
        (["{was}", "--baseline", "{bad}/no/b.json", "--update"], 1, "could not be written"),
    ],
)
def test_bad_input_is_one_sentence(run, baseline, tmp_path, arguments, code, words):
    bad = tmp_path / "bad"
    bad.mkdir()
    write_bad(bad, baseline)
    names = {"was": tmp_path / "was", "bad": bad, "good": baseline}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found, out, err = run("gate", *(argument.format(**names) for argument in arguments))
    assert (found, out) == (code, ""), err
    assert words.format(**names) in err
    assert err.count("\n") == 1, err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("where", ["no/summary.md", "bad\0name", "."])
def test_a_summary_that_cannot_be_written_is_said_first(run, baseline, worse, tmp_path, monkeypatch, where):
    monkeypatch.setattr(os, "environ", os.environ | {"GITHUB_STEP_SUMMARY": str(tmp_path / where)})
    code, out, err = run("gate", worse, "--baseline", baseline)
    assert (code, out) == (1, "")
    assert "GITHUB_STEP_SUMMARY names" in err
