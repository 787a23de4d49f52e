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
