"""Launches once a layer, rooflines that add up, efficiencies and the host's overhead: against sums done by hand."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.drawn_runs import replay as replay_case
from support.in_ms import model, moe_ms, policy, replay, rows, steps, system
from support.strategies import Case, cases

from moetrace.engine.state import FIRST_GROUP, GPU
from moetrace.results.replay import replay as replay_trace
from moetrace.spec import Gpu, Ndp, load_policy

RANDOM = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def near(*values):
    return pytest.approx(list(values), rel=1e-9, abs=1e-9)


def test_one_launch_for_the_residents_of_a_layer():
    """Step 1 fetches experts 0 and 1, step 2 finds them resident, step 3 has one of each kind."""
    trace = steps(rows(0, 1), rows(0, 1), rows(0, 2))
    on_demand = policy("gpu", "lru")
    each = replay(trace, system({"launch_us": 300}), on_demand)
    assert moe_ms(each) == near(8 + 1.3, 2 * 1.3, 4 + 1.3)
    once = replay(trace, system({"launch_us": 300, "launch": "layer"}), on_demand)
    assert moe_ms(once) == near(8 + 1.3, 0.3 + 2, 4 + 1.3)
    # A resident's row of work that lasts beyond the arrival: 0.3 + 0.1 * 50, then the fetched one with its own start.
    busy = steps(rows(0), rows(*[0] * 50, 1))
    assert moe_ms(replay(busy, system({"launch_us": 300, "launch": "layer"}), on_demand))[1] == pytest.approx(5.3 + 1.3)
    fetched, residents, starts = 3 * 1.3, 3 * 1.0, 2 * 0.3
    assert once.log.unit["busy_s"][GPU] * 1e3 == pytest.approx(
        3 * (1.3 + 0.3) + fetched + residents + starts
    )  # dense, head


def test_units_start_once_a_layer_each():
    trace = steps(rows(0, 1, 2), rows(0, 2), rows(1))
    for part, names in (("ndp", {"units": 2, "command_us": 300}), ("cpu", {"command_us": 300})):
        each, once = (
            replay(trace, system(**{part: names | {"launch": how}}), policy("ndp")) for how in ("expert", "layer")
        )
        most = [2, 2, 1] if part == "ndp" else [3, 2, 1]  # experts of the busiest unit
        assert moe_ms(each) == near(*(n * 2.3 for n in most))
        assert moe_ms(once) == near(*(n * 2 + 0.3 for n in most))
    units = replay(trace, system(ndp={"units": 2, "command_us": 300, "launch": "layer"}), policy("ndp"))
    assert units.log.unit["busy_s"][FIRST_GROUP:] * 1e3 == near(2 * 2 + 0.3 + 2 * 2 + 0.3, 2.3 + 2.3)
    assert units.log.step["imbalance"][0] == pytest.approx(4.3 / ((4.3 + 2.3) / 2))


def test_a_decision_sees_the_start_of_the_layer():
    """The resident takes 1 ms of the GPU, less than 2 ms at home; with a start of 1.5 ms it is home that is sooner."""
    trace = steps(rows(*[0] * 60), rows(0))
    for launch_us, moe in ((500, 1.5), (1500, 2.0)):
        on = system({"launch_us": launch_us, "launch": "layer"}, ndp={})
        for dispatch in ("balance", "optimal"):
            lane = replay(trace, on, policy(dispatch, "lru"))
            assert lane.log.step["hits"].tolist() == [0, 1]
            assert moe_ms(lane)[1] == pytest.approx(moe)


def test_arithmetic_and_reading_add_up():
    trace = steps(rows(0, 0, 0, 1))
    for how, gpu_ms, home_ms in (("max", 2, 5), ("sum", 2.4, 8)):
        on = system({"roofline": how}, ndp={"roofline": how})
        assert moe_ms(replay(trace, on, policy("ndp"))) == near(home_ms)
        assert moe_ms(replay(trace, on, policy("gpu"))) == near(8 + gpu_ms / 2 - (0.1 if how == "sum" else 0))
        assert moe_ms(replay(trace, system(cpu={"roofline": how}), policy("home"))) == near(home_ms)


def test_efficiencies_are_shares_of_the_peak():
    trace = steps(rows(0, 1, 1, 1), rows(1, 2))
    half = {"compute_efficiency": 0.5, "memory_efficiency": 0.25}
    for part, slower in (
        ("ndp", {"gmac_s": 0.5, "bandwidth_gb_s": 0.125}),
        ("cpu", {"tflops": 0.001, "bandwidth_gb_s": 0.125}),
    ):
        for dispatch in ("ndp", "balance"):
            one, other = (
                replay(trace, system(link={"bandwidth_gb_s": 0.1}, **{part: p}), policy(dispatch))
                for p in (half, slower)
            )
            assert one.log.step.tobytes() == other.log.step.tobytes()
    one = replay(trace, system(link={"efficiency": 0.5}, ndp={}), policy("gpu", "lru"))
    other = replay(trace, system(link={"bandwidth_gb_s": 0.125}, ndp={}), policy("gpu", "lru"))
    assert one.log.step.tobytes() == other.log.step.tobytes()


def test_the_hosts_overhead_is_time_of_each_layer_in_which_the_link_flows():
    layered = steps([[[0], [1]]], [[[2], [1]]], [[[0], [3]]])
    plain, slow = (replay(layered, system({"layer_overhead_us": us}, ndp={}), policy("gpu", "lru")) for us in (0, 250))
    assert slow.log.step["dense_s"] - plain.log.step["dense_s"] == near(*[0.5e-3] * 3)
    assert slow.log.step["moe_s"].tolist() == plain.log.step["moe_s"].tolist()
    assert slow.log.unit["busy_s"][GPU] == pytest.approx(plain.log.unit["busy_s"][GPU], rel=1e-12)
    assert slow.work_bound_s - plain.work_bound_s == pytest.approx(3 * 2 * 0.25e-3)
    assert slow.clairvoyant_s - plain.clairvoyant_s == pytest.approx(3 * 2 * 0.25e-3)
    ahead = policy("gpu", "lru", prefetch="oracle:2")
    moved = [
        replay(layered, system({"layer_overhead_us": us}, ndp={}), ahead).log.step["prefetch_bytes"].sum()
        for us in (0, 250)
    ]
    assert moved[0] < moved[1]


@RANDOM
@given(case=cases(), data=st.data())
def test_fewer_starts_take_no_longer_and_sums_no_less(case, data):
    """Where nothing is decided."""
    dispatch = data.draw(st.sampled_from(["ndp", "gpu"] if case.system.units else ["gpu"]))
    residency = data.draw(st.sampled_from(["none", "lru"]))
    chosen = load_policy("on-demand", {"dispatch": dispatch, "residency": residency})
    plain, once, summed = (
        replay_case(varied(case, **fields), [chosen]).lanes[0].log.step["duration_s"]
        for fields in ({}, {"launch": "layer"}, {"roofline": "sum"})
    )
    assert (once <= plain * (1 + 1e-12)).all()
    assert (summed >= plain * (1 - 1e-12)).all()


@RANDOM
@given(case=cases(max_experts=8), data=st.data())
def test_optimal_stays_the_best_of_all_within_a_layer(case, data):
    if case.system.units == 0:
        return
    fields = {
        "launch": data.draw(st.sampled_from(["expert", "layer"])),
        "roofline": data.draw(st.sampled_from(["max", "sum"])),
    }
    residency = {"residency": "static-popular", "scope": "global"}
    names = ("ndp", "gpu", "balance", "in-place", "fiddler", "optimal")
    chosen = [load_policy("on-demand", residency | {"name": name, "dispatch": name}) for name in names]
    outcome = replay_case(varied(case, **fields), chosen)
    *others, best = outcome.lanes
    for lane in others:
        assert (best.log.step["moe_s"] <= lane.log.step["moe_s"] * (1 + 1e-12)).all()
        assert lane.log.step["duration_s"].sum() >= lane.work_bound_s * (1 - 1e-9)
        busy_s = lane.log.unit["busy_s"]
        assert busy_s[GPU] <= lane.log.step["duration_s"].sum() * (1 + 1e-9)
        assert (busy_s[FIRST_GROUP:] <= lane.log.step["moe_s"].sum() * (1 + 1e-9)).all()


def varied(case: Case, **fields) -> Case:
    def changed(part: Gpu | Ndp | None):
        return part and replace(part, **fields)

    return Case(
        case.trace,
        case.model,
        replace(case.system, gpu=changed(case.system.gpu), ndp=changed(case.system.ndp)),
        case.slots,
    )


def test_a_timeline_of_such_a_machine_adds_up():
    """The slices of a step are what the GPU and the unit were busy with, starts included, overheads not."""
    trace = steps(rows(0, 1, 2), rows(0, 1, 3))
    on = system(
        {"launch_us": 300, "launch": "layer", "layer_overhead_us": 100},
        ndp={"units": 2, "command_us": 70, "launch": "layer"},
    )
    result = replay_trace(
        trace, model=model(), system=on, policies=[policy("balance", "lru")], slots=4, timeline=(0, 2)
    )
    slices = result.timeline
    for name, busy_s in result.units.filter(result.units["unit"] != "cpu").select("unit", "busy_s").rows():
        own = slices.filter(slices["unit"] == name)
        assert own["duration_s"].sum() == pytest.approx(busy_s, abs=1e-12)
