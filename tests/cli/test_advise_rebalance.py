"""`moetrace advise rebalance`: what it prints, on which stream, and with which exit code."""

import json
from types import SimpleNamespace

import polars as pl
import pytest

import moetrace as mt
from moetrace.cli.tables.rebalance_table import print_rebalance

ASK = ("--system", "h100-x8", "--redundant", "8,0", "--interval", "0,10,4", "--set", "policy.window=8", "--jobs", 1)


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("t") / "small.h5"
    mt.generate(path, "tiny-olmoe", requests=8, prompt=0, output=40, zipf=1.0, batch=8, drift=10)
    return str(path)


@pytest.fixture(scope="module")
def advice(trace):
    overrides = {"policy.window": 8}
    return mt.advise_rebalance(trace, system="h100-x8", redundant=[0, 8], interval=[0, 10, 4], overrides=overrides)


def test_the_table_says_what_the_advice_is(run, trace, advice):
    code, out, _ = run("advise", "rebalance", trace, *ASK)
    assert code == 0
    assert " ".join(out.split()).startswith(advice.verdict) and advice.command in out
    (starred,) = [line for line in out.splitlines() if line.startswith("*  ")]
    assert f"{1e3 * advice.best.total_s:,.1f}" in starred
    rows = [line for line in out.split("\n\n")[1].splitlines() if line.strip("─ ")]
    shown = [line.strip("*! ").split()[:2] for line in rows if line.strip("*! ")[:1] in "08-"]
    often = ["once", "10", "4"]
    assert shown == [["-", "no"], *([number, one] for number in "08" for one in often)]
    assert "plans are made from 8 steps, and steps wait for experts to move." in " ".join(out.split())
    assert "! does not fit" not in out


def test_headings_have_the_unit_of_their_values(advice, capsys):
    """Times of a machine ten thousand times as fast, in the units that suit them."""
    seconds = pl.col("total_s", "step_s_p50", "step_s_p99", "cluster_pause_s") / 1e4
    names = ("verdict", "command", "rows", "best", "migrate", "policy", "window")
    fast = SimpleNamespace(frame=advice.frame.with_columns(seconds), **{name: getattr(advice, name) for name in names})
    print_rebalance(fast, "t.h5")
    units = capsys.readouterr().out.split("\n\n")[1].splitlines()[1]
    assert units.split() == ["dant", "every", "µs", "up", "once", "µs", "µs", "max/mean", "GB", "pauses", "µs"]


def test_json_and_csv_have_every_digit(run, trace, advice):
    _, out, _ = run("advise", "rebalance", trace, *ASK, "--format", "json")
    assert json.loads(out) == json.loads(json.dumps(advice.to_dict())) | {"command": advice.command}
    _, out, _ = run("advise", "rebalance", trace, *ASK, "--format", "csv")
    assert out == advice.frame.write_csv()


def test_rows_that_do_not_fit_are_marked(run, trace, advice):
    need_gb = max(row.found["costs"]["gpu_memory_bytes"] for row in advice.rows) / 1e9
    tight = ("--set", f"system.gpu.memory_gb={8 + 0.999 * need_gb}")
    code, out, _ = run("advise", "rebalance", trace, *ASK, *tight)
    lines = out.splitlines()
    assert code == 0 and sum(line.startswith("!  ") for line in lines) == 3
    assert "! does not fit the memory of a GPU, and is priced as if it did." in out
    assert sum(line.startswith("*  ") for line in lines) == 1


@pytest.mark.parametrize("columns", [40, 80])
def test_tables_fit_the_terminal(run, trace, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run("advise", "rebalance", trace, *ASK)
    assert columns < 80 or max(len(line) for line in out.split("Replay the best")[0].splitlines()) <= columns


def test_help_and_a_policy_s_advice_stand_where_they_stood(run):
    _, out, _ = run("advise", "--help")
    assert out.startswith("Usage: moetrace advise [OPTIONS] TRACE.h5") and "--slo" in out
    assert "moetrace advise rebalance TRACE.h5" in out
    _, out, _ = run("advise", "rebalance", "--help")
    assert out.startswith("Usage: moetrace advise rebalance [OPTIONS] TRACE.h5") and "--migrate" in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "Missing argument 'TRACE.h5'. See `moetrace advise rebalance --help`."),
        (("none.h5", "--system", "h100-x8"), 1, "there is no file"),
        (("{trace}", "--system", "edge-ndp"), 2, "only clusters rebalance"),
        (("{trace}", "--system", "h100-x8", "--redundant", "1,x"), 2, "'x' is not a whole number from 0"),
        (("{trace}", "--system", "h100-x8", "--redundant", "-1"), 2, "'-1' is not a whole number from 0"),
        (("{trace}", "--system", "h100-x8", "--redundant", "3"), 2, "set redundant = 8"),
        (("{trace}", "--system", "h100-x8", "--set", "policy.window=40"), 2, "has 40 steps"),
        (("{trace}", "--system", "h100-x8", "--interval", "0", "-o", "{trace}"), 2, "is a file"),
    ],
)
def test_errors_are_one_sentence(run, trace, arguments, code, said):
    found, out, err = run("advise", "rebalance", *(argument.format(trace=trace) for argument in arguments))
    assert (found, out) == (code, "") and said in err
    assert err.startswith("moetrace: ") and err.count("\n") == 1 and "Traceback" not in err


def test_generate_drifts(run, tmp_path):
    asked = ("--model", "tiny-olmoe", "--requests", 2, "--prompt", 0, "--output", 4)
    assert run("generate", tmp_path / "a.h5", *asked, "--drift", 2)[0] == 0
    with mt.Trace.open(tmp_path / "a.h5") as made:
        assert made.source["parameters"]["drift"] == 2
    code, _, err = run("generate", tmp_path / "b.h5", *asked, "--drift", 0)
    assert (
        code == 2
        and err.startswith("moetrace: drift is 0: give a whole number of steps from 1")
        and not (tmp_path / "b.h5").exists()
    )
