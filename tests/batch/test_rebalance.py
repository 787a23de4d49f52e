"""`advise rebalance`: rows that are replays of their own, the best of all, what fits, defaults and refusals."""

import json
import shlex

import polars as pl
import pytest

import moetrace as mt
from moetrace.batch.rebalance import RebalanceQuestion
from moetrace.cli import main
from moetrace.spec import load_system

# A GPU that computes slowly, so that the busiest one is what a step waits for.
SLOW = """
name = "slow"
[gpu]
name = "G"
tflops = 0.05
bandwidth_gb_s = 2000.0
memory_gb = 80.0
reserve_gb = 1.0
launch_us = 1.0
[cluster]
gpus = 4
[network]
bandwidth_gb_s = 20.0
dispatch_latency_us = 5.0
combine_latency_us = 5.0
"""
FIGURES = ("total_s", "step_s", "prefill_s", "decode_s", "ttft_s", "tpot_s", "itl_s", "cluster", "imbalance_mean")
ASKED = {"redundant": [0, 4, 8], "interval": [0, 20, 5], "overrides": {"policy.window": 4}}


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("s") / "slow.toml"
    path.write_text(SLOW)
    return str(path)


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("t")
    asked = {"requests": 32, "prompt": 0, "output": 120, "batch": 32, "zipf": 1.2, "stick": 0.0}
    for name, drift in (("still", None), ("drifting", 40)):
        mt.generate(folder / f"{name}.h5", "tiny-olmoe", drift=drift, **asked)
    mt.generate(folder / "even.h5", "tiny-olmoe", **asked | {"zipf": 0.0})
    return {name: str(folder / f"{name}.h5") for name in ("still", "drifting", "even")}


@pytest.fixture(scope="module")
def drifting(traces, slow):
    return mt.advise_rebalance(traces["drifting"], system=slow, **ASKED)


@pytest.mark.parametrize("migrate", [None, "async"])
def test_every_row_is_a_replay_of_its_own(traces, slow, drifting, migrate):
    advice = (
        drifting if migrate is None else mt.advise_rebalance(traces["drifting"], system=slow, **ASKED, migrate=migrate)
    )
    assert [(row.redundant, row.interval) for row in advice.rows[1:]] == [
        (redundant, interval) for redundant in (0, 4, 8) for interval in (0, 20, 5)
    ]
    own = {"policy.window": 4} | ({} if migrate is None else {"policy.migrate": migrate})
    for row in advice.rows[1:]:
        changed = own | {"policy.redundant": row.redundant, "policy.interval": row.interval}
        alone = mt.replay(traces["drifting"], system=slow, policies="eplb", overrides=changed).to_dict()["policies"][0]
        assert {name: row.figures[name] for name in FIGURES} == {name: alone[name] for name in FIGURES}
    without = mt.replay(
        traces["drifting"], system=slow, policies="ep-serial", overrides={"policy.placement": "ep-block"}
    )
    assert advice.none.figures["step_s"] == without.to_dict()["policies"][0]["step_s"]
    assert advice.none.figures["cluster"]["plans"] == 0


def test_the_best_is_the_least_of_all_and_its_command_replays_it(traces, slow, drifting, tmp_path):
    totals = [row.total_s for row in drifting.rows]
    assert drifting.best.total_s == min(totals)
    assert drifting.frame.filter("is_best")["total_s"].to_list() == [min(totals)]
    program, *words = shlex.split(drifting.command)
    assert program == "moetrace"
    main([*words, "-o", str(tmp_path / "r")])
    (policy,) = json.loads((tmp_path / "r" / "summary.json").read_text())["policies"]
    assert policy["total_s"] == drifting.best.total_s


def test_the_best_plan_depends_on_the_drift(traces, slow, drifting):
    again, once, none = (
        mt.advise_rebalance(traces[name], system=slow, migrate="async", **ASKED)
        for name in ("drifting", "still", "even")
    )
    assert (again.kind, once.kind, none.kind) == ("plan again", "plan once", "nothing to win")
    assert again.best.interval and once.once is not None
    assert again.verdict.startswith(f"Plan again: {again.best.label} saves ")
    assert once.verdict.startswith(f"Plan once: {once.once.label} saves ")
    assert none.verdict.startswith("Nothing to win: ")
    # Steps that wait for experts take longer.
    assert drifting.best.total_s > again.best.total_s
    assert all(row.figures["cluster"]["pauses"] == 0 for row in again.rows)


def test_frame_compares_with_no_plan_and_with_one(drifting):
    frame = drifting.frame
    assert not any("makes no plan" in note for note in drifting.notes)
    assert frame["speedup"].to_list() == [drifting.none.total_s / row.total_s for row in drifting.rows]
    once = {row.redundant: row.total_s for row in drifting.rows if row.interval == 0}
    expected = [once[row.redundant] / row.total_s if row.interval else None for row in drifting.rows]
    assert frame["over_once"].to_list() == expected
    assert frame["interval"].to_list() == [None, *[0, 20, 5] * 3]
    assert frame["cluster_moved_bytes"].to_list() == [row.figures["cluster"]["moved_bytes"] for row in drifting.rows]


def test_a_row_that_does_not_fit_is_marked_and_never_the_best(traces, slow):
    asked = {"redundant": [0, 8, 16], "interval": [0, 20], "migrate": "async", "overrides": {"policy.window": 4}}
    free = mt.advise_rebalance(traces["still"], system=slow, **asked)
    assert free.best.redundant
    need_gb = free.best.found["costs"]["gpu_memory_bytes"] / 1e9
    asked["overrides"] = asked["overrides"] | {"system.gpu.memory_gb": 1 + 0.999 * need_gb}
    tight = mt.advise_rebalance(traces["still"], system=slow, **asked)
    assert [row.total_s for row in tight.rows] == [row.total_s for row in free.rows]
    assert not tight.frame.filter(pl.col("redundant") >= free.best.redundant)["fits"].any()
    assert tight.best.fits and tight.best.total_s == min(row.total_s for row in tight.rows if row.fits)
    assert tight.best.total_s > free.best.total_s
    by_default = RebalanceQuestion(traces["still"], slow, None, "eplb", None, 0, None, asked["overrides"])
    assert by_default.redundant == [number for number in (0, 4, 8, 16) if number < free.best.redundant]


@pytest.mark.parametrize(
    ("gpus", "window", "redundant", "interval"),
    [(4, 4, [0, 4, 8, 16], [0, 20, 5, 1]), (3, 32, [1, 4, 7, 13], [0, 20, 5, 1]), (5, 118, [3, 8, 13, 23], [0])],
)
def test_defaults_fit_model_gpus_and_steps(traces, slow, gpus, window, redundant, interval):
    changed = {"policy.window": window, "system.cluster.gpus": gpus}
    asked = RebalanceQuestion(traces["still"], slow, None, "eplb", None, None, None, changed)
    assert (asked.trace.num_experts, asked.trace.steps) == (32, 120)
    assert asked.redundant == redundant
    assert asked.interval == interval
    assert asked.rows == 1 + len(redundant) * len(interval)


def test_jobs_and_a_folder_change_nothing(traces, slow, drifting, tmp_path, capsys):
    kept = mt.advise_rebalance(traces["drifting"], system=slow, **ASKED, jobs=2, folder=tmp_path / "out")
    assert kept.to_dict() == drifting.to_dict()
    assert json.loads((tmp_path / "out" / "rebalance.json").read_text()) == json.loads(json.dumps(kept.to_dict()))
    again = mt.replay(traces["drifting"], system=slow, policies=str(tmp_path / "out" / "policy.toml"))
    assert again.to_dict()["policies"][0]["total_s"] == drifting.best.total_s
    files = sorted((tmp_path / "out" / "cells").iterdir())
    assert len(files) == len(drifting.rows)
    before = [file.stat().st_mtime_ns for file in files]
    assert (
        mt.advise_rebalance(traces["drifting"], system=slow, **ASKED, folder=tmp_path / "out").to_dict()
        == kept.to_dict()
    )
    assert [file.stat().st_mtime_ns for file in files] == before
    main(["gate", str(tmp_path / "out"), "--baseline", str(tmp_path / "b.json"), "--update"])
    main(["report", str(tmp_path / "out"), "-o", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_another_schedule_and_ep_lpt(traces, slow):
    piped = mt.advise_rebalance(traces["still"], system=slow, policy="two-batch-overlap", redundant=4, interval=0)
    assert piped.best.cell.policy.schedule == "pipeline:2,1" and piped.best.cell.policy.placement == "eplb"
    packed = mt.advise_rebalance(
        traces["still"], system=slow, interval=[0, 10], overrides={"policy.placement": "ep-lpt", "policy.window": 8}
    )
    assert [row.redundant for row in packed.rows] == [None] * 3
    assert packed.best.label in ("one plan", "a plan every 10 steps")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"system": "edge-ndp"}, "only clusters rebalance"),
        ({"redundant": 3}, "which 4 GPUs cannot share equally; set redundant = 4"),
        ({"redundant": -4}, "redundant has -4, but must be whole numbers from 0"),
        ({"redundant": []}, "redundant is an empty list"),
        ({"interval": [0, 2.5]}, "interval has 2.5, but must be whole numbers from 0"),
        ({"overrides": {"policy.window": 120}}, "use a longer trace, or set policy.window"),
        ({"overrides": {"policy.redundant": 4}}, "give redundant (--redundant)"),
        ({"overrides": {"policy.placement": "ep"}}, "Placement ep makes no plans"),
        ({"overrides": {"policy.placement": "ep-lpt"}, "redundant": 4}, "leave out redundant"),
        ({"overrides": {"system.gpu.memory_gb": 1.01}}, "do not fit"),
        ({"policy": "monde"}, "is one of a single GPU"),
        ({"migrate": "never"}, "migrate"),
        ({"jobs": 0}, "jobs is 0"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(traces, slow, wrong, said):
    with pytest.raises(mt.UsageError) as caught:
        mt.advise_rebalance(traces["still"], **{"system": slow} | wrong)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_trace_in_memory_is_refused(slow):
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=40)
    with pytest.raises(mt.UsageError, match="in memory"):
        mt.advise_rebalance(trace, system=load_system(slow))
