"""The report of a sweep or a search: its front, its axes, its cells."""

import json

import polars as pl
import pytest
from support.report_page import HOSTILE, check_alone, parsed
from support.sweeps import sweep_folder

import moetrace as mt

pytest.importorskip("altair")
pytest.importorskip("vl_convert")


def test_a_sweep_has_its_front_and_its_axes(tmp_path):
    folder = sweep_folder(tmp_path / "sweep", policies=["monde", "edge-ndp", HOSTILE])
    page = parsed(folder, tmp_path)
    check_alone(page)
    ids = {a.get("id") for _, a in page.elements}
    assert {"best", "failed", "front", "axes", "cells"} <= ids
    text = "".join(page.text)
    assert "26 of 27 cells have a result, 1 have none" in text and HOSTILE.replace("\x1b", "\\x1b") in text
    assert "no other beats in both time and GPU memory" in text
    assert "system.ndp.units2, 4, 6" in text and "moetrace sweep SWEEP.toml -o DIR" in text
    with pytest.raises(mt.UsageError, match="not of a sweep"):
        mt.report(folder, tmp_path / "page.html", cache=tmp_path / "cache.json")
    (folder / "cells.parquet").unlink()
    with pytest.raises(mt.MoetraceError, match=r"has no cells\.parquet"):
        mt.report(folder, tmp_path / "page.html")


def test_a_search_is_described_as_one_and_no_undrawn_front_is_mentioned(tmp_path):
    """Its cells may all have the same slots, so that there is no front to draw."""
    folder = sweep_folder(tmp_path / "sweep", policies=["monde", "edge-ndp"])
    cells = pl.read_parquet(folder / "cells.parquet").with_columns(gpu_memory_bytes=pl.lit(1e9))
    cells.write_parquet(folder / "cells.parquet")
    about = json.loads((folder / "sweep.json").read_text())
    about["axes"] = {"slots": list(range(30)), HOSTILE: HOSTILE}
    (folder / "sweep.json").write_text(json.dumps(about))
    (folder / "search.json").write_text("{}")
    page = parsed(folder, tmp_path)
    check_alone(page)
    text = "".join(page.text)
    assert "moetrace sweep SWEEP.toml --search -o DIR" in text and "22, 23 and 6 more" in text
    assert "Moved over the link, GB" in text and "Pareto front," not in text


@pytest.mark.parametrize("axis", ["trace", "policy", "slots"])
def test_a_cell_may_have_no_value_of_an_axis(tmp_path, axis):
    path = sweep_folder(tmp_path / "sweep", policies=["monde", "edge-ndp"]) / "cells.parquet"
    few = pl.when(pl.col("slots") != 16).then(pl.col(axis))
    pl.read_parquet(path).with_columns(few.alias(axis)).write_parquet(path)
    check_alone(parsed(path.parent, tmp_path))


@pytest.mark.parametrize("column", ["pareto", "gpu_memory_bytes", "ttft_s_p50", "error"])
def test_columns_of_a_sweep_are_of_their_kind(tmp_path, column):
    path = sweep_folder(tmp_path / "sweep", policies=["monde", "edge-ndp"]) / "cells.parquet"
    wrong = pl.lit(1) if column in ("error", "pareto") else pl.lit("much")
    pl.read_parquet(path).with_columns(wrong.alias(column)).write_parquet(path)
    with pytest.raises(mt.MoetraceError, match=rf"cells\.parquet must have a column {column}"):
        mt.report(path.parent, tmp_path / "page.html")
