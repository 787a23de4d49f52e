"""The picture of `analyze locality`: a PNG, or a page that stands alone and lets no stranger's text become markup."""

import json
import re
import struct
import sys

import pytest

from moetrace.analyze.locality.measure import locality
from moetrace.generators import generate_trace
from moetrace.show.plots.locality_plot import plot
from moetrace.show.plots.picture import check_can_plot
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace

needs_altair = pytest.mark.usefixtures("altair")
EVIL = '</script><script>alert(1)</script>"<!--&\x1b[2J'


@pytest.fixture
def altair():
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")


def found(model="tiny-olmoe"):
    trace = generate_trace("tiny-olmoe", requests=3, prompt=5, output=30)
    experts, request = trace.read("experts", 0, trace.rows), trace.read("request", 0, trace.rows)
    return locality(Trace.from_arrays(experts, num_experts=32, model=model, request=request), pairs=False)


@needs_altair
def test_png_is_one_of_a_size_to_look_at():
    picture = plot(found(), "png", "a.h5")
    width, height = struct.unpack(">II", picture[16:24])
    assert picture.startswith(b"\x89PNG") and 1500 < width < 2500 and 800 < height < 2500


@needs_altair
def test_page_loads_nothing_and_is_the_same_each_time():
    page = plot(found(), "html", "a.h5").decode()
    assert plot(found(), "html", "a.h5").decode() == page
    markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    assert not re.search(r"<(link|img|iframe)\b|\bsrc=|\burl\(|@import", markup) and "color-scheme" in markup
    spec = json.loads(re.search(r'id="spec">(.*?)</script>', page)[1])
    assert sorted(map(len, spec["datasets"].values())) == [3 * 6, 2 * 32, 6 * 32], "of lags 1 to 32, capacities, cells"
    assert "http" not in json.dumps(spec).replace(spec["$schema"], "")


@needs_altair
def test_legend_says_if_colours_end_below_the_greatest_load():
    color = json.loads(re.search(r'id="spec">(.*?)</script>', plot(found(), "html", "a.h5").decode())[1])
    color = color["vconcat"][0]["encoding"]["color"]
    top = color["scale"]["domain"][1]
    load = found().load
    choices = (load["prefill"] + load["decode"]).to_numpy().reshape(6, 32)
    above = (choices / choices.mean(axis=1, keepdims=True)).max() > top
    assert color["legend"]["values"][-1] == top and ("≥" in color["legend"]["labelExpr"]) == above


@needs_altair
def test_strangers_text_is_text():
    page = plot(found(EVIL), "html", EVIL).decode()
    assert "alert(1)" in page and "<script>alert" not in page and "\x1b" not in page
    assert page.count("</script>") == 2 and page.count("<h1>") == 1
    assert plot(found(EVIL), "png", EVIL).startswith(b"\x89PNG")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(MoetraceError, match=r"altair, which is not installed: .*\.\[report\]"):
        check_can_plot()


@needs_altair
def test_layers_without_choices_and_one_row_can_be_drawn():
    import numpy as np

    ids = np.full((2, 2, 1), 255, np.uint8)
    ids[:, 0, 0] = [1, 2]
    for form in ("png", "html"):
        assert plot(locality(Trace.from_arrays(ids, num_experts=4)), form, "x")
        assert plot(locality(Trace.from_arrays(ids[:1, :1], num_experts=4)), form, "x")
