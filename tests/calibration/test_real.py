"""bench/real.py, which writes docs/real.md: its fit, and that no figure helps to fit what judges it."""

import re

import pytest
import real
import real_figures

import moetrace as mt


def line(number: int, slope: float, published: float) -> real_figures.Figure:
    return real_figures.Figure(
        number, "", (published,), "s", lambda constants: (slope * constants["a"] + constants.get("b", 0),), ""
    )


def test_the_fit_finds_what_made_the_figures():
    figures = [line(i, slope, slope * 0.37 + 2.5) for i, slope in enumerate((1.0, 4.0, 40.0))]
    found = real_figures.fitted(figures, {}, {"a": (0.01, 10.0), "b": (0.1, 100.0)})
    assert found == pytest.approx({"a": 0.37, "b": 2.5}, rel=0.02)


def test_a_figure_does_not_judge_itself():
    figures = tuple(line(i, 1.0, published) for i, published in enumerate((1.0, 1.0, 5.0)))
    engine = real_figures.Engine("", figures, "", {}, {"a": (0.1, 10.0)})
    assert engine.constants(figures[2])["a"] == pytest.approx(1.0, rel=0.02)
    beside = line(9, 1.0, 1.0)
    alone = real_figures.Engine("", figures[2:], "", {}, {"a": (0.1, 10.0)}, (beside,))
    assert alone.constants(figures[2])["a"] == pytest.approx(1.0, rel=0.02)


def test_the_error_that_counts_is_the_largest():
    assert real.off((2.0, 3.0), (2.0, 6.0)) == -0.5 and real.off((2.5,), (2.0,)) == 0.25


def test_every_machine_loads_and_each_figure_has_one_row_in_the_page():
    assert all(mt.load_system(path).name == path.stem for path in real_figures.MACHINES.glob("*.toml"))
    numbers = sorted(figure.number for engine in real_figures.engines() for figure in engine.figures)
    assert numbers == list(range(1, 17))
    page = real.PAGE.read_text(encoding="utf-8")
    assert [int(number) for number in re.findall(r"^\| (\d+)\. ", page, re.MULTILINE)] == numbers


def test_the_page_says_figures_errors_and_constants():
    table = real_figures.Figure(2, "", (4.0,), "s", lambda _: (5.2,), "Far.")
    known = real_figures.Engine("known", (table,), "a table")
    fit = real_figures.Engine(
        "fit",
        (real_figures.Figure(1, "", (4.0,), "s", lambda given: (given.get("a", 8.0) * 0.02,), ""),),
        "the other",
        free={"a": (1.0, 999.0)},
        beside=(line(0, 1.0, 200.0),),
    )
    page = real.page([known, fit])
    rows = [text.split(" | ") for text in page.splitlines() if text.startswith(("| 1. ", "| 2. "))]
    assert [(row[0][2], row[4], row[6].rstrip(" |")) for row in rows] == [("1", "-96%", "+0%"), ("2", "+30%", "+30%")]
    assert "- 2 (+30%): Far." in page and "`a` = 20" in page
    assert "With data-sheet constants 0 of 2 are within 25%, and 1 within 50%." in page
    assert "With calibrated constants 1 of 2 are within 25%, and 2 within 50%." in page


def test_a_constant_that_no_other_figure_tells_is_refused():
    with pytest.raises(ValueError, match=r"^no other figure tells a\.$"):
        real_figures.fitted([], {}, {"a": (1.0, 2.0)})
