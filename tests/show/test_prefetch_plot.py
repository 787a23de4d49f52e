"""What the picture of `analyze prefetch` shows: where misses and bytes go, by predictor."""

import polars as pl
import pytest

from moetrace.analyze.prefetch.value import prefetch_value
from moetrace.generators import generate_trace
from moetrace.show.plots.prefetch_plot import parts, plot


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    trace = generate_trace("tiny-olmoe", requests=3, prompt=4, output=40)
    return prefetch_value(trace, 48, ["last-token", "oracle"], system="rtx4090-offload")


def test_the_parts_are_all_misses_and_all_bytes(frame):
    shares, moved = parts(frame)
    assert set(shares["what"]) == {"named, and there in time", "named too late", "not named"}
    assert shares["value"].min() >= 0
    sums = shares.group_by("predictor", "phase").agg(pl.col("value").sum())
    assert all(abs(value - 1) < 1e-5 for value in sums["value"])
    gigabytes = moved.group_by("predictor", "phase").agg(pl.col("value").sum())
    both = gigabytes.join(frame, on=["predictor", "phase"])
    assert len(both) and ((both["value"] - both["prefetched_bytes"] / 1e9).abs() < 1e-5).all()


def test_without_a_machine_nothing_is_late(frame):
    shares, moved = parts(frame.with_columns(timely_hits=None, prefetched_bytes=None, wasted_bytes=None))
    assert set(shares["what"]) == {"named", "not named"} and moved.is_empty()


def test_the_page_escapes_and_loads_nothing(frame):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    page = plot(frame, "html", "<b>&name", "a <subtitle>").decode()
    assert "&lt;b&gt;&amp;name" in page and "<b>&name" not in page and "default-src 'none'" in page
    assert plot(frame, "png", "a", "b").startswith(b"\x89PNG")
