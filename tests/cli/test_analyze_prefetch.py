"""`moetrace analyze prefetch`: what it prints, and what it says when something is wrong."""

import csv
import io
import json
from functools import partial
from pathlib import Path

import pytest

from moetrace.analyze.prefetch.value import DEFAULT_PREDICTORS, PREDICTORS, prefetch_value
from moetrace.cli.commands import analyze_prefetch
from moetrace.trace import Trace

TINY = str(Path(__file__).parents[2] / "traces" / "tiny-olmoe.h5")


@pytest.fixture
def run(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return partial(run, "analyze", "prefetch")


def test_table(run):
    code, out, err = run(TINY, "--predictor", "last-token", "--predictor", "oracle")
    assert (code, err) == (0, "")
    assert sum(line.startswith(("last-token ", "oracle ")) for line in out.splitlines()) == 2 * 3
    assert "192 experts; an LRU cache of 48." in out and "in time" not in out
    assert "in time" in run(TINY, "--predictor", "oracle", "--system", "rtx4090-offload")[1]


def test_json_and_csv_are_the_frame(run):
    arguments = (TINY, "--capacity", "40", "--predictor", "ewma", "--most", "3", "--scope", "layer")
    with Trace.open(TINY) as trace:
        frame = prefetch_value(trace, 40, ["ewma"], most=3, scope="layer")
    assert json.loads(run(*arguments, "--format", "json")[1]) == frame.to_dicts()
    rows = list(csv.DictReader(io.StringIO(run(*arguments, "--format", "csv", "--phase", "decode")[1])))
    assert [row["phase"] for row in rows] == ["decode"] and list(rows[0]) == frame.columns


def test_errors_are_one_sentence(run, tmp_path):
    for arguments, code, sentence in (
        ((TINY, "--capacity", "3 apples"), 2, "neither a number of experts"),
        ((TINY, "--predictor", "magic"), 2, "but is 'magic'"),
        ((TINY, "--predictor", "recorded"), 1, "has no /recorded/resident"),
        ((TINY, "--system", "jetson-orin"), 2, "has no link"),
        ((tmp_path / "b.h5",), 1, "b.h5"),
        ((TINY, "--phase", "mixed"), 1, "tiny-olmoe.h5 has no mixed steps"),
    ):
        found, out, err = run(*arguments)
        assert (found, out) == (code, "") and sentence in err and err.count("\n") == 1


def test_options_without_effect_are_refused(run):
    for arguments, sentence in (
        (("--recall", 0.5), "--recall is for --predictor oracle"),
        (("--seed", 0), "--seed is for --predictor oracle"),
        (("--ahead", 2), "--ahead is for --predictor transition, or for --system"),
    ):
        code, out, err = run(TINY, "--predictor", "ewma", *arguments)
        assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1
    code, out, err = run(TINY, "--predictor", "oracle", "--most", 3)
    assert (code, out) == (2, "") and "--most is for predictors other than oracle" in err and err.count("\n") == 1


def test_layers_ahead_matter_to_transitions_and_to_time_only():
    with Trace.open(TINY) as trace:
        names = ["last-token", "frequency", "ewma", "oracle"]
        one, two = (prefetch_value(trace, 48, names, ahead=ahead) for ahead in (1, 2))
        assert one.equals(two)
        one, two = (prefetch_value(trace, 48, ["transition"], ahead=ahead) for ahead in (1, 2))
        assert not one.equals(two)


def test_help_names_what_there_is():
    assert list(PREDICTORS) == list(analyze_prefetch.PREDICTORS)
    assert analyze_prefetch.DEFAULT_PREDICTORS == DEFAULT_PREDICTORS
