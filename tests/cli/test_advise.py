"""`moetrace advise`: what it prints, on which stream, and with which exit code."""

import json

import numpy as np
import polars as pl
import pytest

import moetrace as mt

ASK = ("--system", "rtx4090-offload", "--slots", 60, "--jobs", 1)


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("t") / "small.h5"
    mt.generate(path, "tiny-olmoe", requests=3, prompt=8, output=24, zipf=1.0, batch=2)
    return str(path)


@pytest.fixture(scope="module")
def advice(trace):
    return mt.advise(trace, system="rtx4090-offload", slots=60)


def test_the_table_says_what_the_advice_is(run, trace, advice):
    code, out, err = run("advise", trace, *ASK)
    assert (code, err.count("moetrace: note: ")) == (0, len(advice.notes))
    words = " ".join(out.split())
    assert words.startswith(advice.verdict) and advice.command in out
    starred = [line for line in out.splitlines() if line.startswith("*  ")]
    assert f"{1e3 * advice.best.total_s:,.1f}" in starred[0] and advice.best.candidate.label in starred[0]
    for size in advice.sizes:
        assert f"{size.best.slots:,} " in out and f"{100 * size.wins:+.1f}" in out
    bound_s = advice.best.figures["lower_bound_s"]
    over = f"{100 * (advice.best.total_s / bound_s - 1):.1f} % over the {1e3 * bound_s:,.1f} ms that are the least"
    assert over in words
    assert "o knows the future" in words and any(line.startswith("o  ") for line in out.splitlines())
    assert f"{advice.tried} policies were tried, over the whole trace." in out


@pytest.mark.parametrize("columns", [40, 80])
def test_tables_fit_the_terminal(run, trace, monkeypatch, columns):
    _, wide, _ = run("advise", trace, *ASK)
    monkeypatch.setenv("COLUMNS", str(columns))
    _, narrow, _ = run("advise", trace, *ASK)
    assert columns < 80 or max(len(line) for line in narrow.split("Replay the best")[0].splitlines()) <= columns
    for figure in wide.split(trace)[0].split():
        assert figure.startswith("─") or figure in narrow


def test_json_and_csv_have_every_digit(run, trace, advice):
    _, out, _ = run("advise", trace, *ASK, "--format", "json")
    assert json.loads(out) == json.loads(json.dumps(advice.to_dict())) | {"command": advice.command}
    _, out, _ = run("advise", trace, *ASK, "--format", "csv")
    assert out == advice.frame.write_csv()
    assert {"best", "real", "default", "oracle", "size"} == set(pl.read_csv(out.encode())["role"])


def test_a_limit_that_none_keeps_exits_with_3(run, trace, advice):
    assert run("advise", trace, *ASK, "--slo", "tpot_s.p99<=1s")[0] == 0
    code, out, _ = run("advise", trace, *ASK, "--slo", "ttft_s.p50<=1us", "--slo", "tokens_per_s>=1")
    assert code == 3 and "No policy keeps the limits: the first misses them least." in out
    assert "no policy keeps ttft_s.p50<=1us and tokens_per_s>=1: the best misses them by " in " ".join(out.split())


def test_a_price_is_shown_for_a_million_tokens(run, trace):
    priced = ("--set", "system.price.usd_hour=3")
    code, out, _ = run("advise", trace, *ASK, *priced, "--budget-usd-hour", 4)
    assert code == 0 and "At 3 USD an hour, a million output tokens cost " in out
    code, out, err = run("advise", trace, *ASK, *priced, "--budget-usd-hour", 2)
    assert (code, out) == (2, "") and "costs 3 USD an hour, and the budget is 2" in err


def test_a_folder_is_one_that_gate_and_report_take(run, trace, tmp_path, advice):
    code, _, _ = run("advise", trace, *ASK, "-o", tmp_path / "out")
    assert code == 0 and json.loads((tmp_path / "out" / "advice.json").read_text())["tried"] == advice.tried
    assert run("report", tmp_path / "out", "-o", tmp_path / "page.html")[0] == 0
    assert run("gate", tmp_path / "out", "--baseline", tmp_path / "b.json", "--update")[0] == 0
    policy = tmp_path / "out" / "policy.toml"
    assert mt.load_policy(policy) == advice.best.candidate.policy


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "--system"),
        (["--system", "nothing"], 2, "No system preset is called 'nothing'"),
        (["--system", "jetson-orin", "--slo", "fast"], 2, "An SLO is METRIC<=LIMIT"),
        (["--system", "jetson-orin", "--budget-usd-hour", "-1"], 2, "The budget is -1"),
        (["--system", "jetson-orin", "--budget-usd-hour", "much"], 2, "--budget-usd-hour"),
        (["--system", "jetson-orin", "--jobs", "0"], 2, "--jobs"),
        (["--system", "jetson-orin", "--slots", "8"], 2, "has no link"),
        (["--system", "edge-ndp", "--set", "policy.dispatch=gpu"], 2, "--set wants model.FIELD=VALUE"),
        (["--system", "edge-ndp", "--set", "system.ndp.unit=2"], 2, "ndp.unit is unknown"),
        (["--system", "jetson-orin", "-o", ""], 2, "an empty path names no folder"),
    ],
)
def test_wrong_usage_is_one_sentence(run, trace, arguments, code, words):
    found, out, err = run("advise", trace, *arguments)
    assert (found, out, err.count("\n")) == (code, "", 1) and words in err


def test_a_file_that_is_no_trace_is_one_sentence(run, tmp_path):
    code, _, err = run("advise", tmp_path / "none.h5", "--system", "edge-ndp")
    assert code == 1 and "there is no file" in err and err.count("\n") == 1


def test_a_trace_that_cannot_be_replayed_says_why(run, tmp_path):
    facts = {"model": "tiny-olmoe", "num_experts": 32, "top_k": 4, "layers": 6, "rows": 2, "steps": 1, "source": {}}
    nobody = np.full(2, -1)
    with mt.Writer(tmp_path / "a.h5", **facts) as writer:
        ids = np.broadcast_to(np.arange(4, dtype=np.uint8), (2, 6, 4))
        writer.append(ids, nobody, np.arange(2), np.array([2]), np.array([0], np.uint8))
    code, out, err = run("advise", tmp_path / "a.h5", "--system", "jetson-orin", "--jobs", 1)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "a.h5: /rows/request of row 0 is -1, but must be 0 or more." in err


@pytest.fixture(scope="module")
def lossy(trace) -> tuple:
    return ("advise", trace, "--system", "rtx4090-ddr5", "--slots", 60, "--jobs", 1, "--set", "system.link.loss=0.02")


def test_drops_of_a_relaxed_link_are_shown_and_can_be_limited(run, lossy, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    relaxed = (*lossy, "--set", "system.link.loss_mode=relaxed")
    code, out, _ = run(*relaxed)
    words = " ".join(out.split())
    (best,) = [line for line in out.splitlines() if line.startswith("*~")][:1]
    assert code == 0 and "lost %" in words and "may look better" in words and best
    _, told, _ = run(*relaxed, "--format", "json")
    told = json.loads(told)
    dropped = told["best"]["gate_mass_dropped"]
    assert dropped > 0 and f"drops {100 * dropped:.1f} % of the gate mass" in words.partition("total")[0]
    assert told["verdict"]["sentence"] in words
    assert "The best that drops none is " in words and " times as long." in words
    _, kept, _ = run(*relaxed, "--slo", "gate_mass_dropped<=0%", "--format", "json")
    assert json.loads(kept)["best"]["gate_mass_dropped"] == 0
    assert json.loads(kept)["best"]["total_s"] >= told["best"]["total_s"]
    assert max(len(line) for line in out.split("Replay the best")[0].splitlines()) <= 80


def test_a_reliable_link_drops_nothing_and_says_nothing_of_it(run, lossy):
    _, out, _ = run(*lossy)
    assert "~" not in out.split("Replay the best")[0] and "gate" not in out
