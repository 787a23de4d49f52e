"""A CPU as the home of experts: a tier of one unit by another name, and when it takes part."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.drawn_runs import replay as replay_case
from support.in_ms import model, moe_ms, policy, replay, rows, steps, system
from support.one_run import run
from support.strategies import Case, all_policies, cases, write_loads, write_static

from moetrace.results.replay import replay as replay_trace
from moetrace.spec import Cpu, System, UsageError, check_fits, load_model, load_policy, load_system
from moetrace.spec.participants import check_policy
from moetrace.spec.policy import PolicySpec

RANDOM = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
MORE = [
    PolicySpec(
        name=f"{dispatch} {residency}", dispatch=dispatch, residency=residency, scope="global", gpu_rows=gpu_rows
    )
    for dispatch, gpu_rows in (("home", None), ("in-place", 3), ("in-place", None), ("fiddler", None))
    for residency in ("none", "lru", "static-popular", "static-layers")
]


def _runs(policy: PolicySpec, system: System) -> bool:
    """Whether a policy goes with a system: a share of an expert does not with every kind of start."""
    try:
        check_policy(policy, system)
    except UsageError:
        return False
    return True


@RANDOM
@given(case=cases(max_units=1), data=st.data())
def test_it_equals_one_unit_to_the_last_bit(case, data, tmp_path_factory):
    """But for the names of the parts, and the imbalance of units, of which there are none."""
    folder = tmp_path_factory.mktemp("p")
    units, cpu = twins(case, data)
    listed = all_policies(1, write_loads(folder / "loads.csv", case), write_static(folder / "static.csv", case)) + MORE
    listed = [one for one in listed if one.dispatch != "split" or all(_runs(one, each.system) for each in (units, cpu))]
    # With dispatch `gpu` foresee still reads how fast units are, but no CPU.
    listed = [one for one in listed if (one.dispatch, one.residency) != ("gpu", "foresee")]
    chosen = data.draw(st.lists(st.sampled_from(listed), min_size=1, max_size=6, unique_by=lambda one: one.name))
    one, other = replay_case(units, chosen), replay_case(cpu, chosen)
    assert one.slots == other.slots
    for lane, twin in zip(one.lanes, other.lanes, strict=True):
        takes_part = lane.policy.dispatch != "gpu"  # without a part in it, the CPU bounds nothing
        assert lane.work_bound_s == twin.work_bound_s if takes_part else lane.work_bound_s <= twin.work_bound_s
        assert lane.clairvoyant_s == twin.clairvoyant_s
        for part in ("unit", "tally", "fallbacks"):
            assert getattr(lane.log, part).tobytes() == getattr(twin.log, part).tobytes(), part
        for part in ("step", "layer"):
            mine, theirs = getattr(lane.log, part), getattr(twin.log, part)
            for name in mine.dtype.names:
                if not name.startswith("imbalance"):
                    assert mine[name].tobytes() == theirs[name].tobytes(), name
        assert np.isnan(twin.log.step["imbalance"]).all() and not twin.log.layer["imbalance_count"].any()
        assert [part.name for part in twin.parts] == ["gpu", "cpu", "link_in", "link_out"]
        log_rows = {part.name: part.log_row for part in lane.parts}
        of_cpu = next(part for part in twin.parts if part.name == "cpu")
        assert of_cpu.log_row == (log_rows["ndp0"] if takes_part else -1)


def twins(case: Case, data) -> tuple[Case, Case]:
    """Two machines of equal rates: one unit, and a CPU; the link is no faster than the CPU's memory."""
    ndp = load_system("edge-ndp").ndp if case.system.ndp is None else case.system.ndp
    assert ndp is not None
    sixteenths = data.draw(st.integers(9, 560), label="2^-16 TFLOPS")  # exact in both units
    fields = {
        name: data.draw(st.sampled_from(values), label=name)
        for name, values in {
            "compute_efficiency": (None, 0.5),
            "memory_efficiency": (None, 0.25),
            "launch": (None, "layer"),
            "roofline": (None, "sum"),
        }.items()
    }
    ndp = replace(ndp, units=1, gmac_s=sixteenths * 500 / 65536, **fields)
    cpu = Cpu(tflops=sixteenths / 65536, bandwidth_gb_s=ndp.bandwidth_gb_s, command_us=ndp.command_us, **fields)
    assert case.system.link is not None
    link = replace(case.system.link, bandwidth_gb_s=min(case.system.link.bandwidth_gb_s, cpu.bandwidth_gb_s))
    base = replace(case.system, link=link)
    machines = replace(base, ndp=ndp), replace(base, ndp=None, cpu=cpu)
    one, other = (Case(case.trace, case.model, machine, case.slots) for machine in machines)
    return one, other


def test_host_memory_feeds_the_link():
    """0.25 GB/s over the link, but 0.1 out of host memory, whatever share of it the CPU reaches itself."""
    trace = steps(rows(0), rows(1))
    slow = {"bandwidth_gb_s": 0.1, "memory_efficiency": 0.5}
    assert moe_ms(replay(trace, system(cpu=slow), policy("balance"))) == pytest.approx([11, 11])  # at home it takes 20
    assert moe_ms(replay(trace, system(cpu=slow), policy("gpu"))) == pytest.approx([5, 5])
    assert moe_ms(replay(trace, system(cpu=slow, link={"host_read": True}), policy("gpu"))) == pytest.approx([11, 11])
    assert moe_ms(replay(trace, system(cpu=slow, ndp={"bandwidth_gb_s": 0.01}), policy("balance"))) == pytest.approx(
        [5, 5]
    )


def test_who_takes_part():
    trace = steps(rows(0, 1), rows(1))
    both = system(ndp={}, cpu={})
    bounds = {}
    for on in (both, system(ndp={}), system(cpu={})):
        for dispatch in ("ndp", "home", "balance", "gpu"):
            bounds[dispatch, on.ndp is not None, on.cpu is not None] = replay(trace, on, policy(dispatch)).work_bound_s
    assert bounds["home", True, True] < bounds["home", True, False] == bounds["ndp", True, True]
    assert bounds["balance", True, True] == bounds["balance", True, False] == bounds["gpu", True, True]
    assert bounds["balance", False, True] == bounds["balance", True, False] < bounds["gpu", False, True]
    result = replay_trace(
        trace, model=model(), system=system(cpu={}), policies=[policy("gpu"), policy("balance")], slots=2
    )
    shares = result.summary["utilization_cpu"].to_list()
    assert shares[0] == 0 and shares[1] > 0
    assert result.summary["imbalance_mean"].to_list() == [None, None]
    assert result.to_dict()["policies"][1]["utilization"]["ndp"] == []
    assert result.units["unit"].to_list()[:4] == ["gpu", "cpu", "link_in", "link_out"]
    assert result.summary["work_bound_s"][0] > result.summary["work_bound_s"][1]
    assert result.warnings == (
        "the CPU of by-hand takes no part in policy gpu: dispatch gpu runs every expert on the GPU.",
    )
    beside = replay_trace(trace, model=model(), system=both, policies=[policy("home"), policy("balance")], slots=2)
    assert beside.warnings == (
        "the CPU of by-hand takes no part in policy balance: beside NDP units, dispatch balance uses these.",
    )


def test_a_cpu_without_a_link_runs_nothing():
    jetson = load_system("jetson-orin", {"cpu.tflops": 1, "cpu.bandwidth_gb_s": 50, "cpu.command_us": 0})
    trace = steps(rows(0))
    lane = run(trace, model(), jetson, [load_policy("on-demand")])
    assert lane.warnings == [
        "the CPU of jetson-orin takes no part in policy on-demand: without [link] every expert is in GPU memory."
    ]
    with pytest.raises(UsageError, match=r"dispatch balance needs NDP units or a CPU .* jetson-orin has no link to"):
        run(trace, model(), jetson, [load_policy("hybrid")])
    with pytest.raises(UsageError, match=r"dispatch balance needs NDP units or .* rtx4090-offload has none; only"):
        run(trace, model(), load_system("rtx4090-offload"), [load_policy("hybrid")])


def test_host_memory_holds_the_experts_or_they_are_refused():
    mixtral = load_model("mixtral-8x7b")
    for parts in ({}, {"cpu.tflops": 1, "cpu.bandwidth_gb_s": 50, "cpu.command_us": 0}):
        small = load_system("rtx4090-offload", parts | {"host.memory_gb": 64})
        with pytest.raises(UsageError, match=r"90\.2 GB .* 64 GB of host memory .*host\.memory_gb=91, .*ignore-cap"):
            check_fits(mixtral, small, mixtral.expert_bytes())
        check_fits(mixtral, small, mixtral.expert_bytes(), ignore_capacity=True)
        check_fits(mixtral, small, mixtral.expert_bytes() / 2)
    check_fits(mixtral, load_system("edge-ndp", {"host.memory_gb": 1}), mixtral.expert_bytes())
