"""`advise`: the best real policy of an exhaustive sweep, with limits, budgets and bounds."""

import itertools
import json
import shlex

import msgspec
import polars as pl
import pytest

import moetrace as mt
from moetrace.batch.advise import Question
from moetrace.batch.candidates import candidates, knows_future
from moetrace.batch.executors import local_farm
from moetrace.batch.stages import STAGE_WORK
from moetrace.cli import main
from moetrace.results.record import METRICS
from moetrace.spec import check_policy, default_policies, load_policy, load_system
from moetrace.spec.choices import choices_of
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.policy import PolicySpec

# NDP units, a CPU that is home to experts, and a link only, with fewer slots than experts; then room for all.
MACHINES = [
    ("edge-ndp", {"system.ndp.units": 2, "system.ndp.capacity_gb": 64}, 40),
    ("rtx3060-ddr4", {}, 40),
    ("rtx4090-offload", {}, 60),
    ("rtx4090-offload", {}, None),
]


@pytest.fixture
def run(capsys):
    def run(*words) -> tuple[int, str, str]:
        code = 0
        try:
            main([*words])
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("t") / "small.h5"
    mt.generate(path, "tiny-olmoe", requests=3, prompt=8, output=24, zipf=1.0, batch=2)
    return str(path)


def ask(trace, system, slots=None, work=STAGE_WORK, **more):
    facts = {"model": None, "slo": (), "overrides": {}, "budget_usd_hour": None} | more
    return Question(trace, system, slots=slots, **facts).answer(local_farm(1), None, work=work)


def by_the_records(system) -> list[PolicySpec]:
    """Every policy without a file or an oracle that a machine runs, by asking each combination: a slow oracle."""
    names = {}
    for kind in ("placement", "dispatch", "residency", "prefetch"):
        records = [record for record in choices_of(kind).values() if not getattr(record, "weighs", False)]
        names[kind] = [record.name if record.bare else f"{record.name}:2" for record in records]
    placements = names.pop("placement")
    placements = placements if system.ndp else ["ep"]
    policies = []
    for placement, dispatch, residency, prefetch in itertools.product(placements, *names.values()):
        for scope in ("global", "layer"):
            chosen = {"placement": placement, "dispatch": dispatch, "residency": residency, "prefetch": prefetch}
            try:
                policy = load_policy(PolicySpec(name="each", scope=scope, **chosen))
                check_policy(policy, system)
            except MoetraceError:
                continue
            if not knows_future(policy):
                policies.append(policy)
    return policies


@pytest.mark.parametrize(("system", "changes", "slots"), MACHINES)
def test_the_best_is_within_1_percent_of_an_exhaustive_sweep(trace, system, changes, slots):
    """Although all go over a part only, then fewer over a longer one, and the best of them over the whole."""
    machine = load_system(system, {path.removeprefix("system."): value for path, value in changes.items()})
    policies = [msgspec.structs.replace(one, name=f"p{i}") for i, one in enumerate(by_the_records(machine))]
    results = mt.replay(trace, system=machine, policies=policies, slots=slots, jobs=1)
    staged = ask(trace, system, slots, work=len(candidates(machine)) * 1000, overrides=changes)
    assert staged.best.total_s <= 1.01 * results.summary["total_s"].min()
    assert staged.short_steps < staged.steps and len(staged.ranked) < staged.tried
    assert not staged.best.candidate.is_oracle


@pytest.fixture(scope="module")
def advice(trace):
    return ask(trace, "rtx4090-offload", 60, slo=["tpot_s.p99<=1s"])


def test_an_advice_is_what_a_replay_of_its_command_says(trace, advice, run):
    words = shlex.split(advice.command)
    code, out, _ = run(*words[1:], "--format", "json")
    (figures,) = json.loads(out)["policies"]
    assert code == 0 and figures["total_s"] == advice.best.total_s
    assert figures["tpot_s"] == advice.best.figures["tpot_s"]
    assert figures["lower_bound_s"] == advice.to_dict()["lower_bound_s"]


def test_oracles_are_bounds_and_no_advice(advice):
    assert {one.candidate.is_oracle for one in advice.oracles} == {True}
    assert {one.candidate.is_oracle for one in advice.ranked} == {False}
    names = {(one.candidate.policy.residency, one.candidate.policy.prefetch) for one in advice.oracles}
    assert {("belady", "none"), ("static-hindsight", "none"), ("static-popular", "none")} <= names
    assert any(prefetch.startswith("oracle:") for _, prefetch in names)
    figures = advice.best.figures
    assert figures["work_bound_s"] <= figures["clairvoyant_s"] <= advice.best.total_s
    assert figures["work_bound_s"] < figures["lower_bound_s"] <= advice.best.total_s
    assert advice.to_dict()["lower_bound_s"] == figures["lower_bound_s"]


def test_the_verdict_follows_from_the_replays(advice):
    assert advice.default.candidate.label in default_policies(load_system("rtx4090-offload"))
    assert advice.wins == pytest.approx(1 - advice.best.total_s / advice.default.total_s)
    larger = [size for size in advice.sizes if size.best.slots > 60]
    most = max(size.wins for size in larger)
    assert advice.larger == next(size for size in larger if size.wins >= 0.9 * most)
    assert [size.best.slots for size in advice.sizes] == [30, 45, 75, 90, 120, 192]
    expected = "change the policy" if advice.wins >= advice.larger.wins else "buy memory"
    assert advice.kind == expected and advice.verdict.lower().startswith(expected)


def test_machines_without_a_choice_have_nothing_to_win(trace):
    found = ask(trace, "jetson-orin")
    assert (found.kind, found.tried, found.sizes, found.oracles) == ("nothing to win", 1, [], [])
    assert found.verdict == "Nothing to win: all experts are in the GPU's memory, and there is nothing to decide."
    assert found.best.candidate.label == found.default.candidate.label == "resident"


def test_memory_is_advised_to_a_machine_without_slots(trace):
    """Without slots all keep nothing and are equal; what memory wins is what the best of them does with it."""
    found = ask(trace, "rtx4090-offload", 0)
    assert found.best.slots == 0 and found.best.figures["hits"] == 0 and found.kind == "buy memory"
    assert [size.best.slots for size in found.sizes] == [24, 48, 96, 192]
    for size in found.sizes:
        alone = mt.replay(trace, system="rtx4090-offload", policies="on-demand", slots=size.best.slots)
        assert size.best.total_s <= alone.summary["total_s"][0]


def column(metric: str) -> str:
    return metric.replace(".", "_")


def test_a_size_that_is_faster_than_the_one_asked_for_stands_once_and_beside_that(tmp_path):
    mt.generate(tmp_path / "a.h5", "tiny-olmoe", requests=1, prompt=1, output=1)
    found = ask(tmp_path / "a.h5", "edge-ndp", 16, overrides={"system.ndp.units": 1, "system.ndp.capacity_gb": 200})
    slots = [size.best.slots for size in found.sizes]
    assert found.best.slots == 12 and slots == [8, 16, 20, 24, 32, 192]
    assert all(size.best.order > found.best.order for size in found.sizes[:2])
    assert found.sizes[1].best is next(one for one in found.ranked if one.slots == 16)
    assert f"{found.best.candidate.label} with 12 slots" in found.verdict or found.kind == "buy memory"


def test_a_note_names_slots_that_are_not_those_of_the_machine(trace):
    assert "to use it costs no new memory" in ask(trace, "rtx4090-offload", 191).notes[0]
    small = {"system.gpu.memory_gb": 4.0}
    assert ask(trace, "rtx4090-offload", overrides=small).fitting < 192
    found = ask(trace, "rtx4090-offload", 192, overrides=small)
    assert found.larger is None and found.kind == "nothing to win"
    assert found.verdict.endswith("all experts are priced as if they fitted the GPU.")
    assert ask(trace, "rtx4090-offload", 192).verdict.endswith("all experts fit the GPU.")


def test_a_limit_chooses_and_none_that_keeps_it_is_the_least_miss(trace, advice):
    frame = advice.frame.filter(pl.col("role").is_in(["best", "real"]))
    lower = [name for name, figure in METRICS.items() if figure.better == "lower" and figure.unit == "s"]
    metric = next(name for name in lower if frame[column(name)].min() < 0.999 * frame[column(name)][0])
    least = frame[column(metric)].min()  # which the fastest has not
    kept = ask(trace, "rtx4090-offload", 60, slo=f"{metric}<={1000.001 * least:.12g}ms")
    assert kept.best.miss == 0 and kept.best.total_s > advice.best.total_s
    assert kept.frame[column(metric)][0] <= 1.00001 * least
    none = ask(trace, "rtx4090-offload", 60, slo="demand_bytes<=1B")
    assert none.best.miss == min(one.miss for one in none.ranked) > 0
    assert none.best.figures["demand_bytes"] == frame["demand_bytes"].min()
    assert f"no policy keeps demand_bytes<=1B: the best misses it by {100 * none.best.miss:,.0f} %." in none.verdict


def test_nothing_depends_on_the_jobs(trace, advice):
    again = mt.advise(trace, system="rtx4090-offload", slots=60, slo="tpot_s.p99<=1s", jobs=2)
    assert again.frame.equals(advice.frame)
    assert again.to_dict() == advice.to_dict()


def test_a_folder_is_a_sweep_that_keeps_finished_replays(trace, tmp_path):
    asked = {"system": "rtx4090-offload", "slots": 60, "folder": tmp_path / "out"}
    first = mt.advise(trace, **asked)
    told = json.loads((tmp_path / "out" / "advice.json").read_text())
    assert told == json.loads(json.dumps(first.to_dict())) and told["schema"] == "moetrace.advice/1"
    assert str(tmp_path) not in (tmp_path / "out" / "advice.json").read_text()
    cells = pl.read_parquet(tmp_path / "out" / "cells.parquet")
    assert first.best.total_s in cells["total_s"].to_list()
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    assert mt.advise(trace, **asked).to_dict() == first.to_dict()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()} == written
    assert mt.gate(tmp_path / "out", tmp_path / "base.json", update=True).passed
    mt.report(tmp_path / "out", tmp_path / "page.html")


def test_a_price_by_the_hour_is_compared_with_the_budget(trace):
    priced = {"system.price.usd_hour": 2.5}
    with pytest.raises(UsageError, match=r"costs 2\.5 USD an hour, and the budget is 2"):
        ask(trace, "jetson-orin", overrides=priced, budget_usd_hour=2.0)
    found = ask(trace, "jetson-orin", overrides=priced, budget_usd_hour=2.5)
    tokens = found.best.figures["tokens_per_s"]
    assert found.usd_per_million_tokens == pytest.approx(2.5 / 3600 / tokens * 1e6) and found.notes == []
    assert found.best.figures["usd_per_million_tokens"] == pytest.approx(found.usd_per_million_tokens)
    with pytest.raises(UsageError, match=r"costs 3\.5 USD an hour, and the budget is 2\.5"):  # all that is listed
        ask(trace, "jetson-orin", overrides=priced | {"system.price.gpu.usd_hour": 1}, budget_usd_hour=2.5)
    unknown = ask(trace, "jetson-orin", budget_usd_hour=0.1)
    assert "has no price by the hour" in unknown.notes[0] and unknown.usd_per_million_tokens is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"jobs": 0}, "jobs is 0"),
        ({"slo": "tpot_s.p99"}, "METRIC<=LIMIT"),
        ({"slo": "price_usd<=1"}, "The SLO 'price_usd<=1' needs [price] in system jetson-orin"),
        ({"slo": "resent_bytes<=1"}, "'resent_bytes<=1': no candidate has it, as no system has link.loss: set it in"),
        ({"slo": "in_time>=0.9"}, "'in_time>=0.9': no candidate has it, as no policy has deadline_ms: drop the SLO."),
        ({"budget_usd_hour": -1}, "The budget is -1"),
        ({"budget_usd_hour": float("nan")}, "The budget is nan"),
        ({"overrides": {"policy.dispatch": "gpu"}}, "chooses the policy"),
        ({"system": "edge-nd"}, "No system preset is called 'edge-nd'"),
        ({"model": "qwen3-30b-a3b"}, "layers"),
        ({"slots": -1}, "slots wants"),
    ],
)
def test_wrong_questions_are_one_sentence(trace, wrong, words):
    with pytest.raises(UsageError) as error:
        mt.advise(trace, **{"system": "jetson-orin"} | wrong)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_every_candidate_is_legal_distinct_and_sayable():
    for name in ("edge-ndp", "h100-dimm-ndp", "rtx4090-ddr5", "rtx4090-offload"):
        system = load_system(name)
        found = candidates(system)
        assert len({one.label for one in found}) == len(found)
        for one in found[:: max(len(found) // 40, 1)]:
            spec = load_policy(one.preset, one.changes)
            check_policy(spec, system)
            assert spec == one.policy and not one.is_oracle and None not in one.changes.values()


@pytest.mark.parametrize(
    ("system", "fields", "label"),
    [
        ("phone-ufs", {"residency": "ewma"}, "on-demand residency=ewma"),
        ("phone-ufs", {"residency": "lfu", "prefetch": "online:2"}, "on-demand residency=lfu prefetch=online:2"),
        ("phone-ufs", {"residency": "foresee", "prefetch": "foresee", "scope": "global"}, "foresee dispatch=gpu"),
        ("edge-ndp", {"residency": "lfu"}, "on-demand residency=lfu"),
        ("edge-ndp", {"residency": "lfu", "dispatch": "balance"}, "hybrid residency=lfu"),
    ],
)
def test_a_policy_is_named_by_the_preset_with_the_fewest_other_fields(system, fields, label):
    machine = load_system(system)
    choices = {"placement": "ep", "dispatch": "gpu", "prefetch": "none", "scope": "layer"} | fields
    (found,) = [
        one
        for one in candidates(machine)
        if all(getattr(one.policy, name) == value for name, value in choices.items() if name != "placement")
        and one.policy.half_life is None
        and (machine.ndp is None or one.policy.placement == "ep")
    ]
    assert found.label == label
