"""The picture of `analyze balance`: a PNG, or a page that stands alone and lets no stranger's text become markup."""

import json
import re
import struct

import numpy as np
import pytest

from moetrace.analyze.balance.plans import Tier, make_plan
from moetrace.analyze.balance.units import balance
from moetrace.generators import generate_trace
from moetrace.show.plots.balance_plot import plot
from moetrace.trace import Trace

EVIL = '</script><script>alert(1)</script>"<!--&\x1b[2J'
pytestmark = pytest.mark.usefixtures("altair")


@pytest.fixture
def altair():
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")


def found(name="plan.json"):
    trace = generate_trace("tiny-olmoe", requests=2, prompt=5, output=30)
    plan = make_plan("ep", Tier(4), (trace.layers, 32))
    return balance(trace, ["ep", "eplb"], tier=4, interval=7, plans={name: plan})


def test_png_is_one_of_a_size_to_look_at():
    width, height = struct.unpack(">II", plot(found(), "png", "a.h5")[16:24])
    assert 1500 < width < 2500 and 800 < height < 2500


def test_page_loads_nothing_and_marks_rebalances():
    balanced = found()
    page = plot(balanced, "html", "a.h5").decode()
    assert plot(balanced, "html", "a.h5").decode() == page
    markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    assert not re.search(r"<(link|img|iframe)\b|\bsrc=|\burl\(|@import", markup)
    spec = json.loads(re.search(r'id="spec">(.*?)</script>', page)[1])
    marks = [{"first_step": step} for step in balanced.trace["rebalance_steps"][0]]
    assert marks and marks in list(spec["datasets"].values())
    lines = [rows for rows in spec["datasets"].values() if "median" in rows[0]]
    assert {row["plan"] for rows in lines for row in rows} == {"fixed", "kept", "re-made", "clairvoyant", "given"}
    assert all(len({row["plan"] for row in rows}) == 1 for rows in lines)  # each has a panel of its own


def test_strangers_text_is_text():
    page = plot(found(EVIL), "html", EVIL).decode()
    assert "alert(1)" in page and "<script>alert" not in page and "\x1b" not in page
    assert page.count("</script>") == 2 and page.count("<h1>") == 1
    assert plot(found(EVIL), "png", EVIL).startswith(b"\x89PNG")


def test_layers_without_choices_can_be_drawn():
    ids = np.full((6, 2, 1), 255, np.uint8)
    for row in (None, 0):
        if row is not None:
            ids[:, 0, 0] = row
        for form in ("png", "html"):
            assert plot(balance(Trace.from_arrays(ids, num_experts=4), tier=2), form, "x")
