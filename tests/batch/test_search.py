"""Searches: the best of a space is found, and what the search says is what replays say."""

from pathlib import Path

import polars as pl
import pytest

import moetrace as mt
from moetrace.batch import trials as trials_module
from moetrace.batch import work
from moetrace.batch.executors import run_tasks
from moetrace.batch.search_space import Halving
from moetrace.results.record import METRICS, value_in

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "traces" / "tiny-olmoe.h5")


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("t") / "small.h5"
    mt.generate(path, "tiny-olmoe", requests=6, prompt=8, output=24, stick=0.4)
    return str(path)


def space(trace: str, **search) -> dict:
    return {
        "trace": trace,
        "policy": ["on-demand", "edge-ndp", "lfu-balance.toml"],
        "slots": 24,
        "search": {
            "trials": 30,
            "range": {"policy": {"lfu-balance": {"half_life": {"low": 1, "high": 64, "log": True}}}},
            **search,
        },
    }


@pytest.fixture(autouse=True)
def beside(tmp_path, monkeypatch):
    text = 'name = "lfu-balance"\ndispatch = "balance"\nresidency = "lfu"\nhalf_life = 8\n'
    (tmp_path / "lfu-balance.toml").write_text(text)
    monkeypatch.chdir(tmp_path)


def test_values_are_those_of_replays(trace):
    found = mt.search(space(trace))
    assert len(found.trials) == 30
    complete = [trial for trial in [found.reference, *found.trials] if trial.state == "complete"]
    assert 2 <= len(complete) < 31  # some were stopped
    for trial in complete:
        values = trial.cell.point.values
        own = {name: value for name, value in values.items() if name.count(".") > 1}
        alone = mt.replay(trace, policies=values["policy"], slots=24, overrides=own)
        assert trial.value == alone.summary["total_s"][0]
    assert found.best is not None
    assert found.best.value == min(trial.value for trial in complete if trial.value is not None)
    assert found.reference.cell.point.values["policy"] == "on-demand"


def test_a_small_space_is_tried_wholly_and_no_trial_twice(trace):
    asked = {
        "trace": trace,
        "policy": ["monde", "on-demand", "edge-ndp"],
        "slots": [8, 24],
        "search": {"trials": 40, "parts": 1},
    }
    found = mt.search(asked)
    assert len({trial.cell.name for trial in found.trials}) == len(found.trials) == 6
    grid = mt.sweep({name: value for name, value in asked.items() if name != "search"})
    assert found.best is not None
    assert found.best.value == grid.cells["total_s"].min()


def test_parts_grow_and_the_last_is_all(trace):
    halving = Halving(parts=3, keep=3)
    assert [halving.steps(part, 100) for part in range(3)] == [12, 34, 100]
    assert [halving.steps(part, 1) for part in range(3)] == [1, 1, 1]
    found = mt.search(space(trace))
    stopped = [trial for trial in found.trials if trial.state == "stopped"]
    assert {trial.part for trial in stopped} <= {1, 2}
    with mt.Trace.open(trace) as opened:
        for trial in stopped[:4]:
            head = opened.head(halving.steps(trial.part - 1, opened.steps))
            values = trial.cell.point.values
            own = {name: value for name, value in values.items() if name.count(".") > 1}
            assert (
                trial.value == mt.replay(head, policies=values["policy"], slots=24, overrides=own).summary["total_s"][0]
            )


def test_slots_are_chosen_from_a_range_beside_fields_of_a_policy(trace):
    asked = space(trace, trials=12)
    del asked["slots"]  # which would be given twice
    asked["search"]["range"]["slots"] = {"low": 3, "high": 90}
    found = mt.search(asked)
    assert all(3 <= trial.cell.point.values["slots"] <= 90 for trial in found.trials)
    of_lfu = {
        trial.cell.policy.name: "policy.lfu-balance.half_life" in trial.cell.point.values for trial in found.trials
    }
    assert of_lfu["lfu-balance"]
    assert sum(of_lfu.values()) == 1


def test_no_pass_takes_more_trials_than_memory_holds(trace, monkeypatch):
    asked = space(trace, trials=9)
    whole, sizes = mt.search(asked), []

    def counted(tasks, *rest):
        sizes.extend(len(task.cells) for task in tasks)
        run_tasks(tasks, *rest)

    monkeypatch.setattr(trials_module, "run_tasks", counted)
    monkeypatch.setattr(work, "LOGS_BYTES", 1)
    assert mt.search(asked).frame.equals(whole.frame)
    assert {*sizes} == {1}


@pytest.mark.parametrize(("trials", "keep", "reached"), [(9, 3, [9, 3, 1]), (4, 2, [4, 2, 1]), (16, 2, None)])
def test_the_best_of_each_keep_so_far_go_on(trace, trials, keep, reached):
    asked: dict = {"trace": trace, "policy": "on-demand"}
    asked["search"] = {"trials": trials, "keep": keep, "sampler": "random", "range": {"slots": {"low": 0, "high": 190}}}
    found = mt.search(asked)
    if reached:  # of one round
        assert [sum(trial.part >= part for trial in found.trials) for part in (1, 2, 3)] == reached
    with mt.Trace.open(trace) as opened:
        head = opened.head(found.choices.halving.steps(0, opened.steps))
        slots = [trial.cell.point.values["slots"] for trial in found.trials]
        at_first = [mt.replay(head, policies="on-demand", slots=each).summary["total_s"][0] for each in slots]
    for at, trial in enumerate(found.trials):
        so_far = at_first[: (at // keep**2 + 1) * keep**2]  # with its whole round
        assert (trial.part >= 2) == (at_first[at] <= sorted(so_far)[len(so_far) // keep - 1])


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_for_each_number_of_jobs_and_from_a_folder(trace, tmp_path, sampler):
    asked = space(trace, sampler=sampler, seed=5)
    first = mt.search(asked, tmp_path / "a")
    again = mt.search(asked, tmp_path / "a")
    side = mt.search(asked, tmp_path / "b", jobs=2)
    assert first.frame.equals(again.frame)
    assert first.frame.equals(side.frame)
    assert first.computed > 0
    assert (again.computed, again.reused) == (0, first.computed)
    for name in ("search.json", "sweep.json", "cells.parquet", "trials.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    cells = {path.name for path in (tmp_path / "a" / "cells").iterdir()}
    assert cells == {path.name for path in (tmp_path / "b" / "cells").iterdir()}
    assert (
        mt.search(asked | {"search": asked["search"] | {"seed": 6}}).frame["name"].to_list()
        != first.frame["name"].to_list()
    )


def test_more_may_be_better(trace):
    found = mt.search(space(trace, objective="hit_rate"))
    complete = found.frame.filter(pl.col("state") == "complete")
    assert found.best is not None
    assert found.best.value == complete["value"].max()


def test_trials_that_cannot_be_replayed_do_not_stop_the_others(trace):
    asked = space(trace)
    asked["search"]["range"] = {"policy": {"half_life": {"low": 1, "high": 64}}}  # which only lfu has
    found = mt.search(asked)
    failed = [trial for trial in found.trials if trial.state == "failed"]
    assert failed and all("half_life" in str(trial.error) for trial in failed)
    assert {trial.cell.policy.name for trial in found.trials if trial.state != "failed"} == {"lfu-balance"}


BAD = [
    ({"objective": "speed"}, "no metric"),
    ({"objective": "prefetch_bytes"}, "neither"),
    ({"trials": 0}, "trials"),
    ({"keep": 1}, "keep"),
    ({"parts": 9}, "parts"),
    ({"sampler": "magic"}, "tpe"),
    ({"seed": -1}, "seed"),
    ({"budget": 3}, "budget"),
    ({"range": {"policy": {"half_live": {"low": 1, "high": 2}}}}, "half_life"),
    ({"range": {"policy": {"lfu-balance": {"half_life": {"low": 3, "high": 2}}}}}, "nothing between"),
    ({"range": {"policy": {"lfu-balance": {"half_life": {"low": 0, "high": 2, "log": True}}}}}, "more than 0"),
    ({"range": {"policy": {"lfu-balance": {"half_life": {"low": 1}}}}}, "high"),
    ({"range": {"policy": {"lfu-balance": {"half_life": {"low": "a", "high": 2}}}}}, "low"),
    ({"range": {"policy": {"lfu-balance": {"half_life": 4}}}}, "low"),
    ({"range": {"policy": {"nobody": {"half_life": {"low": 1, "high": 2}}}}}, "nobody"),
    ({"range": {"slots": {"low": 1, "high": 2}}}, "slots"),
    ({"range": {"system": {"ndp": {"units": {"low": 1, "high": 2}}}}}, "one model and machine"),
    ({"range": {"model": {"top_k": {"low": 1, "high": 2}}}}, "one model and machine"),
]


@pytest.mark.parametrize(("search", "says"), BAD)
def test_a_wrong_space_is_one_sentence(trace, search, says):
    asked = space(trace)
    asked["search"] = asked["search"] | search
    with pytest.raises(mt.UsageError) as error:
        mt.search(asked)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_the_largest_seed_is_one(trace):
    assert len(mt.search(space(trace, seed=2**32 - 1)).trials) == 30


def test_a_search_has_one_trace_and_something_to_choose(trace):
    with pytest.raises(mt.UsageError, match="trace is a list"):
        mt.search(space(trace) | {"trace": [trace, TINY]})
    with pytest.raises(mt.UsageError, match="nothing to choose"):
        mt.search({"trace": trace, "policy": "monde"})
    with pytest.raises(mt.UsageError, match=r"\[search\] table"):
        mt.sweep(space(trace))


def test_limits_are_hard(trace):
    """The best keeps them, though a trial that does not is faster; where none does, the least miss is the best."""
    asked = space(trace, trials=12, parts=1)
    free = mt.search(asked)
    complete = [trial for trial in free.trials if trial.state == "complete"]
    figures = [free.found[trial.cell.key]["result"]["policies"][0] for trial in complete]
    fastest = free.found[free.best.cell.key]["result"]["policies"][0]
    names = [name for name, figure in METRICS.items() if figure.better == "lower" and value_in(fastest, name)]
    name = next(name for name in names if min(value_in(one, name) for one in figures) < 0.99 * value_in(fastest, name))
    least = min(value_in(one, name) for one in figures)  # which the fastest has not
    limit = f"{name}<={least * 1.001:.12g}"
    held = mt.search(asked, slo=limit)
    assert held.best.miss == 0 and held.best.value > free.best.value and held.to_dict()["slo"] == [limit]
    assert value_in(held.found[held.best.cell.key]["result"]["policies"][0], name) <= least * 1.001
    assert held.frame["slo_miss"].drop_nulls().max() > 0
    none = mt.search(asked | {"slo": "total_s<=1us"})
    misses = [trial.miss for trial in [none.reference, *none.trials] if trial.state == "complete"]
    assert none.best.miss == min(misses) > 0
    with pytest.raises(mt.UsageError, match="An SLO is"):
        mt.search(asked, slo="fast")


def test_energy_is_an_objective_of_a_system_with_watts(trace):
    watts = {
        "set": {"system.energy.gpu": {"idle_w": 20, "active_w": 360}},
        "policy": ["monde", "on-demand", "edge-ndp"],
    }
    objective = {"search": {"objective": "energy_j", "trials": 3, "parts": 1}}
    found = mt.search(space(trace) | watts | objective)
    values = {trial.cell.point.values["policy"]: trial.value for trial in found.trials}
    assert len(values) == 3 and found.best is not None and found.best.value == min(values.values())
    failed = mt.search(space(trace) | {"policy": ["monde", "edge-ndp"]} | objective)
    assert failed.reference.error == "energy_j is undefined: the system needs [energy]."


def test_an_objective_or_a_limit_that_no_trial_has_names_the_missing_option(trace):
    asked = space(trace) | {"policy": ["monde", "edge-ndp"]}
    lacking = "resent_bytes is undefined, as no system has link.loss: set it in the system."
    objective = {"search": {"objective": "resent_bytes", "trials": 1, "parts": 1}}
    assert mt.search(asked | objective).reference.error == lacking
    held = {"search": {"objective": "total_s", "trials": 1, "parts": 1}, "slo": "resent_bytes<=1GB"}
    assert mt.search(asked | held).reference.error == lacking
    with pytest.raises(mt.UsageError) as error:
        mt.sweep({"trace": trace, "policy": "monde", "slots": 48}, slo="resent_bytes<=1GB")
    said = "no cell has resent_bytes, as no system has link.loss: set it in the system, or drop the SLO."
    assert str(error.value) == f"The SLO 'resent_bytes<=1GB': {said}"
