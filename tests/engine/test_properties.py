"""What must hold of every replay, whatever the policy."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.drawn_runs import replay
from support.one_run import run
from support.strategies import Case, all_policies, as_arrays, cases, write_loads, write_static

from moetrace.engine import decoded as decoded_module
from moetrace.engine import lane as lane_module
from moetrace.engine.decoded import Decoded, decoded_bytes, needs_of
from moetrace.engine.demand import demand_of
from moetrace.engine.folding import StepStore
from moetrace.engine.run import Lane, Run, run_setups
from moetrace.engine.setup import Setup
from moetrace.engine.state import FIRST_GROUP, GPU
from moetrace.results.summary import policy_figures
from moetrace.spec import Gpu, MoetraceError, UsageError, load_model, load_policy, load_system
from moetrace.spec.choices import BY_ADMISSION
from moetrace.trace import Trace
from moetrace.trace import format as trace_format

RANDOM = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
PRESETS = ("on-demand", "monde", "ndp-ep", "ndp-tp", "edge-ndp-tp-lb", "edge-ndp")


def some_policies(case: Case, data, folder, most: int = 5):
    loads, static = write_loads(folder / "loads.csv", case), write_static(folder / "static.csv", case)
    allowed = all_policies(case.system.units, loads, static)
    return data.draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=most), label="policies")


def assert_same(one: Lane, other: Lane) -> None:
    """Bit for bit."""
    for part in ("step", "layer", "unit", "tally", "fallbacks"):
        assert getattr(one.log, part).tobytes() == getattr(other.log, part).tobytes(), part
    assert one.clairvoyant_s == other.clairvoyant_s
    assert one.lower_bound_s == other.lower_bound_s


@RANDOM
@given(case=cases(), data=st.data())
def test_conserves_rows_and_never_beats_a_bound(case, data, tmp_path_factory):
    outcome = replay(case, some_policies(case, data, tmp_path_factory.mktemp("p")))
    cells = (case.trace.experts >= 0).sum()
    for lane in outcome.lanes:
        unit, step = lane.log.unit, lane.log.step
        assert unit["rows"][GPU] + unit["rows"][FIRST_GROUP:].sum() == pytest.approx(cells)
        assert (step["duration_s"] > 0).all()
        parts = ("dense_s", "moe_s", "head_s", "wait_s", "demand_bytes", "prefetch_bytes", "hits", "misses", "late")
        assert all((step[name] >= 0).all() for name in parts)
        assert step["duration_s"].sum() >= outcome.work_bound_s * (1 - 1e-12)
        assert step["duration_s"].sum() >= lane.lower_bound_s * (1 - 1e-9)
        assert lane.lower_bound_s >= lane.work_bound_s
        assert lane.clairvoyant_s >= outcome.work_bound_s * (1 - 1e-12)
        busy_s = unit["busy_s"][FIRST_GROUP:]
        assert (busy_s <= step["moe_s"].sum() * (1 + 1e-9)).all()
        assert (unit["busy_s"] - unit["shared_s"] <= step["duration_s"].sum() * (1 + 1e-9)).all()
        assert ((unit["shared_s"] >= 0) & (unit["shared_s"] <= unit["busy_s"])).all()


@RANDOM
@given(case=cases(), data=st.data())
def test_capacity_is_never_exceeded(case, data, tmp_path_factory):
    """Looked at after every step, with the books of the cache: residents, rings and what policies see agree."""
    policies = some_policies(case, data, tmp_path_factory.mktemp("p"), most=2)

    def watch(lane: Lane, batch) -> None:
        original(lane, batch)
        cache, experts = lane.state.cache, case.model.experts
        pools = len(cache.residents)
        of_pool = cache.resident.reshape(pools, -1).sum(axis=1)
        assert of_pool.tolist() == cache.residents.tolist()
        assert (cache.residents <= cache.capacity).all()
        assert cache.resident.sum() <= case.slots
        assert lane.state.cells["resident"].reshape(-1).tolist() == cache.resident.tolist()
        for pool in range(pools):
            walk = list(ring(cache, cache.resident.size + pool))
            touched = lane.state.cells["touched"]
            ages = [(touched[divmod(code, experts)], code) for code in walk]
            assert ages == sorted(ages) or cache.order >= BY_ADMISSION
            assert all(cache.resident[code] for code in walk)
            assert cache.hand[pool] in (*walk, cache.resident.size + pool)

    original = Lane.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lane, "advance", watch)
        patch.setattr(trace_format, "BLOCK_BYTES", 1)
        patch.setattr("moetrace.engine.decoded.BLOCK_BYTES", 1)
        replay(case, policies)


def ring(cache, end: int):
    code = int(cache.after[end])
    while code != end:
        yield code
        code = int(cache.after[code])


@RANDOM
@given(case=cases(), data=st.data())
def test_blocks_and_jobs_change_nothing(case, data, tmp_path_factory):
    policies = some_policies(case, data, tmp_path_factory.mktemp("p"))
    whole = replay(case, policies)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_format, "BLOCK_BYTES", 1)  # one step a block
        patch.setattr("moetrace.engine.decoded.BLOCK_BYTES", 1)  # with threads, too
        in_steps = replay(case, policies, jobs=4)
    assert in_steps.work_bound_s == whole.work_bound_s
    for one, other in zip(whole.lanes, in_steps.lanes, strict=True):
        assert_same(one, other)


@RANDOM
@given(case=cases(), data=st.data())
def test_relabelling_units_changes_nothing_else(case, data, tmp_path_factory):
    policies = some_policies(case, data, tmp_path_factory.mktemp("p"))
    before = replay(case, policies)
    original = lane_module.place_experts
    rng = np.random.default_rng(data.draw(st.integers(0, 99), label="relabelling"))
    relabel = {}

    def relabelled(policy, layer_index, experts, units, model):
        share = policy.group_size(units) if units else 1
        relabel.setdefault(share, rng.permutation(max(units // share, 1)))
        return relabel[share][original(policy, layer_index, experts, units, model)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane_module, "place_experts", relabelled)
        after = replay(case, policies)
    for one, other in zip(before.lanes, after.lanes, strict=True):
        for name in ("hits", "misses", "late"):
            assert one.log.step[name].tolist() == other.log.step[name].tolist()
        np.testing.assert_allclose(one.log.step["duration_s"], other.log.step["duration_s"], rtol=1e-12)
        moved = other.log.unit["busy_s"][FIRST_GROUP:][relabel[one.machine.share]]
        np.testing.assert_allclose(one.log.unit["busy_s"][FIRST_GROUP:], moved, rtol=1e-12, atol=1e-18)


@RANDOM
@given(case=cases(), data=st.data())
def test_optimal_is_never_beaten_within_a_layer(case, data):
    """Without residency each layer stands alone, so no dispatch is faster than the best of all splits."""
    if case.system.units == 0:
        return
    names = ("ndp", "gpu", "hot", "balance", "optimal")
    placement = data.draw(st.sampled_from(["ep", "ep-block", "tp"]))
    policies = [load_policy("ndp-ep", {"name": n, "placement": placement, "dispatch": n}) for n in names]
    *others, best = replay(case, policies).lanes
    for lane in others:
        assert (best.log.step["moe_s"] <= lane.log.step["moe_s"] * (1 + 1e-12)).all()


def shipped(name: str) -> Trace:
    from pathlib import Path

    return Trace.open(Path(__file__).parents[2] / "traces" / name)


def test_jobs_change_nothing_on_a_shipped_trace():
    trace, system = shipped("mixtral-8x7b-b16.h5"), load_system("edge-ndp")
    policies = [load_policy(name) for name in PRESETS]
    runs = [run(trace, load_model(trace.model), system, policies, jobs=jobs) for jobs in (1, 4)]
    for one, other in zip(runs[0].lanes, runs[1].lanes, strict=True):
        assert_same(one, other)
    assert runs[0].work_bound_s == runs[1].work_bound_s


def test_wrong_ids_are_named_by_row():
    experts = np.zeros((5, 2, 2), np.uint8)
    experts[:, :, 1] = 1
    model = {"moe_layers": 2, "experts": 32, "top_k": 2}
    for value, what in ((40, "holds the id 40"), (0, "chooses expert 0 more than once")):
        wrong = experts.copy()
        wrong[3, 1, 1] = value
        for steps in (None, np.array([5])):
            trace = Trace.from_arrays(wrong, num_experts=32, steps=steps)
            with pytest.raises(MoetraceError, match=f"/experts row 3, layer entry 1 {what}"):
                run(trace, load_model("tiny-olmoe", model), load_system("edge-ndp"), [load_policy("monde")])


def test_trace_and_model_must_fit():
    trace = shipped("tiny-olmoe.h5")
    with pytest.raises(UsageError, match="6 MoE layers of 32 experts, but the model qwen3-30b-a3b has 48 of 128"):
        run(trace, load_model("qwen3-30b-a3b"), load_system("edge-ndp"), [load_policy("monde")])
    warned = run(trace, load_model("tiny-olmoe", {"top_k": 8}), load_system("edge-ndp"), [load_policy("monde")])
    assert len(warned.warnings) == 1
    assert "4 experts a token" in warned.warnings[0]


def test_slots():
    trace, model, system = shipped("tiny-olmoe.h5"), load_model("tiny-olmoe"), load_system("edge-ndp")
    policy = [load_policy("on-demand")]
    assert run(trace, model, system, policy, slots=10**6).slots == 192
    with pytest.raises(UsageError, match="at least 0"):
        run(trace, model, system, policy, slots=-1)
    with pytest.raises(UsageError, match="no link"):
        run(trace, model, load_system("jetson-orin"), policy, slots=5)
    hits = [run(trace, model, system, policy, slots=n).lanes[0].log.step["hits"].sum() for n in (0, 6, 48, 192)]
    assert hits[0] == 0
    assert hits == sorted(hits)


def test_static_set_must_fit(tmp_path):
    path = tmp_path / "static.csv"
    path.write_text("0,1\n0,2\n")
    policy = load_policy("on-demand", {"residency": "static", "static": str(path)})
    with pytest.raises(UsageError, match=r"holds 2 experts for a layer, but the GPU has 1 slots"):
        run(shipped("tiny-olmoe.h5"), load_model("tiny-olmoe"), load_system("edge-ndp"), [policy], slots=6)


@RANDOM
@given(case=cases(), data=st.data())
def test_many_setups_in_one_pass_give_the_figures_of_separate_replays(case, data, tmp_path_factory):
    """Other slots, other machines, other needs of the blocks beside each other, decoded each time or once and kept."""
    policies = some_policies(case, data, tmp_path_factory.mktemp("p"))
    trace = Trace.from_arrays(num_experts=case.model.experts, **as_arrays(case.trace, case.model.experts))
    everything = case.model.moe_layers * case.model.experts
    setups = []
    for policy in policies:
        slots = data.draw(st.integers(0, everything), label="slots")
        system = data.draw(st.sampled_from([case.system, replace(case.system, gpu=faster(case.system.gpu))]))
        static = policy.static is None or slots >= case.slots
        slots = slots if static else case.slots
        setups.append(Setup(model=case.model, system=system, policies=[policy], slots=slots, ignore_capacity=True))
    alone = [run(trace, s.model, s.system, s.policies, slots=s.slots, ignore_capacity=True) for s in setups]
    needs = needs_of(policies)
    kept = Decoded(trace, needs, 1 << 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_format, "BLOCK_BYTES", 1)  # one step a block
        patch.setattr("moetrace.engine.decoded.BLOCK_BYTES", 1)  # with threads, too
        patch.setattr("moetrace.engine.run.SMALL_BYTES", data.draw(st.sampled_from([0, 96 << 20]), label="small"))
        streamed = run_setups(trace, setups, jobs=data.draw(st.integers(2, 4)))
        with StepStore(data.draw(st.sampled_from([0, 100, 1 << 20]), label="store")) as store:
            folded = run_setups(trace, setups, jobs=2, store=store)
            figures = [(policy_figures(run), run.lanes[0].duration_s.tobytes()) for run in folded]
        kept_in_steps = Decoded(trace, needs, 1 << 30)
    together = (streamed, *(run_setups(decoded, setups) for decoded in (kept, kept, kept_in_steps)))
    for runs in together:
        for one, other in zip(alone, runs, strict=True):
            assert isinstance(other, Run)
            assert (one.slots, one.work_bound_s, one.warnings) == (other.slots, other.work_bound_s, other.warnings)
            assert_same(one.lanes[0], other.lanes[0])
    for one, of_folded in zip(alone, figures, strict=True):  # what a sweep keeps, to the last bit
        assert (policy_figures(one), one.lanes[0].duration_s.tobytes()) == of_folded
    sizes = sum(batch.demand.expert.nbytes + batch.demand.next_step.nbytes for batch, _ in kept.batches())
    assert sizes <= decoded_bytes(trace, needs)


def faster(gpu: Gpu) -> Gpu:
    return replace(gpu, tflops=gpu.tflops * 1.5, launch_us=gpu.launch_us + 1.0)


def test_a_setup_that_fails_costs_the_others_nothing(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def bad(state, view, layer, load, plan):\n    if view.step > 3:\n        plan[load.size] = 1\n")
    trace, model, system = shipped("tiny-olmoe.h5"), load_model("tiny-olmoe"), load_system("edge-ndp")
    good = Setup(model=model, system=system, policies=[load_policy("monde"), load_policy("ndp-ep")], slots=48)
    setups = [
        good,
        Setup(model=load_model("qwen3-30b-a3b"), system=system, policies=[load_policy("monde")]),
        Setup(model=model, system=load_system("rtx4090-offload"), policies=[load_policy("monde")]),
        Setup(model=model, system=system, policies=[load_policy("monde"), load_policy(f"{path}:bad")]),
        good,
    ]
    for jobs in (1, 3):
        first, fit, units, function, last = run_setups(trace, setups, jobs=jobs)
        assert isinstance(first, Run)
        assert isinstance(last, Run)
        alone = run(trace, model, system, good.policies, slots=48)
        for runs in (first, last):
            assert runs.work_bound_s == alone.work_bound_s
            for one, other in zip(alone.lanes, runs.lanes, strict=True):
                assert_same(one, other)
        assert "has 48 of 128" in str(fit)
        assert "needs NDP units" in str(units)
        assert "Policy bad failed: IndexError" in str(function)
    assert all(isinstance(one, MoetraceError) for one in run_setups(trace, setups[1:4]))
    assert all(isinstance(one, MoetraceError) for one in run_setups(trace, [setups[1]]))


def test_a_trace_is_decoded_once_for_any_number_of_setups_and_passes(monkeypatch):
    trace, model, system = shipped("mixtral-8x7b-b16.h5"), load_model("mixtral-8x7b"), load_system("edge-ndp")
    policies = [load_policy(name) for name in PRESETS]
    setups = [Setup(model=model, system=system, policies=[policy], slots=n) for policy in policies for n in range(5)]
    calls = []

    def counting(*arguments):
        calls.append(arguments)
        return demand_of(*arguments)

    monkeypatch.setattr(decoded_module, "demand_of", counting)
    run_setups(trace, setups)
    assert len(calls) == len(list(trace.blocks()))
    decoded = Decoded(trace, needs_of(policies), decoded_bytes(trace, needs_of(policies)))
    for _ in range(3):
        run_setups(decoded, setups)
    assert len(calls) == 2 * len(list(trace.blocks()))
    assert Decoded(trace, needs_of(policies), decoded_bytes(trace, needs_of(policies)) - 1)._kept is None
