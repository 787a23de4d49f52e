"""What lanes of a pass have in common is made once; what differs, or may remember, is not shared."""

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

import moetrace as mt
from moetrace.engine import bounds, in_common
from moetrace.engine.folding import StepStore
from moetrace.engine.lane import Lane
from moetrace.engine.replay import Batch
from moetrace.engine.run import Run, run_setups
from moetrace.engine.setup import Setup
from moetrace.generators import generate_trace
from moetrace.spec import PolicySpec, load_model, load_policy, load_system

MODEL, SYSTEM = load_model("tiny-olmoe"), load_system("edge-ndp")


@pytest.fixture(scope="module")
def trace() -> mt.Trace:
    return generate_trace(MODEL, requests=3, prompt=5, output=6, batch=2)


def passes(trace: mt.Trace, setups: list[Setup], monkeypatch) -> tuple[list[Run], dict[str, int]]:
    """The runs, and how often each yardstick went over the trace's only block."""
    count = dict.fromkeys(("work_bound_s", "clairvoyant_s"), 0)
    with monkeypatch.context() as patch:
        for name in count:
            kernel = getattr(bounds, name)

            def counted(*arguments, name=name, kernel=kernel):
                count[name] += 1
                return kernel(*arguments)

            if name == "clairvoyant_s":
                patch.setattr(in_common, "clairvoyant", lambda tiers, counted=counted: counted)
            else:
                patch.setattr(in_common, name, counted)
        runs = run_setups(trace, setups, jobs=2)
    return [run for run in runs if isinstance(run, Run)], count


def setup(policy, slots: int = 24, system=SYSTEM, **hooks) -> Setup:
    policy = load_policy(policy) if isinstance(policy, str) else policy
    return Setup(model=MODEL, system=system, policies=[policy], slots=slots, hooks=hooks)


def test_policies_of_one_dispatch_share_a_clairvoyant_run_and_all_share_a_bound(trace, monkeypatch):
    edge = load_policy("edge-ndp")
    others = [msgspec.structs.replace(edge, name=name, residency=name, prefetch="none") for name in ("lru", "fifo")]
    runs, count = passes(trace, [setup(policy) for policy in (edge, *others)], monkeypatch)
    assert (len(runs), count) == (3, {"work_bound_s": 1, "clairvoyant_s": 1})
    assert len({(run.lanes[0].clairvoyant_s, run.lanes[0].work_bound_s) for run in runs}) == 1
    assert len({float(run.lanes[0].duration_s.sum()) for run in runs}) > 1
    alone, _ = passes(trace, [setup(others[1])], monkeypatch)
    assert alone[0].lanes[0].clairvoyant_s == runs[2].lanes[0].clairvoyant_s


def test_slots_and_machines_have_yardsticks_of_their_own(trace, monkeypatch):
    faster = load_system("edge-ndp", {"gpu.tflops": 500})
    setups = [setup("edge-ndp"), setup("edge-ndp", slots=48), setup("edge-ndp", system=faster)]
    runs, count = passes(trace, setups, monkeypatch)
    assert (len(runs), count) == (3, {"work_bound_s": 2, "clairvoyant_s": 3})
    for one, own in zip(runs, setups, strict=True):
        (alone,), _ = passes(trace, [own], monkeypatch)
        assert one.lanes[0].clairvoyant_s == alone.lanes[0].clairvoyant_s
        assert one.lanes[0].work_bound_s == alone.lanes[0].work_bound_s


def test_a_user_s_dispatch_shares_nothing(trace, monkeypatch):
    @mt.policy
    def residents_only(state, view, layer, load, plan):
        for i in range(load.size):
            plan[i] = view.active[i].resident

    own = msgspec.structs.replace(load_policy("on-demand"), name="own", dispatch="own")
    _, count = passes(trace, [setup(own, own=residents_only)] * 2, monkeypatch)
    assert count == {"work_bound_s": 1, "clairvoyant_s": 2}


@pytest.mark.parametrize("jobs", [1, 2])
def test_lanes_that_leave_out_other_experts_share_no_counts_of_prompts(monkeypatch, jobs):
    """Counts of prompts that go on in the next block pass from lane to lane."""
    plain = PolicySpec(name="plain", dispatch="balance", residency="prefill", prefetch="prefill")
    policies = [plain, replace(plain, name="some", remote=0.5), replace(plain, name="all", remote=1.0)]
    liked = np.random.default_rng(0).random((120, 6, 32)) + np.arange(32) / 64
    trace = mt.Trace.from_arrays(
        np.argsort(liked)[..., -4:],
        num_experts=32,
        steps=np.full(60, 2),
        phase=np.arange(60) % 10 // 8,  # eight steps of a prompt, then two of its answer
        request=np.arange(120) // 20,
    )
    system = load_system("remoe")
    setups = [Setup(model=MODEL, system=system, policies=[spec], slots=60, ignore_capacity=True) for spec in policies]
    monkeypatch.setattr("moetrace.trace.format.BLOCK_BYTES", 50)
    monkeypatch.setattr("moetrace.engine.decoded.BLOCK_BYTES", 50)

    def seconds(some: list[Setup], jobs: int) -> list[float]:
        with StepStore(1 << 24) as store:
            runs = run_setups(trace, some, jobs=jobs, store=store)
            return [float(run.lanes[0].duration_s.sum()) for run in runs if isinstance(run, Run)]

    alone = [second for setup in setups for second in seconds([setup], 1)]
    assert seconds(setups, jobs) == alone and len(alone) == len(policies)


@pytest.mark.parametrize("jobs", [1, 3])
def test_progress_tells_of_rows_that_all_lanes_are_done_with(trace, monkeypatch, jobs):
    monkeypatch.setattr("moetrace.trace.format.BLOCK_BYTES", 50)
    monkeypatch.setattr("moetrace.engine.decoded.BLOCK_BYTES", 50)
    policies = [load_policy(name) for name in ("edge-ndp", "monde")]
    done = dict.fromkeys(("edge-ndp", "monde"), 0)
    advance = Lane.advance

    def noted(lane: Lane, batch: Batch) -> None:
        advance(lane, batch)
        done[lane.policy.name] += int(batch.steps.rows.sum())

    monkeypatch.setattr(Lane, "advance", noted)
    told: list[int] = []

    def progress(rows: int) -> None:
        told.append(rows)
        assert sum(told) <= min(done.values())

    run_setups(trace, [Setup(model=MODEL, system=SYSTEM, policies=policies, slots=24)], jobs=jobs, progress=progress)
    assert sum(told) == trace.rows and len(told) > 3
