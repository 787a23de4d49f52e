"""The report in a real browser, with networking off: no error, all charts drawn, tooltips, dark, a phone's width."""

import re

import pytest
from support.browser import CHROMIUM, browser
from support.sweeps import sweep_folder

import moetrace as mt

pytest.importorskip("altair")
pytest.importorskip("vl_convert")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
HOSTILE = "</script><img src=x onerror=alert(1)>'\"&"
CHARTS = "document.querySelectorAll('.chart').length"
DRAWN = "[...document.querySelectorAll('.chart svg')].filter(e => e.querySelector('path[d], text')).length"


@pytest.fixture(scope="module")
def tab():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "replay.html"
    trace = mt.generate_trace("tiny-olmoe", requests=6, prompt=8, output=12, batch=3)
    policies = ["monde", "edge-ndp", mt.load_policy("on-demand", {"name": HOSTILE})]
    mt.report(mt.replay(trace, policies=policies, slots=48), path)
    return path


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    path = folder / "sweep.html"
    mt.report(sweep_folder(folder / "sweep", ["monde", "edge-ndp", HOSTILE]), path)
    return path


@pytest.mark.parametrize("which", ["replayed", "swept"])
@pytest.mark.parametrize("width, dark", [(1200, False), (1200, True), (375, False)])
def test_draws_all_without_network_or_errors(tab, request, which, width, dark):
    path = request.getfixturevalue(which)
    tab.errors.clear()
    tab.requests.clear()
    tab.open(path, width=width, dark=dark)
    assert tab.errors == []
    assert tab.requests == [path.as_uri()]
    assert tab.value(DRAWN) == tab.value(CHARTS) >= (10 if which == "replayed" else 5)
    assert tab.value("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert tab.value("document.querySelectorAll('img').length") == 0


def test_charts_fit_and_texts_have_contrast(tab, replayed):
    for dark in (False, True):
        tab.open(replayed, width=375, dark=dark)
        widths = tab.value("[...document.querySelectorAll('.chart svg')].map(e => e.getBoundingClientRect().width)")
        assert all(250 < width <= 375 for width in widths)
        paper = tab.value("getComputedStyle(document.body).backgroundColor")
        for place in ("body", ".soft", "a", "dt", "summary", ".badge", "figcaption", "caption", ".chart text"):
            what = "fill" if "text" in place else "color"
            ink = tab.value(f"getComputedStyle(document.querySelector('main {place}, {place}')).{what}")
            assert contrast(ink, paper) >= 4.5, (dark, place, ink, paper)
    assert contrast("rgb(255, 255, 255)", "rgb(0, 0, 0)") == 21


def test_a_pointer_gets_a_tooltip(tab, replayed):
    tab.open(replayed, width=1200)
    for section, kind in (("bounds", ".mark-rect path"), ("load", ".mark-rect path"), ("latency", "svg .background")):
        tab.value(f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})")
        box = (
            f"document.getElementById('{section}').parentElement.querySelector('.chart {kind}').getBoundingClientRect()"
        )
        x, y = tab.value(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        tab.point_at(x, y)
        shown = "document.querySelector('#vg-tooltip-element.visible')?.innerText"
        text = tab.value(
            f"new Promise(done => {{ let n = 0; const look = () => {shown} || n++ > 100 ? done({shown}) : "
            "setTimeout(look, 20); look(); })"
        )
        assert text, section
        assert re.search("policy|expert", text)


def test_injected_scripts_do_not_run(tab, replayed, tmp_path):
    page = replayed.read_text(encoding="utf-8")
    bad = "<img src=x onerror='window.ran = 1'><script>window.ran = 1</script>"
    assert page.count("<footer>") == 1
    (tmp_path / "page.html").write_text(page.replace("<footer>", f"{bad}<footer>"), encoding="utf-8")
    tab.open(tmp_path / "page.html")
    assert tab.value("window.ran ?? 'no'") == "no"
    assert sum("Content Security Policy" in error for error in tab.errors) >= 2


def test_tables_open_and_names_are_text(tab, replayed):
    tab.open(replayed, width=375)
    tab.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert tab.value("document.documentElement.scrollWidth") <= 375
    assert HOSTILE in tab.value("document.querySelector('table').innerText")
    labels = tab.value("[...document.querySelectorAll('.chart text')].map(e => e.textContent)")
    assert any(label.startswith(HOSTILE[:8]) for label in labels)


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of two colours as a browser computes them."""

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
