"""`result.plot`: every chart can be drawn, and who lacks Altair is told what to install."""

import sys

import pytest

import moetrace as mt
from moetrace.show.charts import QUESTIONS

pytest.importorskip("altair")
vl_convert = pytest.importorskip("vl_convert")


@pytest.fixture(scope="module")
def result():
    trace = mt.generate_trace("tiny-olmoe", requests=4, prompt=8, output=12, batch=2)
    return mt.replay(trace, policies=["monde", "edge-ndp"], slots=48)


def test_it_lists_its_charts(result):
    assert dir(result.plot) == sorted(QUESTIONS)
    assert all(f".{name}()" in repr(result.plot) for name in QUESTIONS)
    assert all(getattr(type(result.plot), name).__doc__ for name in QUESTIONS)


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_chart_is_drawn(result, name):
    image = vl_convert.vegalite_to_svg(getattr(result.plot, name)().to_json())
    assert image.startswith("<svg") and ("edge-ndp" in image or name == "load")


def test_a_missing_package_is_named(result, monkeypatch):
    plot = result.plot
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(mt.MoetraceError, match=r"pip install '\.\[report\]'"):
        plot.latency()


def test_many_units_are_three_rows(result):
    trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=4, output=4)
    many = mt.replay(trace, policies="ndp-ep", overrides={"system.ndp.units": 32})
    image = vl_convert.vegalite_to_svg(many.plot.utilization().to_json())
    assert "NDP, least" in image and "NDP 31" not in image
