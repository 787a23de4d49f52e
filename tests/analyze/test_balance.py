"""Balance: the kernels against plain Python, bounds against every possible plan, and the walk over a trace."""

import itertools
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle_balance as oracle
from support.balance_traces import EXPERTS, LAYERS, counted, small_trace

from moetrace.analyze.balance import loads as loads_module
from moetrace.analyze.balance.loads import add, loads_of, steps_of_phase, summed
from moetrace.analyze.balance.plans import Plan, Tier, make_plan, moved_bytes
from moetrace.analyze.balance.units import FRAMES, balance, loads_for_next, plan_for_next
from moetrace.generators import generate_trace
from moetrace.importers.importing import import_traces
from moetrace.results.replay import replay
from moetrace.spec import PolicySpec, load_model, load_system
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace
from moetrace.trace.writer import CountsWriter

CAPTURES = Path(__file__).parents[3] / "shared" / "traces"
captured = pytest.mark.skipif(not CAPTURES.exists(), reason="needs the captures beside the repository")
PLACEMENTS = ["ep", "ep-block", "ep-lpt", "eplb", "tp", "tp:2"]


def as_counts(trace, path):
    counts = counted(trace)
    facts = {"model": trace.model, "num_experts": trace.num_experts, "top_k": trace.top_k, "source": {}}
    with CountsWriter(path, layers=trace.layers, rows=trace.rows, steps=trace.steps, **facts) as writer:
        writer.append_counts(counts, np.diff(trace.offset), trace.phase)
    return Trace.open(path)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), at_once=st.sampled_from([1, 40, 1 << 20]), phase=st.sampled_from(["all", "decode"]))
def test_loads_are_counts(seed, at_once, phase):
    trace = small_trace(seed)
    counts, steps = counted(trace), steps_of_phase(trace, phase)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loads_module, "AT_ONCE", at_once)
        parts = list(loads_of(trace, steps))
        total = summed(trace, steps)
    assert at_once > 100 or len(parts) > 1 or steps.size < 7  # 40 ids are those of 6 rows
    found = np.zeros_like(counts[steps])
    step = 0
    for part in parts:
        for i in range(part.steps * LAYERS):
            own = slice(part.start[i], part.start[i + 1])
            assert (np.diff(part.expert[own]) > 0).all() and (part.rows[own] > 0).all()
            found[step + i // LAYERS, i % LAYERS, part.expert[own]] = part.rows[own]
        step += part.steps
    assert np.array_equal(found, counts[steps]) and np.array_equal(total, counts[steps].sum(0))
    assert sum(part.all_rows for part in parts) == int(np.diff(trace.offset)[steps].sum())


@pytest.mark.pure
def test_loads_of_ids_and_of_counts_are_the_same(tmp_path):
    trace = small_trace(3)
    with as_counts(trace, tmp_path / "a.h5") as other:
        for phase in ("all", "prefill"):
            steps = steps_of_phase(trace, phase)
            for one, two in zip(loads_of(trace, steps), loads_of(other, steps), strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def expected_imbalance(counts, plan, turns):
    """Mean imbalance of each layer over the steps of counts [steps, L, E], plan a Plan or one a step."""
    means = []
    for layer in range(counts.shape[1]):
        values = []
        for i, turn in enumerate(turns):
            own = plan[i] if isinstance(plan, list) else plan
            if counts[i, layer].sum():
                rows, _ = oracle.bin_loads(
                    counts[i, layer].tolist(), own.expert_of_slot[layer].tolist(), turn, lambda e, n: 0
                )
                values.append(max(rows) / np.mean(rows))
        means.append(np.mean(values) if values else None)
    return means


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    window=st.integers(1, 12),
    interval=st.integers(1, 14),
    phase=st.sampled_from(["all", "decode"]),
)
def test_plans_are_made_from_their_window_and_judged_on_the_rest(seed, window, interval, phase):
    trace, tier = small_trace(seed, steps=30), Tier(3, 2)
    steps = steps_of_phase(trace, phase)
    if steps.size < 14:
        return
    counts = counted(trace)[steps]
    found = balance(trace, ["ep-lpt", "eplb", "ep"], tier=tier, window=window, interval=interval, phase=phase)
    judged = counts[window:]
    turns = list(range(len(judged)))
    for placement in ("ep-lpt", "eplb"):

        def made_from(part, placement=placement):
            return make_plan(placement, tier, (LAYERS, EXPERTS), part.sum(0))

        anew = [made_from(counts[begin : begin + window]) for begin in range(0, len(judged), interval)]
        plans = {
            "kept": anew[0],
            "clairvoyant": made_from(judged),
            "re-made": [anew[i // interval] for i in turns],
        }
        for kind, plan in plans.items():
            own = found.layers.filter(placement=placement, plan=kind)
            if kind == "re-made" and len(anew) == 1:
                assert own.is_empty()
                continue
            assert own["imbalance"].to_list() == pytest.approx(expected_imbalance(judged, plan, turns), rel=1e-12)
        moved = sum(moved_bytes(a, b, trace.expert_bytes) for a, b in itertools.pairwise(anew))
        if len(anew) > 1:
            own = found.layers.filter(placement=placement, plan="re-made")
            assert own["migration_bytes"].to_list() == moved.tolist()
            stale = found.staleness.filter(placement=placement).drop_nulls("layer")
            assert stale["migration_bytes"].to_list() == moved.tolist()
    assert found.trace["rebalances"] == [len(anew) - 1]
    assert found.trace["rebalance_steps"] == [steps[window:][interval::interval].tolist()]
    next_plan = plan_for_next(trace, "eplb", tier, window, phase)
    assert np.array_equal(next_plan.expert_of_slot, made_from(counts[-window:]).expert_of_slot)


@pytest.mark.pure
@pytest.mark.parametrize("window", [0, None])
def test_without_a_window_all_steps_are_judged_and_plans_made_from_them(window, tmp_path):
    """One table of counts is enough: a trace of one step has no window unless asked."""
    whole, tier = small_trace(5), Tier(3, 2)
    counts = counted(whole)
    trace = whole
    if window is None:
        counts = counts.sum(axis=0, keepdims=True)
        facts = {"model": "", "num_experts": EXPERTS, "top_k": 2, "layers": LAYERS, "source": {}}
        with CountsWriter(tmp_path / "table.h5", rows=int(counts.max()), steps=1, **facts) as writer:
            writer.append_counts(counts, counts.max(axis=(1, 2)), np.array([2], np.uint8))
        trace = Trace.open(tmp_path / "table.h5")
    found = balance(trace, ["ep", "ep-lpt", "eplb"], tier=tier, window=window)
    assert found.summary.select("placement", "plan").rows() == [
        ("ep", "fixed"),
        ("ep-lpt", "clairvoyant"),
        ("eplb", "clairvoyant"),
    ]
    assert found.trace["window"] == 0 and found.trace["judged_steps"] == len(counts) and found.staleness.is_empty()
    for placement in ("ep", "ep-lpt", "eplb"):
        plan = make_plan(placement, tier, (LAYERS, EXPERTS), counts.sum(0))
        own = found.layers.filter(placement=placement)["imbalance"].to_list()
        assert own == pytest.approx(expected_imbalance(counts, plan, range(len(counts))), rel=1e-12)
        assert np.array_equal(plan_for_next(trace, placement, tier, window).expert_of_slot, plan.expert_of_slot)
    assert np.array_equal(loads_for_next(trace, window), counts.sum(0))


@pytest.fixture(scope="module")
def timed():
    trace = generate_trace("tiny-olmoe", requests=20, prompt=8, output=20, batch=8, zipf=0.9, seed=1)
    return trace, balance(trace, PLACEMENTS, tier=6, window=40, interval=20, system="edge-ndp")


def test_seconds_are_those_of_the_timing_model(timed):
    trace, found = timed
    model, system = load_model("tiny-olmoe"), load_system("edge-ndp")
    counts, size = counted(trace)[40:], model.expert_bytes()[0, 0]
    for placement, share in (("ep", 1), ("tp", 6), ("tp:2", 2)):
        plan = make_plan(placement, Tier(6), (trace.layers, 32))

        def ndp_s(e, n, share=share):
            return (
                max(model.flop_per_row * n / (share * system.ndp.flop_s), size / (share * system.ndp.bytes_s))
                + system.ndp.command_s
            )

        busy_s = [
            [
                oracle.bin_loads(rows[layer].tolist(), plan.expert_of_slot[layer].tolist(), 0, ndp_s)[1]
                for rows in counts
            ]
            for layer in range(trace.layers)
        ]
        own = found.layers.filter(placement=placement)
        assert own["busy_s"].to_list() == pytest.approx([sum(map(max, steps)) for steps in busy_s], rel=1e-9)
        in_time = [np.mean([max(step) / np.mean(step) for step in steps]) for steps in busy_s]
        assert own["time_imbalance"].to_list() == pytest.approx(in_time, rel=1e-9)


@pytest.mark.parametrize("placement", ["ep", "ep-block", "tp:2"])
def test_a_replay_on_units_only_is_equally_uneven(timed, placement):
    trace, found = timed
    policy = PolicySpec(name="units", placement=placement, dispatch="ndp")
    steps = replay(trace, system=load_system("edge-ndp", {"ndp.units": 6}), policies=[policy]).steps
    own = found.summary.filter(placement=placement)["time_imbalance"].item()
    assert steps["imbalance"].tail(found.trace["judged_steps"]).mean() == pytest.approx(own, rel=1e-12)


def test_figures_of_all_plans_are_in_order(timed):
    _, found = timed
    rows = found.layers
    assert (rows["imbalance"] >= rows["least_imbalance"]).all() and (rows["busy_s"] >= rows["least_busy_s"]).all()
    assert (rows["least_imbalance"] >= 1).all() and rows["jain"].is_between(1 / 6, 1 + 1e-12).all()
    for low, high in (
        ("imbalance_p50", "imbalance_p95"),
        ("imbalance_p95", "imbalance_p99"),
        ("imbalance_p99", "imbalance_max"),
    ):
        assert (rows[low] <= rows[high]).all()
    assert found.layers.filter(placement="tp").select("imbalance", "jain").to_numpy().tolist() == [[1, 1]] * 6
    slots = dict(found.summary.select("placement", "slots").iter_rows())
    assert slots == {"ep": 32, "ep-block": 32, "ep-lpt": 32, "eplb": 42, "tp": 32, "tp:2": 32}
    assert rows.filter(pl.col("plan") != "re-made")["migration_bytes"].sum() == 0


def test_staleness_follows_from_the_layers(timed):
    _, found = timed
    judged, (first,) = found.trace["judged_steps"], found.trace["intervals"]
    for layer in (0, 5):
        kept, anew, ahead = (
            found.layers.filter(placement="eplb", plan=plan, layer=layer).row(0, named=True)
            for plan in ("kept", "re-made", "clairvoyant")
        )
        row = found.staleness.filter(placement="eplb", layer=layer).row(0, named=True)
        assert row["imbalance_loss_to_remade"] == kept["imbalance"] / anew["imbalance"] - 1
        assert row["busy_loss_to_clairvoyant"] == kept["busy_s"] / ahead["busy_s"] - 1
        pause_s = anew["migration_bytes"] / load_system("edge-ndp").link.bytes_s / found.trace["rebalances"][0]
        saved_s = (kept["busy_s"] - anew["busy_s"]) / (judged - first)
        assert row["pause_s_per_rebalance"] == pytest.approx(pause_s) and row["saved_s_per_step"] == pytest.approx(
            saved_s
        )
        assert row["break_even_steps"] == (pytest.approx(pause_s / saved_s) if saved_s > 0 else None)
    every = found.staleness.filter(pl.col("layer").is_null(), placement="eplb").row(0, named=True)
    own = found.layers.filter(placement="eplb", plan="kept")
    assert every["busy_s_kept"] == pytest.approx(own["busy_s"].sum())
    assert every["imbalance_kept"] == pytest.approx(own["imbalance"].mean())


def test_blocks_and_the_kind_of_trace_change_nothing(monkeypatch, tmp_path):
    trace = small_trace(11, steps=40)
    arguments = {"tier": Tier(3), "window": 9, "interval": 4}
    whole = balance(trace, PLACEMENTS[:4], **arguments).to_dict()
    with as_counts(trace, tmp_path / "a.h5") as other:
        bytes_unknown = balance(other, PLACEMENTS[:4], **arguments)
        with pytest.raises(UsageError, match=r"copies .row. asks which row chose what, but .*a\.h5 holds counts"):
            balance(other, ["eplb"], copies="row", **arguments)
        with pytest.raises(UsageError, match=r"fan-out asks which row chose what, but .*a\.h5 holds counts"):
            balance(other, ["eplb"], fan_out=True, **arguments)
    assert bytes_unknown.layers["migration_bytes"].null_count() == len(bytes_unknown.layers)
    assert bytes_unknown.summary["migration_bytes"].null_count() == len(bytes_unknown.summary)
    assert (
        bytes_unknown.layers.drop("migration_bytes").to_dicts()
        == pl.DataFrame(whole["layers"]).drop("migration_bytes").to_dicts()
    )
    monkeypatch.setattr(loads_module, "AT_ONCE", 1)
    assert balance(trace, PLACEMENTS[:4], **arguments).to_dict() == whole
    drawn = balance(trace, ["eplb"], copies="random", **arguments)
    monkeypatch.undo()
    assert balance(trace, ["eplb"], copies="random", **arguments).to_dict() == drawn.to_dict()
    assert list(whole) == ["schema", "trace", *FRAMES]


def test_a_given_plan_is_judged_as_it_is():
    trace = small_trace(5)
    plan = make_plan("ep", Tier(3), (LAYERS, EXPERTS))
    found = balance(trace, ["ep"], tier=3, plans={"mine.json": plan})
    one, other = (found.layers.filter(placement=name).drop("placement", "plan") for name in ("ep", "mine.json"))
    assert one.equals(other) and found.summary["plan"].to_list() == ["fixed", "given"]
    assert found.staleness.is_empty() and found.trace["rebalances"] == [0]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), copies=st.sampled_from(["even", "row"]))
def test_layers_with_different_numbers_of_experts_are_as_in_separate_traces(seed, copies):
    """A layer of 3 among others of 7 and 5: its slots, its figures and its bound are those of a trace of it only."""
    rng, own = np.random.default_rng(seed), [7, 3, 5]
    ids = np.stack([np.argsort(rng.random((60, e)))[:, :2] for e in own], axis=1).astype(np.uint8)
    size = rng.integers(1, 40, (3, 7))
    steps = {"steps": np.full(20, 3), "request": np.zeros(60, int)}
    placements, tier = ["ep", "ep-block", "ep-lpt", "eplb"], {"tier": Tier(2), "copies": copies}
    trace = Trace.from_arrays(ids, num_experts=7, layer_experts=own, expert_bytes=size, **steps)
    whole = balance(trace, placements, **tier)
    assert (whole.trace["experts"], whole.trace["experts_min"]) == (7, 3)
    for layer, experts in enumerate(own):
        own_bytes = size[layer : layer + 1, :experts]
        one = Trace.from_arrays(ids[:, layer : layer + 1], num_experts=experts, expert_bytes=own_bytes, **steps)
        alone = balance(one, placements, **tier)
        assert whole.layers.filter(layer=layer).drop("layer").equals(alone.layers.drop("layer"))
    ids[50, 1] = [0, 4]
    with pytest.raises(MoetraceError, match="step 16, layer entry 1 chooses expert 4, but that layer has 3 experts"):
        balance(Trace.from_arrays(ids, num_experts=7, layer_experts=own, **steps), tier=2)


def test_layers_without_choices():
    ids = np.full((6, 2, 1), 255, np.uint8)
    ids[:, 0, 0] = [0, 1, 2, 3, 0, 1]
    found = balance(Trace.from_arrays(ids, num_experts=4), tier=2)
    empty = found.layers.filter(layer=1)
    assert empty["imbalance"].null_count() == len(empty) and empty["steps"].sum() == 0
    assert found.summary["imbalance"].null_count() == 0


def test_impossible_arguments_are_refused():
    trace = small_trace(0)
    for arguments, sentence in (
        ({"placements": ["best"]}, "no placement 'best'"),
        ({"placements": []}, "no placement and no plan is given"),
        ({"window": -1}, "the window is -1 steps: give 0 to 23"),
        ({"window": 0, "interval": 2}, "the interval is between plans made from a window"),
        ({"window": 24}, "the window is 24 steps"),
        ({"interval": 0}, "the interval is 0 steps"),
        ({"interval": [4, -1]}, "the interval is -1 steps"),
        ({"interval": []}, "there are 0 intervals: give 1 to 64"),
        ({"interval": range(1, 66)}, "there are 65 intervals: give 1 to 64"),
        ({"tier": Tier(3, nodes=2), "fan_out": True}, "3 units cannot be in 2 nodes equally"),
        ({"phase": "both"}, "phase is 'both'"),
        ({"copies": "nearest"}, "copies are 'nearest', seed 0: give even, row, random, and a seed from 0"),
        ({"copies": "random", "seed": -1}, "a seed from 0"),
        ({"system": "jetson-orin"}, "has no NDP units"),
        ({"system": "edge-ndp"}, "seconds need a model, but trace in memory names '', which is no preset"),
        ({"system": "edge-ndp", "model": "mixtral-8x7b"}, "3 MoE layers of 7 experts, but the model mixtral-8x7b has"),
        ({"plans": {"a": Plan(1, np.zeros((2, 2, 4), np.int32))}, "tier": 2}, "the plan a is of 2 layers, 2 units"),
        ({"plans": {"a": Plan(1, np.zeros((3, 2, 4), np.int32))}, "tier": 3}, "the plan a is of 3 layers, 2 units"),
    ):
        with pytest.raises(UsageError, match=sentence):
            balance(trace, **arguments)
    with pytest.raises(MoetraceError, match="the plan a has no copy of expert 1 in layer entry 0"):
        balance(trace, plans={"a": Plan(1, np.zeros((3, 2, 4), np.int32))}, tier=2)
    with pytest.raises(MoetraceError, match="has no mixed steps"):
        balance(trace, phase="mixed")
    with pytest.raises(MoetraceError, match="has 2000 layers of 2 experts; balance takes 1024 layers and 1048576"):
        balance(Trace.from_arrays(np.zeros((2, 2000, 1), int), num_experts=2))
    with pytest.raises(MoetraceError, match="has experts of 4611686018427387904 bytes: what moves would be more"):
        balance(Trace.from_arrays(np.zeros((2, 1, 1), int), num_experts=2, expert_bytes=np.array([2**62])), tier=2)


@captured
@pytest.mark.parametrize("name", ["real_deepseek-v2-lite_esft_law.npz", "real_gpt-oss-20b_decode_24req_weights.npz"])
def test_captures(name, tmp_path):
    import_traces([CAPTURES / name], tmp_path / "a.h5")
    with Trace.open(tmp_path / "a.h5") as trace:
        found = balance(trace, tier=8)
        steps = found.trace["judged_steps"]
        assert np.array_equal(summed(trace, np.arange(trace.steps)), counted(trace).sum(0))
    rows = found.layers
    assert (rows["imbalance"] >= rows["least_imbalance"]).all() and (rows["steps"] == steps).all()
    by_plan = {(row["placement"], row["plan"]): row["imbalance"] for row in found.summary.iter_rows(named=True)}
    if "law" in name:  # long prompts: plans made from loads are worth it
        assert by_plan["eplb", "kept"] < by_plan["ep", "fixed"] and by_plan["ep-lpt", "kept"] < by_plan["ep", "fixed"]


def test_every_column_is_explained(timed):
    page = (Path(__file__).parents[2] / "docs" / "balance.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`(\w+)`", page))
    columns = {column for frame in FRAMES for column in getattr(timed[1], frame).columns}
    assert columns - explained == set()


def test_impossible_ids_and_counts_are_named(tmp_path):
    ids = np.zeros((40, 2, 1), np.uint8)
    ids[33, 1] = 9
    with pytest.raises(MoetraceError, match="/experts row 33, layer entry 1 holds the id 9, but the model has 4"):
        balance(Trace.from_arrays(ids, num_experts=4), tier=2)
    trace = small_trace(2)
    with as_counts(trace, tmp_path / "a.h5") as other:
        column = other._columns["counts"]

        def spoilt(start, stop):
            counts = column.read(start, stop).copy()
            counts[-1, 1, 2] = 99
            return counts

        other._columns = {**other._columns, "counts": column._replace(read=spoilt)}
        with pytest.raises(MoetraceError, match="layer entry 1, expert 2 is 99, but must be 0 to the"):
            balance(other, tier=2)


def test_sums_of_loads_add_up():
    trace = small_trace(1)
    total = np.zeros((LAYERS, EXPERTS), np.int64)
    for part in loads_of(trace, np.arange(trace.steps)):
        add(part, total)
    assert np.array_equal(total, counted(trace).sum(0))
