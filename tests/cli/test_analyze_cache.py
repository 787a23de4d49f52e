"""`moetrace analyze cache`: what it prints, and what it says when something is wrong."""

import csv
import io
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.one_run import run as replay

from moetrace.analyze.cache.hit_curve import lru_curve
from moetrace.analyze.cache.hits import DEFAULT_POLICIES, SCOPES, cache_hits
from moetrace.cli.commands import analyze_cache
from moetrace.spec import PolicySpec, load_model, load_static, load_system
from moetrace.trace import Trace
from moetrace.trace.writer import CountsWriter

TINY = str(Path(__file__).parents[2] / "traces" / "tiny-olmoe.h5")
MIXTRAL = str(Path(__file__).parents[2] / "traces" / "mixtral-8x7b-b16.h5")


@pytest.fixture
def run(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return partial(run, "analyze", "cache")


def test_table_fits_80_columns(run):
    code, out, err = run(TINY, "--capacity", "48", "--capacity", "100MB")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith(("48 ", "100MB ")) for line in lines) == 2 * 3 * 3
    assert "192 experts; one cache for all layers; a" in " ".join(out.split())
    assert "rec." not in out, "nothing was recorded"


def test_a_measured_rate_is_explained(run):
    code, out, err = run(TINY, "--observed", "62%", "--policy", "lru", "--policy", "belady")
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    shown = " ".join(out.split())
    assert "belady 24 4 288 12.5 62.4 +0.40" in shown and "lru 42 7 504 21.88 61.52 -0.48" in shown
    assert "Observed: 62.00 % of the accesses in decode steps hit. belady with 24 is nearest: 62.40 %." in shown
    rows = json.loads(run(TINY, "--observed", "0.62", "--policy", "lru", "--capacity", 40, "--format", "json")[1])
    assert [(row["policy"], row["capacity"], row["phase"]) for row in rows] == [("lru", "40", "decode")]
    out = run(TINY, "--observed", "0.62", "--policy", "lru", "--phase", "prefill", "--format", "csv")[1]
    assert [row["phase"] for row in csv.DictReader(io.StringIO(out))] == ["prefill"]


def test_names_of_policies_stay_whole(run):
    policies = ("--policy", "static-hindsight", "--policy", "belady", "--system", "rtx4090-offload")
    out = run(TINY, "--capacity", "3000000MiB", *policies)[1]
    assert out.count("3000000MiB  static-hindsight  ") == 2 * 3, "in two parts"


def test_the_exported_set_is_one_that_a_replay_holds(run, tmp_path):
    """From its start on: so it hits as often as static-hindsight, and where that still fetches each expert once."""
    for scope in ("global", "layer"):  # a set that is there from the start is never cold
        arguments = (TINY, "--capacity", 60, "--policy", "static-hindsight", "--scope", scope, "--format", "json")
        code, out, err = run(*arguments, "--export", tmp_path / "hot.csv")
        assert (code, err) == (0, "")
        hits = next(row["hits"] for row in json.loads(out) if row["phase"] == "all")
        assert load_static(tmp_path / "hot.csv", 6, 32).shape == (60, 2)
        held = PolicySpec(name="held", residency="static", static=str(tmp_path / "hot.csv"), scope=scope)
        filled = PolicySpec(name="filled", residency="static-hindsight", scope=scope)
        with Trace.open(TINY) as trace:
            outcome = replay(trace, load_model("tiny-olmoe"), load_system("rtx4090-offload"), [held, filled], slots=60)
        assert [int(lane.log.step["hits"].sum()) for lane in outcome.lanes] == [hits + 60, hits]


def test_impossible_exports_are_refused(run, tmp_path):
    hindsight, export = ("--policy", "static-hindsight"), ("--export", tmp_path / "a.csv")
    for arguments, sentence in (
        (("--capacity", 4, *export), "ask for that --policy, and for one --capacity"),
        ((*hindsight, *export), "ask for that --policy, and for one --capacity"),
        (("--curve", *export), "ask for that --policy, and for one --capacity"),
        (("--capacity", 4, *hindsight, "--export", tmp_path / "a.json"), "must end with .csv"),
    ):
        code, out, err = run(TINY, *arguments)
        assert (code, out) == (2, "") and sentence in " ".join(err.split())


def test_json_and_csv_are_the_frame(run):
    arguments = (TINY, "--capacity", "24", "--policy", "lru", "--policy", "belady", "--scope", "layer", "--sequential")
    with Trace.open(TINY) as trace:
        frame = cache_hits(trace, [24], ["lru", "belady"], scope="layer", sequential=True)
    assert json.loads(run(*arguments, "--format", "json")[1]) == frame.to_dicts()
    rows = list(csv.DictReader(io.StringIO(run(*arguments, "--format", "csv", "--phase", "decode")[1])))
    assert [row["phase"] for row in rows] == ["decode"] * 2 and list(rows[0]) == frame.columns
    assert [int(row["hits"]) for row in rows] == frame.filter(phase="decode")["hits"].to_list()


def test_a_capacity_that_leaves_a_layer_nothing_is_noted(run):
    arguments = (TINY, "--capacity", "1", "--capacity", "6", "--policy", "lru", "--phase", "all", "--format", "json")
    code, out, err = run(*arguments, "--scope", "layer")
    assert code == 0 and [row["hits"] > 0 for row in json.loads(out)] == [False, True]
    first, second = err.splitlines()
    assert first == "moetrace: note: capacity 1 leaves each of the 6 layers a cache of 0 experts."
    assert second.endswith("6 leaves each of the 6 layers a cache of 1 expert, but a row chooses 4 in a layer.")
    assert run(*arguments)[2].splitlines() == [
        "moetrace: note: capacity 1 is a cache of 1 expert, but a row chooses 4 in a layer."
    ]


@pytest.mark.parametrize(
    ("capacity", "note"),
    [
        ("3MB", "capacity 3MB is a cache of 0 experts, since one has 352,321,536 bytes."),
        ("700MB", "capacity 700MB is a cache of 1 expert, but a row chooses 2 in a layer."),
        ("705MB", ""),
        ("1", "capacity 1 is a cache of 1 expert, but a row chooses 2 in a layer."),
        ("2", ""),
    ],
)
def test_a_capacity_below_an_expert_or_a_layers_need_is_noted(run, capacity, note):
    arguments = (MIXTRAL, "--capacity", capacity, "--policy", "lru", "--phase", "decode", "--format", "json")
    assert run(*arguments)[2].removeprefix("moetrace: note: ").strip() == note
    if capacity == "1":
        assert run(*arguments, "--sequential")[2] == "", "one expert at a time fits"


def test_without_a_capacity_it_is_an_eighth_a_quarter_and_a_half(run):
    rows = json.loads(run(TINY, "--policy", "lru", "--policy", "lru", "--phase", "all", "--format", "json")[1])
    assert [row["capacity_experts"] for row in rows] == [24, 48, 96]


def test_agreement_with_recorded_residency(run, tmp_path):
    experts = np.array([0, 1, 0, 2, 0]).reshape(-1, 1, 1)
    recorded = np.array([0, 0, 1, 0, 2]).reshape(-1, 1, 1)
    Trace.from_arrays(experts, num_experts=3, recorded=recorded).write(tmp_path / "a.h5")
    rows = json.loads(run(tmp_path / "a.h5", "--capacity", 2, "--policy", "lru", "--format", "json")[1])
    assert [row["recorded_agreement"] for row in rows] == [1, 1]
    assert "rec." in run(tmp_path / "a.h5", "--capacity", 2)[1]
    assert "missed" not in run(tmp_path / "a.h5", "--capacity", 2)[1], "sizes are unknown"


def test_errors_are_one_sentence(run, tmp_path):
    Trace.from_arrays(np.zeros((1, 1, 1), int), num_experts=3, model="some").write(tmp_path / "a.h5")
    for arguments, code, sentence in (
        ((tmp_path / "a.h5", "--capacity", "3GB"), 2, "3GB needs the sizes of experts"),
        ((TINY, "--capacity", "0"), 2, "the capacity '0' is 0 experts: give at least 1."),
        ((tmp_path / "a.h5", "--capacity", "3 apples"), 2, "the capacity '3 apples' is neither a number of experts"),
        ((tmp_path / "a.h5", "--policy", "mru"), 2, "but is 'mru'"),
        ((TINY, "--model", "mixtral-8x7b"), 2, "name the right one with --model"),
        ((tmp_path / "b.h5",), 1, "b.h5"),
        ((TINY, "--phase", "mixed"), 1, "tiny-olmoe.h5 has no mixed steps"),
        ((TINY, "--observed", "62"), 2, "give a share, as 62% or 0.62, or recorded"),
        ((TINY, "--observed", "recorded"), 1, "tiny-olmoe.h5 holds no record of residency"),
    ):
        found, out, err = run(*arguments)
        assert (found, out) == (code, "") and sentence in err and err.count("\n") == 1


def test_a_trace_of_counts_is_refused(run, tmp_path):
    with CountsWriter(
        tmp_path / "a.h5", model="", num_experts=3, top_k=1, layers=1, rows=4, steps=1, source={}
    ) as writer:
        writer.append_counts(np.array([[[1, 2, 1]]]), np.array([4]), np.array([1], np.uint8))
    code, out, err = run(tmp_path / "a.h5", "--capacity", 2)
    assert (code, out) == (1, "") and "holds only counts of ids (/counts)" in err


def test_a_picture_does_not_replace_a_spec(run, tmp_path):
    spec = tmp_path / "a.html"
    spec.write_text("name = 'some'\n")
    for option in ("--system", "--model"):
        code, out, err = run(TINY, option, spec, "--plot", spec)
        assert (code, out) == (2, "") and "a.html is also an input" in err
    assert spec.read_text() == "name = 'some'\n"


def test_help_names_what_there_is():
    options = {option.name: option for option in analyze_cache.command.params}
    assert tuple(options["policies"].default) == DEFAULT_POLICIES and tuple(options["scope"].type.choices) == SCOPES


def test_regret_in_time_on_a_system(run):
    arguments = (TINY, "--capacity", "48", "--policy", "lru", "--policy", "belady", "--system", "rtx4090-offload")
    _, out, _ = run(*arguments, "--phase", "decode")
    assert "ms/step" in out and "48, decode steps: policy failure. lru, the best here, misses 33.0 %" in " ".join(
        out.split()
    )
    rows = json.loads(run(*arguments, "--phase", "decode", "--format", "json")[1])
    assert rows[0]["regret_ms_per_step"] > 1 and rows[1]["regret_ms_per_step"] == 0
    assert "verdict" in rows[0] and rows[0]["hit_rate_low"] < rows[0]["hit_rate"] < rows[0]["hit_rate_high"]
    other = json.loads(run(*arguments, "--phase", "decode", "--format", "json", "--seed", "1")[1])
    assert other[0]["hit_rate_low"] != rows[0]["hit_rate_low"] and other[0]["hits"] == rows[0]["hits"]


def test_options_without_effect_are_refused(run):
    for arguments, sentence in (
        (("--curve", "--capacity", 24), "--capacity has no effect with --curve"),
        (("--curve", "--policy", "lru"), "--policy has no effect with --curve"),
        (("--curve", "--model", "tiny-olmoe"), "--model has no effect with --curve"),
        (("--curve", "--system", "rtx4090-offload"), "--system has no effect with --curve"),
        (("--curve", "--seed", 0), "--seed has no effect with --curve"),
        (("--observed", "1%", "--seed", 0), "--seed has no effect with --observed"),
        (("--observed", "1%", "--curve"), "--curve has no effect with --observed"),
        (("--curve", "--threads", 2), "--threads is for LRU's curve of --scope layer"),
        (("--plot", "a.png", "--threads", 2), "--threads is for LRU's curve of --scope layer"),
        (("--plot", "a.png", "--scope", "layer", "--policy", "fifo", "--threads", 2), "--threads"),
        (("--plot", "a.png", "--scope", "layer", "--capacity", "3MB", "--threads", 2), "this picture does not have"),
        (("--scope", "layer", "--threads", 2), "--threads is for LRU's curve of --scope layer"),
    ):
        code, out, err = run(TINY, *arguments)
        assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1


def test_curve(run):
    with Trace.open(TINY) as trace:
        frame = lru_curve(trace, scope="layer", sequential=True)
    arguments = (TINY, "--curve", "--scope", "layer", "--sequential", "--threads", "2")
    assert json.loads(run(*arguments, "--format", "json")[1]) == frame.to_dicts()
    code, out, _ = run(*arguments)
    # Not the title, which breaks where the trace's name makes it.
    assert code == 0 and len(re.findall(r"^ *\d+ +\d", out, re.MULTILINE)) == 32
    assert "are left out" in run(TINY, "--curve")[1] and "Every 2th" not in out
    decode = list(csv.DictReader(io.StringIO(run(*arguments, "--format", "csv", "--phase", "decode")[1])))
    assert [int(row["capacity_experts"]) for row in decode] == list(range(6, 193, 6))


def test_a_picture_without_the_curve_where_it_is_undefined(run, tmp_path):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    Trace.from_arrays(np.arange(40).reshape(-1, 1, 1), num_experts=65535).write(tmp_path / "a.h5")
    code, out, err = run(tmp_path / "a.h5", "--capacity", 9, "--policy", "lru", "--plot", tmp_path / "a.png")
    assert code == 0 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and "lru" in out
    assert (
        err.startswith("moetrace: note: 1 x 65535 experts are too many for LRU's whole curve") and err.count("\n") == 1
    )


def test_the_curve_of_a_picture_takes_threads(run, tmp_path, monkeypatch):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    asked = []

    def curve(trace, **how):
        asked.append(how["threads"])
        return lru_curve(trace, **how)

    monkeypatch.setattr("moetrace.analyze.cache.hit_curve.lru_curve", curve)
    more = ("--scope", "layer", "--capacity", 48, "--policy", "lru", "--plot", tmp_path / "a.png")
    assert run(TINY, "--threads", 2, *more)[0] == 0 and asked == [2]
    assert run(TINY, *more[:2], "--capacity", "100MB", *more[4:])[0] == 0 and asked == [2], "not drawn over bytes"


def test_plot(run, tmp_path):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    code, out, err = run(TINY, "--policy", "lru", "--policy", "belady", "--plot", tmp_path / "a.png")
    assert (code, err) == (0, "") and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert out == run(TINY, "--policy", "lru", "--policy", "belady")[1]  # what is drawn beside it is not printed
    assert run(TINY, "--capacity", "48", "--plot", tmp_path / "a.html")[0] == 0
    assert str(tmp_path) not in (tmp_path / "a.html").read_text()
    for arguments, sentence in (
        (("--plot", tmp_path / "a.gif"), "must end with .png or .html"),
        (("--plot", TINY.replace(".h5", ".png"), "--curve"), "leave out --curve"),
        (("--plot", tmp_path / "b.png", "--capacity", "3", "--capacity", "3MB"), "capacities of one kind"),
    ):
        code, out, err = run(TINY, *arguments)
        assert (code, out) == (2, "") and sentence in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.png"]


def test_cold_starts_and_budgets(run, tmp_path):
    """What the options say reaches the caches, the title, and the refusals."""
    budget = tmp_path / "budget.csv"
    budget.write_text("4\n4\n4\n12\n12\n12\n")
    asked = (TINY, "--capacity", "48", "--policy", "lru", "--phase", "all")
    hits = {}
    for name, more, title in (
        ("warm", (), "one cache for all layers;"),
        ("cold", ("--scope", "request"), "one cache for all layers, empty when no request is under way;"),
        ("equal", ("--scope", "layer"), "one cache a layer, of an equal part of the capacity;"),
        ("file", ("--scope", "layer", "--budget", str(budget)), "one cache a layer, of its own part of the capacity;"),
        ("auto", ("--scope", "layer", "--budget", "auto"), "one cache a layer, of its own part of the capacity;"),
    ):
        code, out, _ = run(*asked, *more)
        assert code == 0 and title in " ".join(out.split())
        _, out, _ = run(*asked, *more, "--format", "json")
        hits[name] = json.loads(out)[0]["hits"]
    assert hits["cold"] <= hits["warm"] and len({hits["equal"], hits["file"]}) == 2
    for more, message in (
        (("--budget", "auto"), "is for caches of their own for each layer: use --scope layer"),
        (("--scope", "request", "--curve"), "--curve is of caches that are never emptied"),
        (("--scope", "layer", "--budget", str(tmp_path / "none.csv")), "none.csv"),
    ):
        code, _, err = run(TINY, *more)
        assert code == 2 or (code == 1 and "none.csv" in message), err
        assert message in " ".join(err.split())
