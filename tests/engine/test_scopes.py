"""Caches that start cold with each request, and layers with unequal slots."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.compared import compare, small_case
from support.drawn_runs import replay
from support.oracle import DECODE, OracleTrace
from support.strategies import Case, all_policies, as_arrays, cases, write_static

import moetrace as mt
from moetrace.engine.decoded import Decoded, needs_of
from moetrace.engine.layer_slots import by_marginal_gain
from moetrace.engine.run import run_setups
from moetrace.engine.setup import Setup
from moetrace.spec import PolicySpec, load_policy
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace

RANDOM = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
LOGGED = ("step", "layer", "unit", "tally", "fallbacks")


def in_turn(trace: OracleTrace) -> OracleTrace:
    """The same rows, one a step, the requests one after another."""
    order = np.argsort(trace.request, kind="stable")
    columns = [getattr(trace, name)[order] for name in ("experts", "request", "position", "row_phase")]
    return OracleTrace(*columns, np.arange(len(order) + 1), trace.expert_bytes)


def request_policies(data, case: Case, folder) -> list[PolicySpec]:
    allowed = [
        replace(policy, scope="request")
        for policy in all_policies(case.system.units, None, write_static(folder / "static.csv", case))
        if policy.scope == "global" and policy.residency != "foresee"
    ]
    return data.draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=4), label="policies")


@RANDOM
@given(case=cases(), turns=st.booleans(), data=st.data())
def test_cold_starts_against_the_oracle(case, turns, data, tmp_path_factory):
    case = replace_trace(case, in_turn(case.trace)) if turns else case
    compare(case, request_policies(data, case, tmp_path_factory.mktemp("p")))


@RANDOM
@given(case=cases(), data=st.data())
def test_each_request_starts_cold(case, data, tmp_path_factory):
    """Steps of requests in turn take what they take in a replay of nothing else, to the last bit."""
    case = replace_trace(case, in_turn(case.trace))
    policies = request_policies(data, case, tmp_path_factory.mktemp("p"))
    # These look beyond the request, wait once, or go by the number of the step.
    assume(not any(p.residency == "static-hindsight" or "oracle" in p.prefetch for p in policies))
    assume(not any(p.prefetch_blocks or p.half_life for p in policies))
    whole = replay(case, policies)
    for request in np.unique(case.trace.request):
        rows = np.flatnonzero(case.trace.request == request)
        columns = [getattr(case.trace, name)[rows] for name in ("experts", "request", "position", "row_phase")]
        alone = OracleTrace(*columns, np.arange(len(rows) + 1), case.trace.expert_bytes)
        for one, lane in zip(replay(replace_trace(case, alone), policies).lanes, whole.lanes, strict=True):
            assert lane.log.step[rows[0] : rows[-1] + 1].tobytes() == one.log.step.tobytes()


def replace_trace(case: Case, trace: OracleTrace) -> Case:
    return Case(trace, case.model, case.system, case.slots)


@RANDOM
@given(case=cases(), data=st.data())
def test_where_requests_overlap_nothing_is_emptied(case, data, tmp_path_factory):
    case.trace.request[:] = 3
    policies = request_policies(data, case, tmp_path_factory.mktemp("p"))
    shared = [replace(policy, scope="global") for policy in policies]
    for one, other in zip(replay(case, policies).lanes, replay(case, shared).lanes, strict=True):
        assert all(getattr(one.log, part).tobytes() == getattr(other.log, part).tobytes() for part in LOGGED)


def test_memory_of_a_user_s_functions_starts_cold_too():
    """Both kinds of memory, in dispatch and residency: each request is as if it were alone."""

    @mt.policy
    def in_turn_home(state, view, layer, load, plan):
        for i in range(load.size):
            view.memory[0] += 1
            plan[i] = view.memory[0] % 3 == 0

    @mt.policy
    def latest(state, view, layer, load, plan):
        for i in range(load.size):
            view.memory[1] += load[i]
            cell = state[layer, view.active[i].expert]
            cell.memory += view.memory[1] % 5
            cell.score = cell.memory

    case = small_case(np.random.default_rng(4), steps=40, most=1)
    case = replace_trace(case, in_turn(case.trace))
    hooks = {"in_turn_home": in_turn_home, "latest": latest}
    policy = PolicySpec(name="own", dispatch="in_turn_home", residency="latest", scope="request")
    whole = replay(case, [policy], hooks=hooks).lanes[0].log.step
    assert len(np.unique(case.trace.request)) > 1
    for request in np.unique(case.trace.request):
        rows = np.flatnonzero(case.trace.request == request)
        columns = [getattr(case.trace, name)[rows] for name in ("experts", "request", "position", "row_phase")]
        alone = OracleTrace(*columns, np.arange(len(rows) + 1), case.trace.expert_bytes)
        (one,) = replay(replace_trace(case, alone), [policy], hooks=hooks).lanes
        assert whole[rows[0] : rows[-1] + 1].tobytes() == one.log.step.tobytes()


def test_a_note_says_so():
    trace = in_turn(small_case(np.random.default_rng(4), most=1).trace)
    trace.request[:] = np.arange(len(trace.request)) // 5
    whole = OracleTrace(trace.experts, trace.request, trace.position, trace.row_phase, trace.offset[[0, -1]])
    for steps, notes in ((trace, 0), (whole, 1)):
        case = replace_trace(small_case(np.random.default_rng(4)), steps)
        asked = load_policy("on-demand", {"scope": "request"})
        said = [note for note in replay(case, [asked]).warnings if "scope request empties nothing" in note]
        assert len(said) == notes


def test_foresee_is_not_emptied():
    with pytest.raises(UsageError, match="residency foresee learns from one request for the next, so its cache is not"):
        load_policy("foresee", {"scope": "request"})


def layer_policies(data, case: Case, folder) -> list[PolicySpec]:
    allowed = [policy for policy in all_policies(case.system.units) if policy.scope == "layer"]
    allowed = [policy for policy in allowed if policy.dispatch != "hot"]
    return data.draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=4), label="policies")


@RANDOM
@given(case=cases(), data=st.data())
def test_unequal_slots_against_the_oracle(case, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("p")
    layers, experts = case.model.moe_layers, case.model.experts
    numbers, left = [], case.slots
    for _ in range(layers):
        numbers.append(data.draw(st.integers(0, min(left, experts)), label="slots"))
        left -= numbers[-1]
    (folder / "budget.csv").write_text("# slots\n" + "".join(f"{number}\n" for number in numbers))
    budget = data.draw(st.sampled_from(["auto", str(folder / "budget.csv")]), label="budget")
    (folder / "budget.csv").write_text("".join(f"{number}\n" for number in numbers))
    compare(case, [replace(policy, budget=budget) for policy in layer_policies(data, case, folder)])


@RANDOM
@given(case=cases(), data=st.data())
def test_equal_slots_of_a_file_are_as_none(case, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("p")
    layers = case.model.moe_layers
    (folder / "equal.csv").write_text(f"{case.slots // layers}\n" * layers)
    policies = layer_policies(data, case, folder)
    budgeted = [replace(policy, budget=str(folder / "equal.csv")) for policy in policies]
    for one, other in zip(replay(case, policies).lanes, replay(case, budgeted).lanes, strict=True):
        assert all(getattr(one.log, part).tobytes() == getattr(other.log, part).tobytes() for part in LOGGED)
        assert one.lower_bound_s == other.lower_bound_s


@RANDOM
@given(
    counts=st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=5),
    slots=st.integers(0, 25),
)
def test_marginal_gains(counts, slots):
    """No slot would help more in another layer; all are given away, unless every expert has one."""
    count = np.array(counts)
    most = np.full(len(count), 4)
    shared = by_marginal_gain(count, most, slots)
    assert shared.sum() == min(slots, count.size) and (shared >= 0).all() and (shared <= 4).all()
    gains = -np.sort(-count, axis=1)
    last = [gains[layer, shared[layer] - 1] for layer in range(len(count)) if shared[layer]]
    missed = [gains[layer, shared[layer]] for layer in range(len(count)) if shared[layer] < 4]
    assert max(missed, default=0) <= min(last, default=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2\n2\n", "2 numbers, but the trace has 3 MoE layers"),
        ("2\n2\n9\n", "line 3: must be 0 to 6 slots, since layer 2 has no more experts, not 9"),
        ("2\n-2\n2\n", "line 2: must be 0 to 6 slots"),
        ("2\n2,2\n2\n", "line 2: wants one whole number, the slots of a layer"),
        ("4\n2\n2\n", "gives 8 slots to the layers together, but there are 7"),
    ],
)
def test_wrong_budgets(text, message, tmp_path):
    path = tmp_path / "budget.csv"
    path.write_text(text)
    case = small_case(np.random.default_rng(1))
    with pytest.raises(MoetraceError, match=message):
        replay(case, [load_policy("on-demand", {"budget": str(path)})])


def test_a_budget_needs_scope_layer():
    with pytest.raises(UsageError, match="budget gives each layer slots of its own, but scope is global; remove one"):
        load_policy("on-demand", {"scope": "global", "budget": "auto"})
    with pytest.raises(UsageError, match="but in residency foresee all layers share the slots"):
        load_policy("foresee", {"scope": "layer", "budget": "auto"})


def test_a_window_of_48_steps():
    """In 120 steps demands leave the window."""
    case = small_case(np.random.default_rng(2), steps=120, most=3)
    chosen = [load_policy("on-demand", {"name": s, "residency": "lfu-window", "scope": s}) for s in ("layer", "global")]
    compare(case, [*chosen, load_policy("on-demand", {"residency": "lfu-window", "prefetch": "online:2"})])


@pytest.mark.parametrize(("begins_with", "slots"), [("prompts", 9), ("answers", 12)])
def test_a_kept_trace_needs_no_file_for_its_budget(begins_with, slots, tmp_path):
    """As in a sweep, whose workers close a trace that they keep: `auto` shares out what it does in a replay."""
    case = small_case(np.random.default_rng(5), steps=90)
    if begins_with == "answers":
        case.trace.row_phase[: case.trace.offset[1]] = DECODE
    arrays = as_arrays(case.trace, case.model.most_experts)
    Trace.from_arrays(num_experts=case.model.most_experts, **arrays).write(tmp_path / "t.h5")
    policy = PolicySpec(name="auto", dispatch="gpu", residency="lru", budget="auto")
    setup = Setup(model=case.model, system=case.system, policies=[policy], slots=slots, ignore_capacity=True)
    with Trace.open(tmp_path / "t.h5") as trace:
        kept = Decoded(trace, needs_of([policy]), 1 << 20)
        (own,) = run_setups(trace, [setup])
    (run,) = run_setups(kept, [setup])
    capacity = run.lanes[0].state.cache.capacity
    assert len(set(capacity.tolist())) > 1
    assert capacity.tolist() == own.lanes[0].state.cache.capacity.tolist()
    assert run.lanes[0].log.step.tobytes() == own.lanes[0].log.step.tobytes()
