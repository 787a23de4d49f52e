"""What lanes of a pass have in common is made once; what differs, or may remember, is not shared."""

import msgspec
import pytest

import moetrace as mt
from moetrace.engine import bounds, in_common
from moetrace.engine.run import Run, run_setups
from moetrace.engine.setup import Setup
from moetrace.generators import generate_trace
from moetrace.spec import load_model, load_policy, load_system

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
