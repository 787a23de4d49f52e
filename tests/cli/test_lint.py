"""`moetrace lint`, and lint at import: what they print, the exit codes, and copies without what was found."""

import csv
import io
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.traps import arrays, choose, prepend, trace

from moetrace.lints import RULES
from moetrace.trace import Trace

TRACES = Path(__file__).parents[2] / "traces"


@pytest.fixture
def trapped(tmp_path) -> Path:
    """A warm-up of 64 rows before a clean trace, and a dense layer 5."""
    cell = choose(np.random.default_rng(1), 1)
    made = prepend(arrays(), np.repeat(cell, 64, axis=0))
    made["experts"][:, 2] = 255
    trace(made | {"layer_index": [3, 4, 5]}).write(tmp_path / "t.h5")
    return tmp_path / "t.h5"


def test_a_clean_trace_says_so_in_one_line(run):
    path = TRACES / "mixtral-8x7b-b16.h5"
    assert run("lint", path) == (0, "", f"{path}: 4,096 rows, nothing found.\n")
    code, out, _ = run("lint", path, "--format", "json")
    assert code == 0
    assert json.loads(out) == {"schema": "moetrace.lint/1", "errors": 0, "warnings": 0, "notes": 0, "findings": []}
    assert run("lint", path, "--format", "csv")[:2] == (0, "code,level,what,effect,fix,layers,rows,count\n")


def test_only_notes_exit_with_0(run):
    code, out, err = run("lint", TRACES / "tiny-olmoe.h5")
    assert code == 0 and err == "" and "2 notes" in out and "note  position-0-sink" in out


def test_warnings_exit_with_3(run, trapped):
    code, out, err = run("lint", trapped)
    assert code == 3 and err == ""
    assert out.startswith(f"{trapped}: 2 warnings, 1 note\n\nwarning  warm-up\n  64 rows (14%), from the first on")
    assert "\n  rows 0-63\n" in out and "\n  layer 5\n" in out
    assert "  Fix: --drop-warmup.\n" in out and "  Fix: --drop-dense.\n" in out


def test_errors_exit_with_3_in_every_format(run, trapped):
    with h5py.File(trapped, "r+") as raw:
        raw["/experts"][100, 1, 2] = 99
    code, out, err = run("lint", trapped, "--format", "json")
    said = json.loads(out)
    assert code == 3 and err == "" and (said["errors"], said["warnings"], said["notes"]) == (2, 2, 1)
    impossible = next(one for one in said["findings"] if one["code"] == "impossible-id")
    assert impossible["rows"] == [[100, 101]] and impossible["layers"] == [4] and impossible["count"] == 1
    assert set(impossible) == {"code", "level", "what", "effect", "fix", "layers", "rows", "count"}
    code, out, _ = run("lint", trapped, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 3 and [row["code"] for row in rows] == [one["code"] for one in said["findings"]]
    assert next(row for row in rows if row["code"] == "warm-up")["rows"] == "0-63"


def test_a_file_that_cannot_be_opened_is_an_error(run, tmp_path):
    (tmp_path / "t.h5").write_text("no")
    for path, said in ((tmp_path / "t.h5", "is not a trace file"), (tmp_path / "none.h5", "there is no file")):
        code, out, err = run("lint", path)
        assert code == 1 and out == "" and said in err and len(err.splitlines()) == 1


def test_a_copy_leaves_out_warm_up_and_dense_layers(run, tmp_path, trapped):
    fixed = tmp_path / "fixed.h5"
    code, out, err = run("lint", trapped, "--drop-warmup", "--drop-dense", "-o", fixed)
    assert code == 0 and out.startswith(f"{fixed}: 1 note\n\nnote  first-layer-not-0\n")
    assert err == f"{fixed}: left out 64 rows of warm-up and 1 dense layer (5).\n"
    with Trace.open(fixed) as copy:
        assert copy.rows == 400 and copy.layer_index.tolist() == [3, 4]
        assert np.array_equal(copy.read("experts", 0, 400), arrays()["experts"][:, :2])
    code, out, err = run("lint", trapped, "--drop-warmup", "-o", fixed)
    assert code == 3 and "warning  dense-layer" in out and err == f"{fixed}: left out 64 rows of warm-up.\n"
    code, _, err = run("lint", TRACES / "mixtral-8x7b-b16.h5", "--drop-dense", "-o", fixed)
    assert code == 0 and err.startswith(f"{fixed}: there was nothing to leave out.\n")


@pytest.mark.parametrize("options", [["--drop-dense"], ["-o", "x.h5"]])
def test_copies_need_both_options(run, trapped, options):
    code, out, err = run("lint", trapped, *options)
    assert code == 2 and out == "" and "need each other" in err


def test_a_copy_never_overwrites_its_trace(run, trapped):
    before = trapped.read_bytes()
    code, _, err = run("lint", trapped, "--drop-dense", "-o", trapped)
    assert code == 2 and "is also an input" in err and trapped.read_bytes() == before


@pytest.mark.parametrize("path", [*sorted(TRACES.glob("*.h5")), None], ids=lambda path: path.name if path else "trap")
def test_it_fits_80_columns(run, monkeypatch, trapped, path):
    path = path or trapped
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("COLUMNS", "80")
    assert max((len(line) for line in run("lint", path.name)[1].splitlines()), default=0) <= 80


def test_texts_fit_and_are_sentences():
    for rule in RULES.values():
        assert rule.effect.endswith(".") and not (rule.fix or "").endswith(".")


@pytest.fixture
def archive(tmp_path) -> Path:
    """An npz with 40 rows of warm-up before a clean capture, and a first layer without choices."""
    cell = choose(np.random.default_rng(1), 1)
    made = prepend(arrays(), np.repeat(cell, 40, axis=0))
    made["experts"][:, 0] = 255
    np.savez(
        tmp_path / "a.npz",
        expert_ids=made["experts"].astype(np.uint8),
        request_id=made["request"],
        position=np.r_[:40, np.tile(np.arange(100), 4)],
        phase=np.repeat(made["phase"], made["steps"]),
        layer_index=np.arange(3),
        meta=json.dumps({"num_experts": 16, "model": "mine"}),
    )
    return tmp_path / "a.npz"


def test_import_says_what_lint_finds(run, tmp_path, archive):
    out = tmp_path / "t.h5"
    code, printed, err = run("import", archive, "-o", out)
    lines = err.splitlines()
    assert code == 0 and printed == "" and lines[0].startswith(f"{out}: mine, 440 rows in 245 steps")
    assert lines[1].startswith("  warning: 40 rows (9%), from the first on") and lines[1].endswith("--drop-warmup.")
    assert lines[2] == "  warning: 1 of 3 layers did not route: 1 without any choice. Fix: --drop-dense."
    assert len(lines) == 3


def test_import_without_what_lint_finds(run, tmp_path, archive):
    out = tmp_path / "t.h5"
    code, _, err = run("import", archive, "-o", out, "--drop-warmup", "--drop-dense", "--compress", "zstd")
    lines = err.splitlines()
    assert code == 0 and lines[0].startswith(f"{out}: mine, 400 rows in 244 steps")
    assert lines[1:] == [
        f"{out}: left out 40 rows of warm-up and 1 dense layer (0).",
        "  note: The first MoE layer is layer 1.",
    ]
    with Trace.open(out) as copy:
        copy.verify()
        assert np.array_equal(copy.read("experts", 0, 400), arrays()["experts"][:, 1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "t.h5"]
