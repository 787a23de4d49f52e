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


def test_energy_and_price_are_columns_fronts_and_limits(run, grid, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("sweep", grid, "-o", tmp_path / "out", "--pareto", "energy_j", "--jobs", 1)
    assert "No system lists [energy], so there is no front" in " ".join(out.split()) and "energy\n" not in out
    with grid.open("a") as file:
        file.write("system.energy.gpu = {idle_w = 20, active_w = 360}\nsystem.price.usd_hour = 2\n")
    limit = ("--pareto", "energy_j", "--slo", "energy_per_token_j<=200mJ")
    code, out, _ = run("sweep", grid, "-o", tmp_path / "out", *limit, "--jobs", 1)
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    assert all(heading in words for heading in ("energy", "a token J", "a million", "tokens USD", "USD/h"))
    assert "* Pareto front: no other cell beats it in total time or energy without losing in the other." in words
    cells = pl.read_parquet(tmp_path / "out" / "cells.parquet")
    assert cells["price"].to_list() == [2.0] * 8
    kept = cells["energy_per_token_j"] <= 0.2
    assert (cells["slo_miss"] == 0).to_list() == kept.to_list()
    view = ("--sort", "energy_j", "--top", 1, "--columns", "energy_j")
    _, out, _ = run("sweep", grid, "-o", tmp_path / "out", *view, "--pareto", "energy_j")
    assert f"{cells['energy_j'].min():,.1f}" in out
    page = tmp_path / "page.html"
    assert run("report", tmp_path / "out", "-o", page)[0] == 0
    assert "no other beats in both time and energy" in page.read_text() and "Least energy: " in page.read_text()


def test_calibrated_machines_beside_others_are_noted(run, grid, tmp_path):
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


def test_failures_are_shown_and_exit_with_1(run, grid, tmp_path):
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


def rows_of(out: str) -> list[list[str]]:
    """The first part of a table, without its headings: a list of cells for each line."""
    lines = out.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("─"))
    rest = lines[rule + 1 :]
    return [line.split() for line in rest[: rest.index("")]]


def test_printed_rows_and_columns_can_be_chosen(run, grid, tmp_path):
    """Sorted, the better first; the first of these; other figures; JSON and CSV follow, and the folder has all."""
    _, out, _ = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1, "--format", "json")
    cells = json.loads(out)["cells"]
    shown = ["--sort", "tokens_per_s", "--top", 3]
    _, out, _ = run("sweep", grid, "-o", tmp_path / "out", *shown, "--columns", "tokens_per_s,tpot_s.p99,step_s.max")
    speeds = sorted((cell["tokens_per_s"] for cell in cells), reverse=True)[:3]
    assert [row[-3] for row in rows_of(out)] == [f"{speed:,.1f}" for speed in speeds]
    assert "3 of 8 cells." in out and "step max" in out and "total" not in out.split("\n\n")[0]
    _, out, _ = run("sweep", grid, "-o", tmp_path / "out", *shown, "--format", "json")
    assert [cell["tokens_per_s"] for cell in json.loads(out)["cells"]] == speeds
    _, out, _ = run("sweep", grid, "-o", tmp_path / "out", "--sort", "total_s", "--format", "csv")
    totals = pl.read_csv(out.encode())["total_s"].to_list()
    assert totals == sorted(totals) and len(totals) == 8
    assert len(pl.read_parquet(tmp_path / "out" / "cells.parquet")) == 8


@pytest.mark.parametrize(
    ("baseline", "axis", "value", "words"),
    [
        ("slots", "slots", 8, "the first slots"),
        ("slots=48", "slots", 48, "slots 48"),
        ("system.ndp.units=6", "system.ndp.units", 6, "system.ndp.units 6"),
        ("policy=edge-ndp", "policy", "edge-ndp", "policy edge-ndp"),
    ],
)
def test_speedups_are_against_a_value_of_any_axis(run, grid, tmp_path, baseline, axis, value, words):
    _, out, _ = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1, "--baseline", baseline, "--format", "json")
    cells = json.loads(out)["cells"]
    axes = ("policy", "slots", "system.ndp.units")
    for cell in cells:
        same = [
            other for other in cells if all(other[a] == cell[a] for a in axes if a != axis) and other[axis] == value
        ]
        assert len(same) == 1 and cell["speedup"] == pytest.approx(same[0]["total_s"] / cell["total_s"])
    _, out, _ = run("sweep", grid, "-o", tmp_path / "out", "--baseline", baseline)
    assert f"Speed-ups are against {words}, all else equal." in " ".join(out.split())


def test_speedups_of_zipped_axes_are_against_a_row(run, grid, tmp_path):
    zipped = "[[zip]]\nslots = [8, 48]\nset.system.link.latency_us = [5, 8]\n"
    grid.write_text(f'trace = "t.h5"\npolicy = "edge-ndp"\n{zipped}')
    _, out, _ = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1, "--baseline", "slots", "--format", "json")
    first, second = json.loads(out)["cells"]
    assert (first["speedup"], second["speedup"]) == (1.0, pytest.approx(first["total_s"] / second["total_s"]))


def test_oracles_and_what_does_not_fit_are_marked_and_never_starred(run, grid, tmp_path):
    seer = tmp_path / "seer.toml"
    seer.write_text('name = "seer"\ndispatch = "gpu"\nresidency = "belady"\nscope = "global"\n')
    ahead = tmp_path / "ahead.toml"
    ahead.write_text('name = "ahead"\ndispatch = "gpu"\nresidency = "lru"\nprefetch = "oracle:2"\n')
    policies = '["on-demand", "seer.toml", "ahead.toml"]'
    memory = "[set]\nsystem.gpu.memory_gb = [5, 16]\n"
    grid.write_text(f'trace = "t.h5"\nsystem = "rtx4090-offload"\npolicy = {policies}\nslots = [48, 192]\n{memory}')
    code, out, _ = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1)
    cells = pl.read_parquet(tmp_path / "out" / "cells.parquet")
    assert code == 0
    assert cells["oracle"].to_list() == [False] * 4 + [True] * 8
    tight = (pl.col("slots") == 192) & (pl.col("system.gpu.memory_gb") == 5)
    assert cells.filter(~pl.col("fits")).equals(cells.filter(tight))
    assert not cells.filter(pl.col("oracle") | ~pl.col("fits"))["pareto"].any() and cells["pareto"].any()
    assert {row[0] for row in rows_of(out)} >= {"o", "o!", "!", "*"}
    assert "o knows the future" in out and "! does not fit the machine" in " ".join(out.split())


def test_one_of_equal_cells_is_starred(run, grid, tmp_path):
    grid.write_text('trace = "t.h5"\npolicy = ["edge-ndp-tp", "ndp-tp"]\nslots = 8\n')
    run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1)
    cells = pl.read_parquet(tmp_path / "out" / "cells.parquet")
    assert cells["total_s"].n_unique() == 1 and cells["pareto"].to_list() == [True, False]


def test_limits_are_hard(run, grid, tmp_path):
    _, out, _ = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1, "--format", "json")
    totals = sorted(cell["total_s"] for cell in json.loads(out)["cells"])
    limit = f"total_s<={1e3 * totals[2]:.12g}ms"
    grid.write_text(f'slo = "{limit}"\n{grid.read_text()}')
    code, out, _ = run("sweep", grid, "-o", tmp_path / "out")
    cells = pl.read_parquet(tmp_path / "out" / "cells.parquet")
    assert code == 0 and "kept" in out and "miss a limit" in out
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["slo"] == [limit]
    for cell in cells.iter_rows(named=True):
        miss = max(cell["total_s"] / totals[2] - 1, 0)
        assert cell["slo_miss"] == pytest.approx(miss, abs=1e-9) and not (cell["pareto"] and miss > 1e-9)
    run("sweep", grid, "-o", tmp_path / "out", "--slo", "total_s<=1us")
    none = pl.read_parquet(tmp_path / "out" / "cells.parquet")
    assert not none["pareto"].any() and (none["slo_miss"] > 1000).all()


def test_a_batch_is_an_axis_and_rebatched_once(run, grid, tmp_path):
    grid.write_text('trace = "t.h5"\nbatch = [1, 2]\npolicy = ["monde", "edge-ndp"]\nslots = 48\n')
    code, out, err = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1)
    assert code == 0 and "4 cells: 4 replayed" in err and "batch" in out
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "batched").iterdir()}
    assert len(written) == 2
    cells = pl.read_parquet(tmp_path / "out" / "cells.parquet")
    assert cells["batch"].to_list() == [1, 1, 2, 2] and cells["name"][2] == "t/batch=2/edge-ndp/monde"
    for batch, policy, total_s in cells.select("batch", "policy", "total_s").iter_rows():
        mt.rebatch(tmp_path / "t.h5", tmp_path / "b.h5", batch=batch)
        (alone,) = mt.replay(tmp_path / "b.h5", policies=policy, slots=48).summary["total_s"]
        assert total_s == alone
    assert cells.filter(pl.col("pareto"))["batch"].n_unique() == 2  # each batch has a front of its own
    _, _, err = run("sweep", grid, "-o", tmp_path / "out")
    assert "0 replayed, 4 found finished" in err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "batched").iterdir()} == written
    without = mt.sweep({"trace": str(tmp_path / "t.h5"), "batch": [1, 2], "policy": "monde", "slots": 48})
    assert without.cells["total_s"].to_list() == cells.filter(policy="monde")["total_s"].to_list()


def test_a_link_for_rebatched_traces_is_refused(run, grid, tmp_path):
    grid.write_text('trace = "t.h5"\nbatch = 2\npolicy = "monde"\n')
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "batched").symlink_to(tmp_path / "elsewhere")
    code, _, err = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1)
    assert code == 1 and "is a symbolic link" in err and not list((tmp_path / "elsewhere").iterdir())


def test_a_dry_run_says_the_sum_first(run, grid, tmp_path, monkeypatch):
    import moetrace.cli.commands.sweep as module

    said = []
    monkeypatch.setattr(module, "say", said.append)
    monkeypatch.setattr("moetrace.cli.tables.output.print_rows", lambda *_: said.append("the cells"))
    run("sweep", grid, "--dry-run")
    assert said[0].startswith("moetrace: 8 cells, 8 to replay: about ") and said[-1] == "the cells"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sort", "tpot_s.p98"], "--sort: 'tpot_s.p98' is no figure (the nearest is 'tpot_s_p99')"),
        (["--sort", "prefetch_bytes"], "neither less nor more of it is better"),
        (["--columns", "total_s,policy"], "--columns: 'policy' is no figure"),
        (["--columns", ""], "--columns: '' is no figure"),
        (["--top", "0"], "--top"),
        (["--baseline", "batch"], "'batch' is no axis of the sweep; its axes are policy, slots, system.ndp.units"),
        (["--baseline", "slots=9"], "slots is never '9'"),
        (["--slo", "total_s"], "An SLO is METRIC<=LIMIT"),
        (["--search", "--top", "3"], "--top is for a sweep, not for --search"),
    ],
)
def test_impossible_columns_are_refused_before_any_work(run, grid, tmp_path, arguments, words):
    code, out, err = run("sweep", grid, "-o", tmp_path / "out", "--jobs", 1, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err
    assert not list(tmp_path.glob("out/cells/*"))


LOSSY = """
trace = "t.h5"
system = "edge-pi-cluster"
policy = ["edge-ndp", "on-demand"]
slots = 96
[set]
system.link.loss = 0.02
"""


def test_figures_of_some_machines_are_columns_where_a_cell_has_one(run, grid, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("sweep", grid, "-o", tmp_path / "plain", "--jobs", 1)
    assert "gates" not in out and "resent" not in out and "disk" not in out
    grid.write_text(LOSSY)
    code, out, _ = run("sweep", grid, "-o", tmp_path / "lossy", "--jobs", 1)
    words, cells = " ".join(out.split()), pl.read_parquet(tmp_path / "lossy" / "cells.parquet")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert f"{100 * cells['gate_mass_dropped'][0]:.1f}" in out and "lost %" in words
    assert "so a cell that loses more may look better" in words
    reliable = LOSSY + 'system.link.loss_mode = "reliable"\n'
    grid.write_text(reliable)
    code, out, _ = run("sweep", grid, "-o", tmp_path / "reliable", "--jobs", 1)
    assert code == 0 and "resent" in out and "gates" not in out
    above_disk = LOSSY.replace("edge-pi-cluster", "rtx4090-nvme").replace('"edge-ndp", ', "")
    grid.write_text(above_disk.partition("[set]")[0])
    code, out, _ = run("sweep", grid, "-o", tmp_path / "disk", "--jobs", 1)
    cells = pl.read_parquet(tmp_path / "disk" / "cells.parquet")
    assert code == 0 and "disk" in out and cells["disk_bytes"][0] > 0
    assert ("host" in out) == (cells["host_hits"][0] > 0)


def test_small_sizes_and_prices_do_not_read_as_zero(run, grid, tmp_path):
    grid.write_text('trace = "t.h5"\nsystem = "remoe"\npolicy = "remoe"\n')
    _, out, _ = run("sweep", grid, "-o", tmp_path / "out", "--columns", "remote_usd,link_bytes", "--jobs", 1)
    cells = pl.read_parquet(tmp_path / "out" / "cells.parquet")
    usd, size = map(float, out.splitlines()[3].split()[-2:])
    assert usd == pytest.approx(cells["remote_usd"][0], rel=0.05) and 0 < usd < 0.001
    unit = {"MB": 1e6, "kB": 1e3}[out.splitlines()[1].split()[-1]]
    assert size * unit == pytest.approx(cells["link_bytes"][0], rel=0.05)
