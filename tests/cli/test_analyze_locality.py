"""`moetrace analyze locality`: what it prints, writes and refuses."""

import csv
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from moetrace.analyze.locality import measure as library
from moetrace.cli import main
from moetrace.cli.commands.analyze_locality import FRAMES
from moetrace.trace import Trace

TINY = Path(__file__).parents[2] / "traces" / "tiny-olmoe.h5"


@pytest.fixture
def run(run):
    return partial(run, "analyze", "locality")


@pytest.fixture
def small(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(16, dtype=np.uint8), (90, 3, 1)), axis=2)[:, :, :2]
    path = tmp_path / "small.h5"
    Trace.from_arrays(
        ids, num_experts=16, model="[red]x\x1b[2J", request=np.repeat([0, 1, 2], 30), layer_index=np.array([1, 3, 7])
    ).write(path)
    return path


def test_frames_are_those_of_the_library():
    assert sorted(FRAMES) == sorted(library.FRAMES)


def test_table_has_every_layer_and_its_spread(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = run(TINY)
    lines = out.splitlines()
    assert (code, err) == (0, "") and max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[3:9]] == list("012345")
    assert [line.split()[0] for line in lines[10:14]] == ["mean", "median", "min", "max"]
    assert "median  0.89   17.5   1.60  0.57    31.6   3.91" in out
    assert "16,414 rows of 64 requests; 6 layers of 32 experts, top 4." in " ".join(out.split())
    assert "sample" not in out


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_table_keeps_to_the_width_and_shows_markup_as_text(run, small, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run(small, "--sample-rows", "40")
    assert code == 0 and max(map(len, out.splitlines())) <= max(72, columns)
    assert "[red]x\\x1b[2J" in out and "30 rows of 1 request (--sample-rows)" in " ".join(out.split())


def test_json_holds_everything_and_csv_one_frame(run, small, tmp_path):
    found = json.loads(run(small, "--format", "json")[1])
    assert found["schema"] == "moetrace.locality/1" and found["trace"]["rows"] == 90
    assert set(FRAMES) <= set(found) and [row["layer"] for row in found["layers"]] == [1, 3, 7]
    for frame in FRAMES:
        rows = list(csv.DictReader(io.StringIO(run(small, "--format", "csv", "--frame", frame)[1])))
        assert len(rows) == len(found[frame]) and list(rows[0]) == list(found[frame][0])
    out = tmp_path / "out.json"
    code, said, _ = run(small, "--format", "json", "-o", out)
    assert (code, said) == (0, "") and json.loads(out.read_text()) == found


def test_parquet_goes_to_a_file_and_is_the_same_each_time(run, small, tmp_path):
    one, two = tmp_path / "1.parquet", tmp_path / "2.parquet"
    for path in (one, two):
        assert run(small, "--format", "parquet", "-o", path, "--no-pairs") == (0, "", "")
    assert one.read_bytes() == two.read_bytes()
    assert pl.read_parquet(one)["layer"].to_list() == [1, 3, 7] and "lift_p99" not in pl.read_parquet(one).columns
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.parquet", "2.parquet", "small.h5"]


@pytest.mark.parametrize("name", ["a.png", "a.HTML"])
def test_plot_writes_a_picture_beside_the_table(run, small, tmp_path, name):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    code, out, err = run(small, "--plot", tmp_path / name)
    assert code == 0 and err == "" and "Gini" in out and (tmp_path / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--format", "parquet"], 2, "name a file with -o FILE"),
        (["-o", "x.csv"], 2, "goes with --format"),
        (["--frame", "load"], 2, "--frame goes with --format csv or parquet"),
        (["--frame", "load", "--format", "json"], 2, "--frame goes with --format csv or parquet"),
        (["--plot", "x.pdf"], 2, "must end with .png or .html"),
        (["--plot", "small.h5"], 2, "is also an input"),
        (["--phase", "prefill"], 1, "has no prefill rows to look at"),
        (["--phase", "mixed"], 2, "--phase"),
        (["--format", "csv", "-o", "no/x.csv"], 1, "no/x.csv could not be written"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(run, small, monkeypatch, arguments, code, said):
    monkeypatch.chdir(small.parent)
    found, out, err = run("small.h5", *arguments)
    assert (found, out) == (code, "") and said in err and err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["small.h5"]


def test_a_trace_of_counts_is_refused(run, tmp_path):
    import h5py

    path = tmp_path / "counts.h5"
    with h5py.File(path, "w") as file:
        file.attrs.update(schema="moetrace/1", model="x", num_experts=8, top_k=2, source="{}", created_by="test")
        file["counts"], file["steps/offset"] = np.ones((2, 3, 8), np.int64), np.array([0, 2, 4])
        file["steps/phase"], file["layers/index"] = np.ones(2, np.uint8), np.arange(3, dtype=np.uint16)
    code, _, err = run(path)
    assert code == 1 and "only counts" in err


def test_group_has_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["analyze", "--help"])
    assert (stop.value.code or 0) == 0 and "locality" in capsys.readouterr().out
