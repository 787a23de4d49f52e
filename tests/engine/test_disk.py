"""A disk below host memory: by hand, against machines without one, and as a cache against the GPU's."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.drawn_runs import replay as replay_case
from support.in_ms import model, moe_ms, policy, replay, rows, steps, system
from support.one_run import run
from support.strategies import Case, cases

from moetrace.engine.lane import Lane
from moetrace.engine.tape import KINDS
from moetrace.engine.tiers.tier_host import RULES
from moetrace.spec import Cpu, PolicySpec, UsageError, check_fits, load_policy, load_system
from moetrace.spec.choices import find
from moetrace.spec.fits import host_slots
from moetrace.spec.host_memory import Disk, host_residencies
from moetrace.spec.participants import check_policy
from moetrace.spec.system import Host
from moetrace.trace import Trace
from moetrace.trace import format as trace_format

RANDOM = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
# These dispatches do not depend on seconds, so the GPU holds the same experts with a disk as without one.
PLAIN = [
    PolicySpec(name=f"{dispatch} {residency} {scope}", dispatch=dispatch, residency=residency, scope=scope)
    for dispatch in ("gpu", "ndp", "in-place")
    for residency in ("none", "lru", "lfu", "static-layers")
    for scope in ("layer", "global")
]
DECIDING = [
    PolicySpec(
        name=f"{dispatch} {residency} {ahead}", dispatch=dispatch, residency=residency, prefetch=ahead, alpha=0.6
    )
    for dispatch in ("balance", "fiddler", "gpu", "ndp")
    for residency, ahead in (
        ("none", "none"),
        ("lru", "none"),
        ("lru", "oracle:2"),
        ("ewma", "online:2"),
        ("foresee", "foresee"),
        ("prefill", "prefill"),
    )
]
PREFETCHING = [one for one in DECIDING if one.prefetch != "none"]


def near(*values):
    return pytest.approx(list(values), rel=1e-9, abs=1e-9)


def books(lane: Lane) -> tuple[int, int, float, float]:
    """Host hits and misses, bytes read and busy seconds of the disk."""
    assert lane.tiers is not None
    return tuple(lane.tiers.host.books[name][0] for name in ("hits", "misses", "disk_bytes", "busy_s"))


def part(lane: Lane, name: str) -> np.void:
    (found,) = [part for part in lane.parts if part.name == name]
    return lane.log.unit[found.log_row]


THREE = steps(rows(0, 1, 2), rows(0, 2), rows(1, 2), rows(0, 1))


def test_three_experts_and_room_for_two_by_hand():
    """After the steps host memory has 0 and 1, 0 and 2, 2 and 1, 1 and 0: of one layer none goes for another."""
    lane = replay(THREE, system(host={"slots": 2}, disk={}), policy("gpu"))
    # Reads end at 11, 22, 33; fetches at 15, 26, 37; the last work at 38. Then 2 is read while 0 is fetched. Then 1
    # comes first in demand order, and 2, which is there, waits behind it.
    assert moe_ms(lane) == near(38, 16, 20, 20)
    assert books(lane) == (3, 6, 6e6, pytest.approx(66e-3))
    assert [part(lane, "disk")[name] for name in ("busy_s", "bytes", "experts")] == [pytest.approx(66e-3), 6e6, 6]
    assert part(lane, "link_in")["busy_s"] == pytest.approx(36e-3)  # the link's gaps do not count
    assert lane.log.step["misses"].tolist() == [3, 2, 2, 2]


def test_the_cpu_runs_each_expert_when_it_has_been_read():
    at_home = replay(THREE, system(cpu={}, host={"slots": 2}, disk={}), policy("ndp"))
    assert moe_ms(at_home) == near(35, 13, 15, 15)
    assert books(at_home) == (3, 6, 6e6, pytest.approx(66e-3))
    assert part(at_home, "cpu")["busy_s"] == pytest.approx(18e-3)
    # The start of a layer is over long before the first read ends, but not before the experts in host memory are there.
    once = replay(
        THREE, system(cpu={"command_us": 12_000, "launch": "layer"}, host={"slots": 2}, disk={}), policy("ndp")
    )
    assert moe_ms(once) == near(35, 16, 16, 16)


def test_a_decision_sees_the_reads():
    """60 rows take 60 ms at home, and 6 on the GPU behind a read of 11 and a fetch of 4; of 15 it is as long."""
    on = system(cpu={}, host={"slots": 2}, disk={})
    for count, moe in ((60, 21.0), (15, 16.5), (3, 14.0), (2, 13.0)):
        for dispatch in ("balance", "hot"):
            lane = replay(steps(rows(*[0] * count)), on, policy(dispatch))
            assert moe_ms(lane) == near(moe)
    # Once it is in host memory, three rows take 3 ms at home, and 5 on the GPU.
    assert moe_ms(replay(steps(rows(0), rows(*[0] * 3)), on, policy("balance"))) == near(13, 3)


def test_experts_on_the_gpu_are_neither_read_nor_touched():
    """The GPU keeps 0 from step 1 on, so that it is the oldest in host memory; but none goes for one of its layer."""
    on, on_demand = system(host={"slots": 2}, disk={}), policy("gpu", "lru", scope="global")
    for third, held in ((rows(2), [0, 1, 1, 0]), (rows(0, 2), [1, 0, 1, 0])):
        lane = replay(steps(rows(0), rows(0, 1), third, rows(1)), on, on_demand, slots=3)
        assert moe_ms(lane) == near(16, 16, 16, 1)
        assert books(lane)[:2] == (0, 3)
        assert lane.tiers.host.cache.resident.tolist() == held


def test_prefetches_flow_from_the_disk():
    """A disk of 5 ms an expert: it has 5 ms to spare in step 1 and reads expert 1, which passes host memory by."""
    ahead = policy("gpu", "lru", prefetch="oracle:1")
    on = system(host={"slots": 2}, disk={"bandwidth_gb_s": 0.2, "latency_us": 0})
    lane = replay(steps(rows(0), rows(1), rows(2)), on, ahead)
    # Step 1: read 5, fetched 9, done 10: the link is free for 6 ms, the disk for 5. In step 2 expert 2 has 1 ms, and 1
    # ms in the dense work of step 3; then it is read and fetched as a whole.
    assert moe_ms(lane) == near(10, 1, 10)
    assert books(lane) == (0, 2, pytest.approx(3e6 + 0.4e6), pytest.approx(17e-3))
    assert lane.log.step["prefetch_bytes"].tolist() == near(1e6, 0.2e6, 0.2e6)
    assert lane.tiers.host.cache.resident.tolist() == [1, 0, 1, 0]
    # Two reads leave a prefetch only 5 of 15 ms of the disk, though the link is free for 7.
    two = replay(steps(rows(0, 2), rows(1)), on, ahead)
    assert moe_ms(two) == near(15, 1)
    slower = system(host={"slots": 2}, disk={"bandwidth_gb_s": 0.2, "latency_us": 1000})
    assert moe_ms(replay(steps(rows(0, 2), rows(1)), slower, ahead)) == near(17, 1)


def test_a_prefetch_that_the_disk_has_no_time_for_lets_others_pass():
    """Expert 3 is not in host memory and the disk is busy to the end of the layer; expert 0 is there, and flows."""
    on = system(link={"bandwidth_gb_s": 1}, host={"slots": 1}, disk={"bandwidth_gb_s": 0.1, "latency_us": 0})
    # Step 1: read 10, fetched 11, done 12: the disk has 2 ms for expert 1, and 1 ms in step 2 before the router. Its
    # layer being past, 3 and 0 are queued then. The link is free for 11 of 12 ms, the disk for 2, all of which it gives
    # to expert 3; then expert 0, which is there, flows whole.
    ahead = policy("gpu", "lru", prefetch="oracle:1")
    lane = replay(steps(rows(0), rows(1), rows(3, 3, 0)), on, ahead, slots=0)
    assert lane.log.step["prefetch_bytes"].tolist() == near(0.2e6, 0.1e6 + 0.2e6 + 1e6, 0.1e6)


def test_a_timeline_waits_for_the_reads():
    """Step 1 of the examples above: what is fetched, run on the GPU and run at home, each when it has been read."""
    at_home = system(cpu={"command_us": 500, "launch": "layer"}, host={"slots": 2}, disk={})
    wanted = {
        "gpu": {"fetch": [(11, 15), (22, 26), (33, 37)], "expert": [(15, 16), (26, 27), (37, 38)]},
        "ndp": {"expert": [(10.5, 13), (22, 24), (33, 35)]},
    }
    for dispatch, on in (("gpu", system(host={"slots": 2}, disk={})), ("ndp", at_home)):
        lane = run(THREE, model(), on, [policy(dispatch)], slots=4, window=range(1)).lanes[0]
        slices = lane.recording.slices
        for kind, times in wanted[dispatch].items():
            found = slices[slices["kind"] == KINDS.index(kind)]
            begin_ms = 1e3 * found["start_s"] - 1  # dense takes 1 ms
            assert begin_ms == pytest.approx([begin for begin, _ in times])
            assert begin_ms + 1e3 * found["duration_s"] == pytest.approx([end for _, end in times])


@st.composite
def disk_cases(draw, max_steps: int = 10) -> Case:
    """Draw a case without units, with a CPU or without one, whose host memory holds a part of the experts."""
    case = draw(cases(max_steps=max_steps, max_experts=8, max_units=0))
    gpu, link = case.system.gpu, case.system.link
    assert link is not None
    cpu = None
    if draw(st.booleans(), label="a CPU"):
        rate = link.bandwidth_gb_s * draw(st.sampled_from([0.5, 1.5, 4.0]))
        launch = draw(st.sampled_from([None, "layer"]))
        cpu = Cpu(tflops=gpu.tflops / 4, bandwidth_gb_s=rate, command_us=draw(st.sampled_from([0, 80])), launch=launch)
    disk = Disk(
        bandwidth_gb_s=link.bandwidth_gb_s * draw(st.sampled_from([0.125, 0.7, 3.0])),
        latency_us=draw(st.sampled_from([0.0, 100.0])),
        efficiency=draw(st.sampled_from([None, 0.5])),
    )
    slots = draw(st.integers(0, case.model.all_experts), label="host slots")
    on = replace(case.system, cpu=cpu, disk=disk, host=Host(slots=slots))
    return Case(case.trace, case.model, on, case.slots)


def chosen(data, case: Case, among: list[PolicySpec]) -> list[PolicySpec]:
    able = [one for one in among if case.system.cpu is not None or one.dispatch == "gpu"]
    return data.draw(st.lists(st.sampled_from(able), min_size=1, max_size=3, unique_by=lambda one: one.name))


def on(case: Case, **changed) -> Case:
    return Case(case.trace, case.model, replace(case.system, **changed), case.slots)


@RANDOM
@given(case=disk_cases(), data=st.data())
def test_a_disk_that_takes_no_time_is_no_disk(case, data):
    policies = chosen(data, case, PLAIN)
    free = replay_case(on(case, disk=Disk(bandwidth_gb_s=1e9, latency_us=0)), policies)
    without = replay_case(on(case, disk=None, host=None), policies)
    for lane, other in zip(free.lanes, without.lanes, strict=True):
        for name in ("moe_s", "duration_s", "demand_bytes", "hits", "misses"):
            np.testing.assert_allclose(lane.log.step[name], other.log.step[name], rtol=4e-9)
        assert lane.clairvoyant_s == pytest.approx(other.clairvoyant_s, rel=1e-9)
        assert lane.work_bound_s == other.work_bound_s


@RANDOM
@given(case=disk_cases(), data=st.data())
def test_with_room_for_all_it_is_no_disk_once_all_is_read(case, data):
    policies = chosen(data, case, PLAIN)
    roomy = replay_case(on(case, host=Host(slots=case.model.all_experts)), policies)
    without = replay_case(on(case, disk=None, host=None), policies)
    seen: set[tuple[int, int]] = set()
    again = []
    for step in range(case.trace.steps):
        ids = case.trace.experts[case.trace.offset[step] : case.trace.offset[step + 1]]
        active = {(layer, e) for layer in range(ids.shape[1]) for e in np.unique(ids[:, layer]) if e >= 0}
        again.append(active <= seen)
        seen |= active
    for lane, other in zip(roomy.lanes, without.lanes, strict=True):
        np.testing.assert_allclose(lane.log.step["moe_s"][again], other.log.step["moe_s"][again], rtol=1e-9)
        assert (lane.log.step["moe_s"] >= other.log.step["moe_s"] * (1 - 1e-9)).all()
        assert books(lane)[1] <= len(seen)


@RANDOM
@given(case=disk_cases(), data=st.data())
def test_more_room_never_reads_more(case, data):
    """Least recently used is a stack: what a smaller memory holds, a larger one holds too."""
    policies = chosen(data, case, [one for one in PLAIN if one.residency == "none"])
    smaller = replay_case(case, policies)
    larger = data.draw(st.integers(case.system.host.slots, case.model.all_experts))
    for lane, other in zip(smaller.lanes, replay_case(on(case, host=Host(slots=larger)), policies).lanes, strict=True):
        assert books(other)[1] <= books(lane)[1]
        assert books(other)[2] <= books(lane)[2]
        assert (other.log.step["moe_s"] <= lane.log.step["moe_s"] * (1 + 1e-12)).all()


@RANDOM
@given(case=disk_cases(), residency=st.sampled_from(host_residencies()), data=st.data())
def test_host_memory_hits_as_the_gpu_with_the_same_slots(case, residency, data):
    """Where the GPU holds nothing, every demand reaches host memory."""
    numbers = {"half_life": 3, "alpha": 0.6, "most_count": 2.5, "evicted_share": 0.25}
    record = find("residency", residency)
    given = {name: value for name, value in numbers.items() if name in record.parameters}
    dispatch = "gpu" if case.system.cpu is None else data.draw(st.sampled_from(["ndp", "gpu", "balance"]))
    policy = load_policy(PolicySpec(name="p", dispatch=dispatch), {"host_residency": residency} | given)
    (lane,) = replay_case(case, [policy]).lanes
    cached = load_policy(PolicySpec(name="twin"), {"residency": residency, "scope": "global"} | given)
    twin = Case(case.trace, case.model, replace(case.system, disk=None, host=None), case.system.host.slots)
    (other,) = replay_case(twin, [cached]).lanes
    assert books(lane)[:2] == (other.log.step["hits"].sum(), other.log.step["misses"].sum())
    assert books(lane)[2] == pytest.approx(other.log.step["demand_bytes"].sum())
    assert lane.tiers.host.cache.resident.tolist() == other.state.cache.resident.tolist()


@RANDOM
@given(case=disk_cases(), data=st.data())
def test_who_runs_what_changes_no_read_and_deciding_never_loses(case, data):
    if case.system.cpu is None:
        case = on(case, cpu=Cpu(tflops=case.system.gpu.tflops / 4, bandwidth_gb_s=1.0, command_us=20))
    each = [
        PolicySpec(name=name, dispatch=name, residency="none") for name in ("ndp", "gpu", "balance", "hot", "fiddler")
    ]
    lanes = replay_case(case, each).lanes
    assert len({books(lane) for lane in lanes}) == 1
    at_home, _, balanced, hottest, _ = (lane.log.step["moe_s"] for lane in lanes)
    assert (balanced <= at_home * (1 + 1e-9)).all()
    assert (hottest <= at_home * (1 + 1e-9)).all()
    assert all(lane.clairvoyant_s <= lane.duration_s.sum() * (1 + 1e-9) for lane in lanes[:2])


@RANDOM
@given(case=disk_cases(), jobs=st.integers(1, 2), data=st.data())
def test_blocks_and_jobs_change_nothing(case, jobs, data):
    policies = chosen(data, case, DECIDING)
    policies = [replace(one, host_residency=data.draw(st.sampled_from(host_residencies()))) for one in policies]
    whole = replay_case(case, policies)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_format, "BLOCK_BYTES", 1)  # one step a block
        patch.setattr("moetrace.engine.decoded.BLOCK_BYTES", 1)  # with threads, too
        in_steps = replay_case(case, policies, jobs=jobs)
    for lane, other in zip(whole.lanes, in_steps.lanes, strict=True):
        assert all(getattr(lane.log, one).tobytes() == getattr(other.log, one).tobytes() for one in ("step", "layer"))
        assert lane.log.unit.tobytes() == other.log.unit.tobytes()
        assert books(lane) == books(other)


@RANDOM
@given(case=disk_cases(max_steps=16), data=st.data())
def test_the_disk_never_works_longer_than_the_replay(case, data):
    for lane in replay_case(case, chosen(data, case, PREFETCHING)).lanes:
        _, misses, disk_bytes, busy_s = books(lane)
        assert busy_s <= lane.duration_s.sum() * (1 + 1e-9)
        demanded = disk_bytes / case.system.disk.bytes_s + misses * case.system.disk.latency_s
        assert busy_s >= demanded * (1 - 1e-9)  # a prefetch flows no faster than the disk reads
        assert disk_bytes <= lane.log.step["prefetch_bytes"].sum() + misses * 3e6


def test_every_residency_of_host_memory_has_a_rule():
    assert {find("residency", name).hook for name in host_residencies()} == {*RULES}
    assert {"lru", "fifo", "sieve", "lfu", "lfuda", "lfu-window", "ewma"} <= {*host_residencies()}


def test_how_much_host_memory_holds():
    of, sizes = model(experts=4), np.array([[1e6, 2e6, 1e6, 1e6]])
    disk = {"bandwidth_gb_s": 1, "latency_us": 0}
    for host, slots in (({"memory_gb": 0.0045}, 2), ({"memory_gb": 0.005}, 4), ({"slots": 3}, 3), ({"slots": 9}, 4)):
        assert host_slots(of, system(host=host, disk=disk), sizes) == slots
    assert host_slots(of, system(disk=disk), sizes) == 4
    check_fits(of, system(host={"memory_gb": 0.001}, disk=disk), sizes)
    with pytest.raises(UsageError, match=r"set system.host.memory_gb=1, add a \[disk\] that holds the others, or"):
        check_fits(of, system(host={"memory_gb": 0.001}), sizes)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"ndp": {}, "disk": {}},
            r"^system by-hand: \[disk\] lies below host memory, but with \[ndp\] the experts live",
        ),
        ({"cpu": {"chunks": 2}, "disk": {}}, r"cpu.chunks does not go with \[disk\], as experts start when they have"),
        ({"host": {"slots": 2}}, r"host.slots applies to systems with a \[disk\] only; remove it or add \[disk\]\.$"),
    ],
)
def test_systems_that_cannot_have_a_disk_are_refused(parts, message):
    with pytest.raises(UsageError, match=message):
        system(**parts)


def test_wrong_numbers_of_a_disk():
    parts = {"disk.bandwidth_gb_s": 3.0, "disk.latency_us": 10.0}
    for name, value in (
        ("disk.bandwidth_gb_s", 0),
        ("disk.latency_us", -1),
        ("disk.efficiency", 1.5),
        ("host.slots", -1),
    ):
        with pytest.raises(UsageError, match=f"{name} wants .*, got {value}"):
            load_system("rtx4090-offload", parts | {name: value})


def test_one_memory_has_its_disk_as_a_link():
    with pytest.raises(UsageError, match=r"as in a phone or a Mac, describe the disk as \[link\] and remove \[disk\]"):
        load_system(replace(system(disk={}), link=None))


def test_policies_that_go_with_a_disk():
    with pytest.raises(UsageError, match=r"host_residency wants one of lru, fifo, sieve, .* got 'belady'"):
        load_policy("on-demand", {"host_residency": "belady"})
    with pytest.raises(
        UsageError, match=r"host_residency applies to systems with a \[disk\] only, and system by-hand has"
    ):
        check_policy(load_policy("on-demand", {"host_residency": "lfu"}), system())
    with pytest.raises(UsageError, match=r'reads them from a \[disk\]; use dispatch = "balance"'):
        check_policy(policy("split", placement="tp"), system(cpu={}, disk={}))
    assert load_policy("on-demand", {"host_residency": "lfu", "half_life": 5}).half_life == 5


def test_a_cold_start_leaves_host_memory_as_it_is():
    """Requests in turn, each of which demands expert 0: the GPU fetches it again, and it is read once."""
    trace = Trace.from_arrays(
        np.zeros((3, 1, 1), np.uint8), num_experts=4, steps=np.ones(3, np.int64), request=np.arange(3)
    )
    lane = replay(trace, system(disk={}), policy("gpu", "lru", scope="request"))
    assert moe_ms(lane) == near(16, 5, 5)
