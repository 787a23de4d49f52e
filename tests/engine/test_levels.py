"""Frequency levels under a deadline: the kernels against an oracle that times each layer again, and what must hold."""

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.drawn_machines import MachineCase, machine_cases, machine_policies, plain_policy
from support.drawn_runs import replay
from support.drawn_tiers import own_dispatch, tier_cases, tier_policies
from support.oracle_layer import machine_of
from support.oracle_levels import Level, RecordedReplay, RecordedTale, leveled
from support.plain_python import as_plain_python
from support.strategies import Case
from support.tier_runs import with_own_dispatch
from support.tiers_oracle import from_specs

import moetrace as mt
from moetrace.engine.folding import StepStore
from moetrace.engine.levels import power_s
from moetrace.engine.setup import Setup
from moetrace.results.frames import busy_of
from moetrace.spec import PolicySpec, System, load_policy

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
TOP = {"frequency": 1.0, "voltage": 1.0}


@st.composite
def tables(draw):
    """Draw levels by falling frequency, whose voltage never rises."""
    frequencies = sorted(draw(st.sets(st.sampled_from([0.1, 0.25, 0.4, 0.5, 0.8, 0.95]), min_size=1, max_size=4)))
    voltages = sorted(draw(st.lists(st.floats(0.3, 1.0), min_size=len(frequencies), max_size=len(frequencies))))
    lower = [{"frequency": f, "voltage": v} for f, v in zip(frequencies, voltages, strict=True)]
    return [TOP, *lower[::-1]]


def run_of(case, fields, levels, deadline_ms, scales=False, **options):
    """Replay a case on a GPU with levels, or without for None."""
    system = case.system
    if levels is not None:
        system = system | {"gpu": system["gpu"] | {"levels": levels, "memory_scales": scales}}
    spec = load_policy(msgspec.convert({"name": "drawn", "deadline_ms": deadline_ms} | fields, PolicySpec))
    return replay(Case(case.trace, case.model, msgspec.convert(system, System), case.slots), [spec], **options)


def deadlines(durations_s):
    """Draw a deadline in ms around the steps' own seconds; some of them are a step's to the bit."""
    scale = st.sampled_from([0.3, 0.999, 1.0, 1.5, 4.0, 30.0])
    return st.tuples(st.sampled_from(sorted(durations_s)), scale).map(
        lambda one: max(float(1e3 * one[0] * one[1]), 1e-6)
    )


def check(lane, expected):
    for name in ("duration_s", "dense_s", "moe_s", "head_s"):
        np.testing.assert_allclose(lane.log.step[name], getattr(expected, name), rtol=1e-9, err_msg=name)
    if lane.aside.levels is None:
        return
    assert lane.level_steps["level"].tolist() == expected.level
    np.testing.assert_allclose(lane.level_steps["top_s"], expected.top_s, rtol=1e-9)
    np.testing.assert_allclose(lane.log.layer["moe_s"], expected.layer_moe_s, rtol=1e-9, atol=1e-18)
    np.testing.assert_allclose(lane.log.layer["dense_s"].sum(), sum(expected.dense_s), rtol=1e-9)
    np.testing.assert_allclose(busy_of(lane)["gpu"], sum(expected.gpu_busy_s), rtol=1e-9)


@QUICK
@given(case=machine_cases(max_steps=6), data=st.data())
def test_levels_are_the_oracles(case, data):
    fields = data.draw(machine_policies(case), label="policy")
    levels, scales = data.draw(tables()), data.draw(st.booleans(), label="memory scales")
    plain = plain_policy(fields)
    machine = machine_of(case.trace, case.model, case.plain, case.slots, plain.dispatch)
    told = RecordedReplay(case.trace, machine, plain, None, None)
    told.run()
    deadline_ms = data.draw(deadlines([step["duration_s"] for step in told.steps]), label="deadline")
    expected = leveled(
        told.retimes,
        told.machine,
        [Level(**level) for level in levels],
        deadline_ms / 1e3,
        memory_scales=scales,
        wait_s=[step["wait_s"] for step in told.steps],
    )
    lane = run_of(case, fields, levels, deadline_ms, scales).lanes[0]
    check(lane, expected)
    above_j = expected.above_idle_j([Level(**level) for level in levels], 300.0, 20.0)
    assert 280.0 * power_s(lane.aside.levels, busy_of(lane)["gpu"]) == pytest.approx(above_j, rel=1e-9)
    np.testing.assert_allclose(lane.clairvoyant_s, told.clairvoyant_s, rtol=1e-9)


def written(case, fields, folder):
    """Return system and policy with the files that their TOML would name."""
    system, fields = case.system | {}, with_own_dispatch(fields, folder)
    if system["link"].get("rates"):
        (folder / "rates.csv").write_text("".join(f"{at!r},{rate!r}\n" for at, rate in system["link"]["rates"]))
        system["link"] = system["link"] | {"rates": str(folder / "rates.csv")}
    return MachineCase(case.trace, case.model, system, case.slots), fields


@as_plain_python
@QUICK
@given(case=tier_cases(max_steps=5), data=st.data())
def test_levels_with_tiers_are_the_oracles(case, data, tmp_path_factory):
    """With losses, rates over time and a disk, too: what is drawn, and when, is as at the top."""
    case.system.pop("remote", None)
    # Each combination of system parts is compiled separately: there are few, or the test takes minutes.
    if "disk" in case.system:
        case.system["cpu"].pop("chunks", None)
        for name in ("loss", "mtu_bytes", "rto_ms", "loss_mode", "seed", "rates"):
            case.system["link"].pop(name, None)
    fields = data.draw(tier_policies(case, placements=("ep", "ep-block", "tp", "striped")), label="policy")
    levels, scales = data.draw(tables()), data.draw(st.booleans(), label="memory scales")
    own = own_dispatch(fields)
    specs = case.trace, case.model, case.plain, SimpleNamespace(**fields), case.slots
    machine, plain = from_specs(*specs, dispatch=own)
    tale = RecordedTale(case.trace, machine, plain, own, False)
    told = tale.run()
    deadline_ms = data.draw(deadlines([step.duration_s for step in told.steps]), label="deadline")
    expected = leveled(
        tale.retimes,
        machine,
        [Level(**level) for level in levels],
        deadline_ms / 1e3,
        memory_scales=scales,
        wait_s=[step.wait_s for step in told.steps],
        evict_s=[step.evict_s for step in told.steps],
    )
    lane = run_of(*written(case, fields, tmp_path_factory.mktemp("drawn")), levels, deadline_ms, scales).lanes[0]
    check(lane, expected)
    for name in ("hits", "misses", "late"):
        assert lane.log.step[name].tolist() == told.per_step(name).astype(int).tolist(), name
    np.testing.assert_allclose(lane.log.step["prefetch_bytes"], told.per_step("prefetch_bytes"), rtol=1e-9, atol=1e-15)
    if lane.losses is not None:
        resent = lane.losses.resent_out_bytes, lane.losses.resent_in_bytes
        np.testing.assert_allclose(resent, (told.resent_out_bytes, told.resent_in_bytes), rtol=1e-9, atol=1e-15)
    if lane.tiers is not None and lane.tiers.host is not None:
        np.testing.assert_allclose(lane.tiers.host.books["busy_s"][0], told.disk_busy_s, rtol=1e-9, atol=1e-15)


@QUICK
@given(case=machine_cases(max_steps=5), data=st.data())
def test_one_level_is_no_level_to_the_bit(case, data):
    fields = data.draw(machine_policies(case), label="policy")
    plain = run_of(case, fields, None, None).lanes[0]
    deadline_ms = data.draw(deadlines(plain.duration_s.tolist()), label="deadline")
    never_ms = float(plain.duration_s.min())  # a thousandth of the fastest step: all run at the top
    for levels, given_ms in (([TOP], deadline_ms), ([TOP, {"frequency": 0.5, "voltage": 0.7}], never_ms)):
        lane = run_of(case, fields, levels, given_ms).lanes[0]
        assert (lane.aside.levels is None) == (len(levels) == 1)
        assert lane.log.step.tobytes() == plain.log.step.tobytes()
        for name in plain.log._fields[1:]:
            assert getattr(lane.log, name).tobytes() == getattr(plain.log, name).tobytes(), name
        assert power_s(lane.aside.levels, busy_of(lane)["gpu"]) == busy_of(plain)["gpu"]
        assert lane.clairvoyant_s == pytest.approx(plain.clairvoyant_s, rel=1e-12)


@QUICK
@given(case=machine_cases(max_steps=6), data=st.data())
def test_a_longer_deadline(case, data):
    """It never slows its steps down by more than it allows, never raises the GPU's energy above idle, nor lateness."""
    fields = data.draw(machine_policies(case), label="policy")
    levels, scales = data.draw(tables()), data.draw(st.booleans(), label="memory scales")
    top = run_of(case, fields, None, None).lanes[0]
    drawn = data.draw(st.lists(deadlines(top.duration_s.tolist()), min_size=2, max_size=4, unique=True))
    before = None
    for deadline_ms in sorted(drawn):
        lane = run_of(case, fields, levels, deadline_ms, scales).lanes[0]
        in_time = lane.duration_s * (1 - 1e-12) <= deadline_ms / 1e3
        assert (lane.level_steps["level"][~in_time] == 0).all()
        assert (lane.duration_s >= top.duration_s * (1 - 1e-9)).all()
        found = in_time.sum(), lane.level_steps["level"].copy(), power_s(lane.aside.levels, busy_of(lane)["gpu"])
        if before is not None:
            assert found[0] >= before[0] and (found[1] >= before[1]).all()
            assert found[2] <= before[2] * (1 + 1e-9)
        before = found
        # Decisions, moves and the experts that run elsewhere are as at the top.
        for name in ("hits", "misses", "late", "demand_bytes", "prefetch_bytes", "wait_s"):
            assert lane.log.step[name].tolist() == top.log.step[name].tolist(), name
        for column in ("rows", "bytes", "experts"):
            assert lane.log.unit[column].tolist() == top.log.unit[column].tolist(), column
        assert lane.log.unit["busy_s"][1:].tolist() == top.log.unit["busy_s"][1:].tolist()


def test_folding_threads_and_cuts_change_nothing(monkeypatch):
    """A sweep's cell, four threads and a recorded window have the figures of a plain replay, to the bit."""
    trace = mt.generate_trace("tiny-olmoe", requests=6, prompt=16, output=24, batch=3)
    levels = [TOP, {"frequency": 0.6, "voltage": 0.8}, {"frequency": 0.25, "voltage": 0.5}]
    changed = {"gpu.levels": levels, "gpu.memory_scales": True}
    system = mt.load_system("edge-ndp", changed | {"energy.gpu.idle_w": 20, "energy.gpu.active_w": 300})
    policies = [mt.load_policy(name, {"deadline_ms": 3.5}) for name in ("monde", "edge-ndp", "on-demand")]
    plain = mt.replay(trace, system=system, policies=policies, slots=48)
    assert set(plain.steps["level"]) == {0, 1, 2}
    for options in ({"jobs": 3}, {"timeline": (5, 9)}):
        other = mt.replay(trace, system=system, policies=policies, slots=48, **options)
        assert other.to_dict() == plain.to_dict()
        assert other.steps.equals(plain.steps) and other.layers.equals(plain.layers)
    from moetrace.engine.run import run_setups
    from moetrace.results.summary import policy_figures

    setup = Setup(model=plain.run.model, system=system, policies=policies, slots=48)
    monkeypatch.setattr("moetrace.trace.format.BLOCK_BYTES", 2000)  # some steps a block
    cut = mt.replay(trace, system=system, policies=policies, slots=48)
    assert cut.to_dict() == plain.to_dict() and cut.steps.equals(plain.steps)
    with StepStore(0) as store:
        (folded,) = run_setups(trace, [setup], store=store)
        assert policy_figures(folded) == policy_figures(plain.run)


@pytest.mark.parametrize("dispatch", ["balance", "gpu"])
def test_prefetches_from_a_disk_flow_as_at_the_top(dispatch):
    """What a layer leaves of the disk is what it leaves at the top, however long it takes at another level."""
    trace = mt.generate_trace("tiny-olmoe", requests=3, prompt=8, output=12, batch=2)
    policy = mt.PolicySpec(name="ahead", dispatch=dispatch, residency="lru", prefetch="oracle:2", deadline_ms=1e6)
    changes = {"host.slots": 40, "disk.bandwidth_gb_s": 30}
    levels = {"gpu.levels": [TOP, {"frequency": 0.1, "voltage": 0.5}], "gpu.memory_scales": True}
    plain, slow = (
        mt.replay(trace, system=mt.load_system("rtx4090-nvme", changes | more), policies=policy, slots=24)
        for more in ({}, levels)
    )
    assert (slow.steps["level"] == 1).all() and plain.steps["prefetch_bytes"].sum() > 0
    assert (slow.steps["duration_s"] > plain.steps["duration_s"]).any()
    names = ["hits", "misses", "late", "demand_bytes", "prefetch_bytes"]
    assert slow.steps.select(names).equals(plain.steps.select(names))
    assert slow.summary["disk_bytes"].to_list() == plain.summary["disk_bytes"].to_list()
