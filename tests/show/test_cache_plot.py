"""What the picture of hit curves shows: every policy, Belady's first, and LRU at every capacity."""

import json
import re

import numpy as np
import polars as pl
import pytest

from moetrace.analyze.cache.hit_curve import lru_curve
from moetrace.analyze.cache.hits import cache_hits
from moetrace.generators import generate_trace
from moetrace.show.plots.cache_plot import curves, plot
from moetrace.trace import Trace


@pytest.fixture(scope="module")
def trace() -> Trace:
    return generate_trace("tiny-olmoe", requests=3, prompt=4, output=40)


def test_lru_has_every_capacity_and_the_others_those_replayed(trace):
    frame = cache_hits(trace, [24, 48, 96], ["lru", "fifo", "belady"], sequential=True)
    points = curves(frame, lru_curve(trace, sequential=True))
    counts = points.filter(phase="decode").group_by("policy").len().sort("policy")
    assert counts.rows() == [("belady", 3), ("fifo", 3), ("lru", 192)]
    assert points["replayed"].sum() == 3 * 3 * 3
    lru = points.filter(policy="lru", phase="all")
    assert lru["capacity"].to_list() == sorted(lru["capacity"].to_list())
    assert np.all(np.diff(lru["hit_rate"]) >= 0), "LRU has no anomaly"
    assert curves(frame, None)["replayed"].all()


def test_capacities_in_bytes_are_gb(trace):
    frame = cache_hits(trace, ["3GB", "500MB"], ["lru"])
    points = curves(frame, lru_curve(trace))
    assert set(points["capacity"].to_list()) == {3.0, 0.5}


def test_the_page_escapes_and_loads_nothing(trace):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    frame = cache_hits(trace, [24], ["lru", "belady"])
    page = plot(frame, None, "html", "<b>&name", "a <subtitle>").decode()
    assert "&lt;b&gt;&amp;name" in page and "<b>&name" not in page and "a &lt;subtitle&gt;" in page
    assert "default-src 'none'" in page and isinstance(frame, pl.DataFrame)


def panels(page: str) -> list[dict]:
    spec = json.loads(re.search(r'id="spec">(.*?)</script>', page)[1])
    found = [(panel["title"], panel["layer"]) for panel in spec["vconcat"][0]["hconcat"]]
    return [(title, layers, spec["datasets"]) for title, layers in found]


def test_one_phase_is_drawn_and_chosen_capacities_are_marked(trace):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    frame = cache_hits(trace, ["24", "48", "96"], ["fifo", "belady"])
    page = plot(frame, None, "html", "a", "b", phase="decode", marked=["48"]).decode()
    ((title, layers, datasets),) = panels(page)
    assert title == "Decode steps"
    kinds = [layer["mark"]["type"] for layer in layers]
    assert kinds == ["rule", "area", "rule", "line", "circle"]
    marked, bounds, drawn = (datasets[layers[i]["data"]["name"]] for i in (0, 1, 3))
    assert [row["capacity"] for row in marked] == [48.0]
    assert {row["capacity"] for row in drawn} == {24.0, 48.0, 96.0} and all(row["replayed"] for row in drawn)
    assert all(row["hit_rate_low"] <= row["hit_rate"] <= row["hit_rate_high"] for row in bounds)
    assert len(panels(plot(frame, None, "html", "a", "b").decode())) == 2
