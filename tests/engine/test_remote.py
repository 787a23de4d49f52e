"""Remote functions: Remoe's equations by hand, its LPT beside the optimum, and what a policy without them does."""

from itertools import product
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.drawn_runs import replay as replay_case
from support.in_ms import CPU, GPU, LINK, NDP, model, moe_ms, policy, replay, rows, steps
from support.one_run import run
from support.strategies import Case, cases

from moetrace.engine.demand import Demand
from moetrace.engine.lane import Lane
from moetrace.engine.state import records
from moetrace.engine.tiers.tier_remote import (
    FUNCTION,
    REMOTE_BOOKS,
    RemotePlan,
    RemoteScratch,
    call_functions,
    remote_experts,
)
from moetrace.results.replay import replay as replay_trace
from moetrace.spec import Cpu, Host, PolicySpec, Remote, System, UsageError, load_policy, load_system
from moetrace.trace import Trace
from moetrace.trace import format as trace_format

RANDOM = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
# An expert of 1 MB takes 4 ms of reading in a function, a row 2 ms of arithmetic and 2 ms on the network; a call 3 ms.
REMOTE = {
    "tflops_per_vcpu": 0.0005,
    "bandwidth_gb_s_per_vcpu": 0.125,
    "vcpus": 2,
    "start_ms": 100,
    "payload_mb": 6,
    "load_gb_s": 0.1,
    "network_gb_s": 0.001,
    "call_ms": 3,
    "usd_per_gb_s": 0.5,
}
ROW_BYTES = 1000  # of activations: 1 ms each way to a function
DISPATCHES = ("gpu", "home", "balance", "in-place", "fiddler")
POLICIES = [
    PolicySpec(
        name=f"{dispatch} {residency} {ahead}", dispatch=dispatch, residency=residency, prefetch=ahead, alpha=0.6
    )
    for dispatch in DISPATCHES
    for residency, ahead in (
        ("none", "none"),
        ("lru", "none"),
        ("lru", "oracle:2"),
        ("ewma", "online:2"),
        ("static-popular", "none"),
        ("static-layers", "none"),
        ("foresee", "foresee"),
        ("prefill", "prefill"),
    )
]


def system(remote: dict | None = None, **parts: dict) -> System:
    """The machine of `in_ms` with a CPU and functions; links and networks carry activations at 1 MB a second."""
    given = {"name": "by-hand", "gpu": GPU, "cpu": CPU, "link": LINK, "remote": REMOTE | (remote or {})}
    return load_system(msgspec.convert(given | parts, System))


def near(*values: float):
    return pytest.approx(list(values), rel=1e-12)


def on(trace: Trace, machine: System, *, bytes_a_value: float = 1.0, slots: int = 4, **fields) -> Lane:
    """Replay at home, or by the dispatch that is given."""
    return replay(
        trace, machine, policy(fields.pop("dispatch", "home"), **fields), slots, activation_bytes=bytes_a_value
    )


def who(lane: Lane) -> list[list[int]]:
    """Which experts of each layer are remote."""
    assert lane.remote is not None
    return lane.remote.plan.is_remote.tolist()


def ms(seconds: float) -> float:
    return 1e3 * float(seconds)


def test_remoes_equations_by_hand():
    """Experts 0 to 3 have 5, 3, 2 and 1 rows of a prompt: 2 and 3 are remote, and each has a copy of its own.

    tau_c(n) = max(n, 2) ms on the CPU and max(2n, 4) ms in a function; D/B_link = 0.004 ms, 2D/B = 2 ms.
    """
    trace = steps(rows(*[0] * 5, *[1] * 3, 2, 2, 3), rows(0), rows(2), rows(3, 1))
    sent = ROW_BYTES / 0.25e9 * 1e3  # ms of a row over the link, one way
    lane = on(trace, system(), remote=0.5, replicas=2)
    prefill = max(2 * 8 * sent + (5 + 3), max(4 + 2 * 2 + 3, 4 + 1 * 2 + 3))
    decode = [2 * sent + 2, 4 + 2 + 3, max(2 * sent + 2, 4 + 2 + 3)]
    assert moe_ms(lane) == near(prefill, *decode)
    assert prefill == pytest.approx(11)  # the slower copy
    one_copy = on(trace, system(), remote=0.5)
    assert moe_ms(one_copy)[0] == pytest.approx(4 + 4 + 4 + 2 + 3, rel=1e-12)  # sum of both, and one call
    assert moe_ms(one_copy)[1:] == near(*decode)


def test_cold_start_is_a_part_of_the_first_step_and_of_its_ttft():
    trace = steps(rows(*[0] * 5, *[1] * 3, 2, 2, 3), rows(0))
    lane = on(trace, system(), remote=0.5)
    main_bytes = 1e6 + 2e6  # dense, and two local experts; the head is nothing
    assert ms(lane.cold_s) == pytest.approx(100 + main_bytes / 0.1e9 * 1e3, rel=1e-12)
    row = lane.log.step
    assert ms(row["duration_s"][0]) == pytest.approx(ms(lane.cold_s + row["dense_s"][0]) + moe_ms(lane)[0], rel=1e-12)
    assert ms(row["duration_s"][1]) == pytest.approx(1 + moe_ms(lane)[1], rel=1e-12)
    assert lane.tiers is not None
    assert lane.tiers.tally["now_s"][0] == pytest.approx(row["duration_s"].sum())
    all_remote = on(trace, system(), remote=1)
    assert ms(all_remote.cold_s) == pytest.approx(100 + 4e6 / 0.1e9 * 1e3, rel=1e-12)  # the function is the larger one
    assert ms(on(trace, system({"start_ms": 0}), remote=0).cold_s) == pytest.approx(50)


def test_more_bytes_than_a_call_carries_take_more_calls():
    trace = steps(rows(*[0] * 9, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3))
    for payload_kb, calls in ((7, 1), (6.999, 2), (3.5, 2), (1, 7)):
        lane = on(trace, system({"payload_mb": payload_kb / 1e3}), remote=0.75, replicas=3)
        assert moe_ms(lane) == near(14 + 7 * 2 + calls * 3)
        assert lane.remote is not None and lane.remote.books["calls"].sum() >= calls + 2


def test_who_is_remote():
    trace = steps(rows(0, 1, 1, 2, 3, 3), rows(2, 2, 2))
    assert who(on(trace, system(), remote=0.5, plan_steps=1)) == [[1, 0, 1, 0]]
    assert who(on(trace, system(), remote=0.5)) == [[1, 0, 0, 1]]  # 1, 2, 4 and 2 rows
    assert who(on(trace, system(), remote=0.25, plan_steps=1)) == [[0, 0, 1, 0]]
    assert who(on(trace, system(), remote=0.24)) == [[0, 0, 0, 0]]


def test_loads_say_who_is_remote(tmp_path):
    (tmp_path / "loads.csv").write_text("5,1,2.5,1\n")
    lane = on(steps(rows(0, 1)), system(), remote=0.5, loads=str(tmp_path / "loads.csv"))
    loads = str(tmp_path / "loads.csv")
    placed = load_policy("on-demand", {"placement": "ep-lpt", "remote": 0.5, "loads": loads, "plan_steps": 1})
    first = SimpleNamespace(counts_of_first=lambda steps: np.array([[0, 9, steps, 9]]))
    assert remote_experts(placed, first, np.ones((1, 4), bool)).tolist() == [[True, False, True, False]]
    only_loads = load_policy("on-demand", {"placement": "ep-lpt", "remote": 0.5, "loads": loads})
    assert remote_experts(only_loads, first, np.ones((1, 4), bool)).tolist() == [[False, True, False, True]]
    assert who(lane) == [[0, 1, 0, 1]]


def test_a_share_of_experts_is_rounded_as_people_reckon():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    trace = Trace.from_arrays(np.zeros((1, 1, 1), np.uint8), num_experts=100, steps=np.ones(1, np.int64))
    lane = run(trace, model(experts=100), system(), [policy("home", remote=0.29)], slots=0).lanes[0]
    assert np.sum(who(lane)) == 29


def test_a_decision_sees_what_the_layer_waits_for():
    """Expert 0 takes 60 ms at home and 10 ms if it is fetched; beside 106 ms of a function both are as good."""
    trace = steps(rows(0, 1), rows(*[0] * 60, 1))
    without = on(trace, system({"vcpus": 1e6, "call_ms": 0, "network_gb_s": 1e9}), remote=0.75, dispatch="balance")
    slow = on(trace, system({"call_ms": 100}), remote=0.75, dispatch="balance")
    assert without.log.layer["gpu_experts"][0] == 1 and slow.log.layer["gpu_experts"][0] == 0
    assert moe_ms(slow)[1] == pytest.approx(100 + 4 + 2)


def best_makespan(costs: list[float], copies: int) -> float:
    """The least longest load over all assignments."""
    return min(
        max(sum(cost for cost, on_copy in zip(costs, where, strict=True) if on_copy == copy) for copy in range(copies))
        for where in product(range(copies), repeat=len(costs))
    )


def makespan_by_kernel(rows_of: list[int], copies: int) -> float:
    """The engine's LPT of experts of so many rows, a second a row, in demand order."""
    experts = len(rows_of)
    found, _ = called(sorted(rows_of, reverse=True), copies)
    assert found.shape == (1, 1) and experts
    return float(found[0, 0])


def called(rows_of: list[int], copies: int) -> tuple[np.ndarray, np.ndarray]:
    function = records(1, FUNCTION)
    function["s_per_row"], function["payload_bytes"] = 1.0, 1.0
    experts = len(rows_of)
    plan = RemotePlan(np.ones((1, experts), np.uint8), np.zeros((1, experts)), function)
    ids, few = np.arange(experts, dtype=np.int32), np.array(rows_of, np.int32)
    demand = Demand(np.array([0, experts]), ids, few, np.zeros(0, np.int32), np.zeros(0))
    seconds, books = np.zeros((1, 1)), records(1, REMOTE_BOOKS)
    scratch = RemoteScratch(np.zeros(experts, np.int64), np.zeros(experts), np.zeros(copies), np.zeros(copies))
    call_functions(plan, demand, 1, seconds, books, scratch)
    assert books["experts"][0] == experts and books["rows"][0] == sum(rows_of)
    return seconds, books


@RANDOM
@given(rows_of=st.lists(st.integers(1, 30), min_size=1, max_size=7), copies=st.integers(1, 3))
def test_lpt_is_close_to_the_optimum(rows_of, copies):
    best, ours = best_makespan(rows_of, copies), makespan_by_kernel(rows_of, copies)
    assert best <= ours <= (4 / 3 - 1 / (3 * copies)) * best * (1 + 1e-12)


def test_lpt_by_hand():
    """Graham's worst case for two copies: 5, 4, 3, 3, 3 (by rows) end at 10 where 9 would do."""
    seconds, books = called([5, 4, 3, 3, 3], 2)
    assert seconds[0, 0] == 10 and best_makespan([5, 4, 3, 3, 3], 2) == 9
    assert (books["work_s"][0], books["busy_s"][0], books["calls"][0]) == (18, 10, 2)


def remote_case(case: Case, units: bool, changed: dict | None = None, whole: bool = True) -> Case:
    """A drawn case on a machine with functions, with units or a CPU as home."""
    parts = {} if units and case.system.ndp is not None else {"ndp": None, "cpu": Cpu(**CPU)}
    functions = msgspec.convert(REMOTE | {"network_gb_s": 0.1} | (changed or {}), Remote)
    return replace_case(case, remote=functions if whole else None, **parts)


def replace_case(case: Case, **parts) -> Case:
    return Case(case.trace, case.model, replace(case.system, **parts), case.slots)


@RANDOM
@given(
    case=cases(max_steps=8), units=st.booleans(), spec=st.sampled_from(POLICIES), b=st.sampled_from([0, 0.3, 0.5, 1])
)
def test_rows_and_experts_of_all_parts_are_those_of_the_trace(case, units, spec, b):
    """And nothing of a remote expert is ever fetched, kept or waited for."""
    machine = remote_case(case, units)
    lane = replay_case(machine, [replace(spec, remote=b, replicas=2)]).lanes[0]
    assert lane.remote is not None
    at = [part.log_row for part in lane.parts if part.name not in ("link_in", "link_out")]
    log, there = lane.log.unit[sorted({row for row in at if row >= 0})], lane.remote.plan.is_remote > 0
    assert log["rows"].sum() == pytest.approx((case.trace.experts >= 0).sum())
    active = [
        np.unique(case.trace.experts[case.trace.offset[s] : case.trace.offset[s + 1], layer])
        for s in range(case.trace.steps)
        for layer in range(case.trace.experts.shape[1])
    ]
    assert log["experts"].sum() == sum(int((ids >= 0).sum()) for ids in active)
    steps_log = lane.log.step
    assert (
        steps_log["hits"].sum() + steps_log["misses"].sum() + lane.remote.books["experts"].sum() == log["experts"].sum()
    )
    assert not lane.state.cache.resident[there.ravel()].any() and not (lane.state.queue.place[there.ravel()] >= 0).any()
    assert lane.work_bound_s <= lane.clairvoyant_s * (1 + 1e-9)
    assert lane.clairvoyant_s == pytest.approx(steps_log["duration_s"].sum() - lane.cold_s) or spec.dispatch != "home"


@RANDOM
@given(case=cases(max_steps=8), units=st.booleans(), spec=st.sampled_from(POLICIES))
def test_without_a_remote_expert_only_the_cold_start_is_left(case, units, spec):
    """Of `online:m` the queue flows as fast with more tiers, but for the last bit."""
    with_functions, without = remote_case(case, units), remote_case(case, units, whole=False)
    lane, plain = (
        replay_case(machine, [each]).lanes[0]
        for machine, each in ((with_functions, replace(spec, remote=0.0)), (without, spec))
    )
    assert lane.log.step["moe_s"] == pytest.approx(plain.log.step["moe_s"], rel=1e-9, abs=1e-15)
    later = lane.log.step["duration_s"].copy()
    later[0] -= lane.cold_s
    assert later == pytest.approx(plain.log.step["duration_s"], rel=1e-9, abs=1e-12)
    assert (lane.work_bound_s, lane.clairvoyant_s) == pytest.approx((plain.work_bound_s, plain.clairvoyant_s))
    for name in ("hits", "misses", "late"):
        assert lane.log.step[name].tolist() == plain.log.step[name].tolist()
    assert replay_case(with_functions, [spec]).lanes[0].log.step.tobytes() == plain.log.step.tobytes()


@RANDOM
@given(case=cases(max_steps=8), units=st.booleans(), b=st.sampled_from([0.3, 0.5, 1]), copies=st.integers(1, 3))
def test_more_vcpus_are_never_slower(case, units, b, copies):
    """Where nothing is decided, and each expert has the copy that it had: one copy, or none shares."""
    copies = copies if copies == 1 else case.model.most_experts
    spec = PolicySpec(name="mine", dispatch="home", remote=b, replicas=copies)
    last = np.full(case.trace.steps, np.inf)
    for vcpus in (0.5, 2, 3, 64):
        moe_s = replay_case(remote_case(case, units, {"vcpus": vcpus}), [spec]).lanes[0].log.step["moe_s"]
        assert (moe_s <= last * (1 + 1e-12)).all()
        last = moe_s


@RANDOM
@given(case=cases(), spec=st.sampled_from(POLICIES), b=st.sampled_from([0.3, 1]), block=st.sampled_from([1, 60, 400]))
def test_cuts_of_blocks_do_not_matter(case, spec, b, block):
    machine, spec = remote_case(case, True), replace(spec, remote=b, replicas=2)
    whole = replay_case(machine, [spec, replace(spec, name="again")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_format, "BLOCK_BYTES", block)
        patch.setattr("moetrace.engine.decoded.BLOCK_BYTES", block)
        cut = replay_case(machine, [spec])
    for lane in whole.lanes[1:] + cut.lanes:
        assert lane.log.step.tobytes() == whole.lanes[0].log.step.tobytes()
        assert lane.log.unit.tobytes() == whole.lanes[0].log.unit.tobytes()
        assert (lane.clairvoyant_s, lane.work_bound_s) == (whole.lanes[0].clairvoyant_s, whole.lanes[0].work_bound_s)


def test_a_user_s_function_and_units_see_local_experts_only():

    def mine(state, view, layer, load, plan):
        for i in range(load.size):
            plan[i] = view.active[i].expert >= 2  # these are remote

    given = {"name": "units", "gpu": GPU, "link": LINK, "ndp": NDP, "remote": REMOTE}
    machine, trace = msgspec.convert(given, System), steps(rows(0, 0, 1, 2), rows(3))
    result = replay_trace(
        trace, model=model(), system=machine, policies=mine, slots=1, overrides={"policy.remote": 0.5}
    )
    rows_of = dict(result.units.select("unit", "rows").rows())
    assert (rows_of["gpu"], rows_of["ndp0"], rows_of["remote"]) == (0, 3, 2)


def test_results_have_figures_of_functions_only_where_there_are_some():
    ids = np.array([0] * 5 + [1] * 3 + [2, 2, 3, 0, 2, 3], np.uint8).reshape(-1, 1, 1)
    trace = Trace.from_arrays(ids, num_experts=4, steps=np.array([11, 1, 1, 1]), phase=np.array([0, 1, 1, 1]))
    of = {"model": model(activation_bytes=1), "system": system()}
    both = replay_trace(trace, policies=[policy("home", remote=0.5), load_policy("all-cpu")], **of)
    mine, other = both.to_dict()["policies"]
    assert (mine["remote_calls"], mine["remote_experts"], mine["remote_rows"]) == (3, 4, 5)
    assert mine["remote_s"] == pytest.approx(17e-3 + 9e-3 + 9e-3)
    assert mine["remote_usd"] == pytest.approx(0.5 * 2e-3 * 35e-3)  # two experts of 1 MB
    assert mine["cold_s"] == pytest.approx(0.13) and mine["ttft_s"]["max"] > 0.13
    assert not {name for name in other if "remote" in name or name == "cold_s"}
    assert both.summary["cold_s"].to_list() == [pytest.approx(0.13), None]
    assert both.units.filter(policy="all-cpu")["unit"].to_list() == ["gpu", "cpu", "link_in", "link_out"]
    assert both.units.filter(policy="home", unit="remote")["busy_s"].item() == pytest.approx(35e-3)
    parts = both.steps.select("dense_s", "moe_s", "head_s", "wait_s", "cold_s").sum_horizontal()
    assert parts.to_list() == pytest.approx(both.steps["duration_s"].to_list())
    alone = replay_trace(trace, policies="all-cpu", **of)
    assert "cold_s" not in alone.steps.columns and "remote_s" not in alone.summary.columns
    sized = replay_trace(trace, policies=[policy("home", remote=0.5)], overrides={"system.remote.memory_gb": 4}, **of)
    assert sized.summary["remote_usd"].item() == pytest.approx(0.5 * 4 * 35e-3)


def test_an_account_has_the_price_of_functions():
    machine = system(price={"usd_hour": 3600.0})
    trace = steps(rows(0, 1, 2), rows(2))
    result = replay_trace(trace, model=model(), system=machine, policies=[policy("home", remote=0.5), "all-cpu"])
    usd = {(name, part): usd for name, part, usd in result.accounts.select("policy", "part", "price_usd").rows()}
    functions, total_s = result.summary["remote_usd"][0], result.summary["total_s"]
    assert functions > 0 and set(usd) == {("home", "machine"), ("home", "remote"), ("all-cpu", "machine")}
    assert (usd["home", "machine"], usd["home", "remote"]) == pytest.approx((total_s[0], functions))
    assert result.summary["price_usd"].to_list() == pytest.approx([total_s[0] + functions, total_s[1]])


def test_a_timeline_begins_with_the_cold_start():
    trace = steps(rows(0, 1), rows(2))
    result = replay_trace(trace, model=model(), system=system(), policies=policy("home", remote=0.5), timeline=(0, 2))
    frame = result.timeline
    assert frame.filter(kind="cold")["duration_s"].to_list() == [pytest.approx(result.summary["cold_s"].item())]
    assert frame.filter(kind="layer")["start_s"].to_list() == pytest.approx(
        [result.summary["cold_s"].item(), result.steps["start_s"][1]]
    )


@pytest.mark.parametrize(
    ("fields", "changed", "sentence"),
    [
        ({"remote": 1.5}, {}, r"remote wants .*1"),
        ({"remote": -0.1}, {}, r"remote wants .*0"),
        ({"remote": 0.5, "replicas": 0}, {}, "replicas wants"),
        ({"remote": 0.5, "plan_steps": 0}, {}, "plan_steps wants"),
        ({"replicas": 2}, {}, "replicas applies to policies with remote only"),
        ({"plan_steps": 2}, {}, "plan_steps applies to policies with remote or schedule pipeline:auto only"),
        ({"remote": 0.5, "plan_steps": 2, "loads": "loads.csv"}, {}, "first plan_steps steps or by loads; remove one"),
        ({"remote": 0.5}, {"remote": None}, "add \\[remote\\] to the system, or remove remote"),
        ({"remote": 0.5, "dispatch": "split", "placement": "tp"}, {}, "dispatch split does not go with remote"),
        ({"remote": 0.5}, {"memory_gb": 0.001}, "2 remote experts of layer 0 take 0.002 GB, and a function"),
        ({"remote": 0.5}, {"host": 0.001}, "do not fit the 0.001 GB of host memory"),
    ],
)
def test_bad_functions(fields, changed, sentence):
    machine = system({"memory_gb": changed["memory_gb"]} if "memory_gb" in changed else {})
    if "remote" in changed:
        machine = replace(machine, remote=None)
    if "host" in changed:
        machine = replace(machine, host=Host(memory_gb=changed["host"]))
    with pytest.raises(UsageError, match=sentence):
        on(steps(rows(0, 1, 2)), machine, **fields)


def test_remote_experts_need_no_room_in_the_main_function():
    machine = replace(system(), host=Host(memory_gb=0.002))
    trace = steps(rows(0, 1, 2))
    assert on(trace, machine, remote=0.5).log.step["misses"].tolist() == [2]
    with pytest.raises(UsageError, match="do not fit"):
        on(trace, machine, remote=0.25)


def test_presets_of_remoe_run():
    trace = steps(rows(0, 1), rows(2))
    result = replay_trace(trace, model=model(), system="remoe", policies=["remoe", "all-cpu", "all-gpu"])
    assert result.summary["remote_experts"].to_list() == [1, None, None]
