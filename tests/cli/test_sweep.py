"""`moetrace sweep`: what it prints, on which stream, and with which exit code."""

import json
import socket
from pathlib import Path

import polars as pl
import pytest

import moetrace as mt
from moetrace.results.swept import read_swept


@pytest.fixture
def grid(tmp_path) -> Path:
    mt.generate(tmp_path / "t.h5", "tiny-olmoe", requests=2, prompt=4, output=6)
    path = tmp_path / "s.toml"
    path.write_text('trace = "t.h5"\nslots = [8, 48]\n[set]\nsystem.ndp.units = [4, 6]\n')
    return path


def test_table_counts_and_resumes(run, grid, tmp_path):
    code, out, err = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1)
    assert code == 0
    assert err == "moetrace: 8 cells: 8 replayed, 0 found finished.\n"
    marks = sum(line.startswith("*") for line in out.splitlines()[3:11])
    assert marks == pl.read_parquet(tmp_path / "out" / "cells.parquet")["pareto"].sum() > 0
    assert "In all cells: trace t, model tiny-olmoe, system edge-ndp." in out
    assert "Pareto front" in out
    again = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 2)
    assert again == (0, out, "moetrace: 8 cells: 0 replayed, 8 found finished.\n")
    grid.write_text(grid.read_text().replace("[8, 48]", "[48]"))
    _, _, err = run("sweep", grid, "-o", tmp_path / "out", "--pareto", "price")
    assert "4 cells: 0 replayed, 4 found finished." in err
    assert "4 finished cells not of this sweep" in err


def test_calibrated_machines_beside_others_are_told(run, grid, tmp_path):
    grid.write_text('trace = "t.h5"\nsystem = ["edge-ndp", "l40s"]\npolicy = "on-demand"\nslots = 8\n')
    code, out, _ = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1)
    assert code == 0 and "Constants of l40s are calibrated, those of edge-ndp are not" in out
    assert "Constants of l40s are calibrated" in read_swept(tmp_path / "out").notes[0]


@pytest.mark.parametrize("columns", [20, 80])
def test_table_fits_the_terminal(run, grid, tmp_path, monkeypatch, columns):
    """Each part begins with the axes, and no figure is lost; what is wider than the terminal is not cut."""
    _, wide, _ = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1)
    monkeypatch.setenv("COLUMNS", str(columns))
    _, narrow, _ = run("sweep", grid, "-o", tmp_path / "out")
    table = narrow.split("In all cells")[0]
    assert columns < 80 or max(map(len, narrow.splitlines())) <= columns
    assert table.count("units") == table.count("\n\n") > 1
    for figure in wide.split("In all cells")[0].split():
        assert figure.startswith("─") or figure in table


def test_json_and_csv_have_every_digit(run, grid, tmp_path):
    code, out, _ = run("sweep", grid, "-o", tmp_path / "out", "--format", "json", "--jobs", 1)
    assert code == 0
    frame = pl.read_parquet(tmp_path / "out" / "cells.parquet")
    assert json.loads(out)["cells"] == frame.to_dicts()
    _, out, _ = run("sweep", grid, "-o", tmp_path / "out", "--format", "csv", "--jobs", 1)
    assert out == frame.write_csv()


def test_failures_are_told_and_exit_with_1(run, grid, tmp_path):
    grid.write_text('trace = ["t.h5", "no.h5"]\nsystem = ["edge-ndp", "rtx4090-offload"]\npolicy = "monde"\n')
    code, out, err = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1)
    assert code == 1
    assert "no/edge-ndp/monde and 1 more failed: there is no file no.h5.\n" in err
    assert "t/rtx4090-offload/monde failed: Policy monde: " in err
    assert "moetrace: 4 cells: 1 replayed, 0 found finished, 3 failed.\n" in err
    assert "trace" in out.splitlines()[1]


def test_a_failed_cell_shows_its_slots_as_they_were_given(run, grid, tmp_path):
    grid.write_text('trace = "t.h5"\npolicy = "monde"\nslots = ["25%", 8]\n[set]\nsystem.ndp.capacity_gb = [32, 0.1]\n')
    code, out, _ = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1)
    assert code == 1
    slots = [
        cells
        for line in out.splitlines()
        if (cells := line.replace("*", "").split()) and cells[0] in ("48", "25%", "8")
    ]
    assert [(cells[0], cells[1]) for cells in slots] == [("48", "32"), ("25%", "0.1"), ("8", "32"), ("8", "0.1")]


def test_dry_run_says_what_would_be_done(run, grid, tmp_path):
    code, out, err = run("sweep", grid, "--dry-run")
    assert code == 0
    assert out.count(" replay") == 8
    assert "8 cells, 8 to replay: about " in err
    assert "Measured on the first steps" in err
    assert not (tmp_path / "out").exists()
    run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1)
    code, out, err = run("sweep", grid, "-o", tmp_path / "out", "--dry-run", "--format", "json")
    assert {row["state"] for row in json.loads(out)} == {"finished"}
    assert "none of them left to replay" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--jobs", 1], 2, "name one with -o DIR"),
        (["-o", "out", "--jobs", 0], 2, "--jobs"),
        (["-o", "out", "--jobs", 2, "--dask", "tcp://x:1"], 2, "give one of them"),
        (["-o", "out", "--pareto", "cost"], 2, "--pareto"),
        (["-o", "t.h5"], 2, "t.h5 is a file"),
    ],
)
def test_wrong_usage(run, grid, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    found, out, err = run("sweep", grid, *arguments)
    assert (found, out) == (code, "")
    assert words in err
    assert err.count("\n") == 1


def test_wrong_grids(run, tmp_path):
    (tmp_path / "s.toml").write_text('trace = "t.h5"\n[set]\nsystem.ndp.unit = [4]\n')
    code, out, err = run("sweep", tmp_path / "s.toml", "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "the nearest is 'ndp.units'" in err
    code, _, err = run("sweep", tmp_path / "none.toml", "-o", tmp_path / "out")
    assert code == 1
    assert "No such file" in err


def test_no_scheduler(run, grid, tmp_path):
    pytest.importorskip("distributed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        code, out, err = run("sweep", grid, "-o", tmp_path / "out", "--dask", address)
    assert (code, out) == (1, "")
    assert err.startswith(f"moetrace: No Dask scheduler answers at {address}")
    assert err.count("\n") == 1


def test_a_dry_run_leaves_a_folder_as_it_is(run, grid, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        code, out, _ = run("sweep", grid, "--dry-run", "-o", tmp_path / name)
        assert (code, out.count(" replay")) == (0, 8)
    assert [*(tmp_path / "empty").iterdir()] == []
    assert not (tmp_path / "none").exists()
    run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1)
    _, out, _ = run("sweep", grid, "--dry-run", "-o", tmp_path / "out")
    assert out.count(" finished") == 8
