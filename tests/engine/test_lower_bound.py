"""The lower bound that counts starts, the link and the slots: against the best of all schedules, and by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import in_ms
from support.drawn_machines import machine_cases, plain_policy
from support.drawn_runs import replay
from support.oracle_bound import Bound
from support.oracle_layer import OracleTrace, machine_of, place, time_line
from support.strategies import Case, cases

from moetrace.spec import PolicySpec

AT_HOME, HELD, FETCHED = range(3)
MOST_DEMANDS = 8


def best_of_all_s(trace: OracleTrace, machine, units, slots: int) -> float:
    """Return the least seconds of a machine that knows the trace, fetches in time, and keeps what it likes.

    Each demand is met at home, by a copy kept since its last demand on the GPU, or by one that the link has carried;
    all choices are tried. The link carries from the first layer on, and never waits for what comes later.
    """
    demand = [[trace.demand(step, layer) for layer in range(machine.L)] for step in range(trace.steps)]
    events = [
        (step, layer, e) for step in range(trace.steps) for layer in range(machine.L) for e in demand[step][layer]
    ]
    kinds = (AT_HOME, HELD, FETCHED) if machine.home else (HELD, FETCHED)
    least = np.inf
    for chosen in itertools.product(kinds, repeat=len(events)):
        met = dict(zip(events, chosen, strict=True))
        if not is_possible(met, machine.L, trace.steps, slots):
            continue
        end_s, bytes_so_far = 0.0, 0.0
        for step, layers in enumerate(demand):
            T = len(trace.rows_of(step))
            for layer, n in enumerate(layers):
                on_gpu = {e for e in n if met[step, layer, e] != AT_HOME}
                bytes_so_far += sum(machine.W[layer, e] for e in n if met[step, layer, e] == FETCHED)
                line = time_line(machine, layer, n, T, on_gpu, frozenset(), on_gpu, units[layer], None)
                end_s += machine.dense_s(T, kv_tokens(trace, step)) + machine.overhead_s + line.moe
                end_s = max(end_s, bytes_so_far / machine.B_l)
        least = min(least, end_s)
    return least + trace.steps * machine.head_s()


def is_possible(met: dict, layers: int, steps: int, slots: int) -> bool:
    """Whether what is kept was there before, and fits the slots after each layer."""
    kept = np.zeros(steps * layers, int)
    last: dict = {}
    for (step, layer, e), kind in met.items():
        at = step * layers + layer
        if kind == HELD:
            if (layer, e) not in last:
                return False
            kept[last[layer, e] : at] += 1
        last.pop((layer, e), None)
        if kind != AT_HOME:
            last[layer, e] = at
    return bool((kept <= slots).all())


def kv_tokens(trace: OracleTrace, step: int) -> int:
    rows = trace.rows_of(step)
    highest: dict[int, int] = {}
    for row in rows:
        request = int(trace.request[row])
        highest[request] = max(highest.get(request, 0), int(trace.position[row]) + 1)
    return sum(highest.values())


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=machine_cases(max_steps=4, max_experts=4), placement=st.sampled_from(["ep", "tp"]))
def test_the_best_of_all_schedules_does_not_beat_it(case, placement):
    steps, layers = case.trace.steps, case.model.moe_layers
    demands = sum(len(case.trace.demand(step, layer)) for step in range(steps) for layer in range(layers))
    assume(0 < demands <= MOST_DEMANDS)
    policy = plain_policy({"dispatch": "balance", "placement": placement})
    machine = machine_of(case.trace, case.model, case.plain, case.slots, "balance")
    units = place(policy, machine)
    bound = Bound(machine, len(units[0][0]) if machine.home else 1, machine.slots, False)
    for step in range(steps):
        before_s = machine.dense_s(len(case.trace.rows_of(step)), kv_tokens(case.trace, step)) + machine.overhead_s
        bound.add_step([case.trace.demand(step, layer) for layer in range(layers)], before_s)
    assert bound.seconds() <= best_of_all_s(case.trace, machine, units, machine.slots) * (1 + 1e-9)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(max_steps=40), data=st.data())
def test_split_with_a_long_queue_does_not_beat_it(case, data):
    """What has arrived of a queued expert runs without a slot: the slots say nothing then, but the link does."""
    assume(case.system.units)
    fields = data.draw(
        st.sampled_from(
            [
                {"residency": "prefill", "prefetch": "prefill"},
                {"residency": "lfu", "prefetch": "online:4"},
                {"residency": "lru", "prefetch": "oracle:9"},
                {"residency": "foresee", "prefetch": "foresee", "margin": 0.0},
            ]
        )
    )
    chosen = {"name": "a", "placement": "tp", "dispatch": "split", "scope": "global"} | fields
    for slots in (0, 1, case.slots):
        lane = replay(Case(case.trace, case.model, case.system, slots), [PolicySpec(**chosen)]).lanes[0]
        assert lane.lower_bound_s <= lane.log.step["duration_s"].sum() * (1 + 1e-9)


def bound_ms(lane) -> float:
    return 1e3 * lane.lower_bound_s


TWO_AND_TWO = [in_ms.rows(0, 1), in_ms.rows(2, 3)] * 3


def test_without_a_home_the_bound_is_the_time_of_the_link():
    """Without a home: each of 4 experts is fetched once, or each of 12 demands; the GPU would take 18 ms."""
    slow = in_ms.system(link={"bandwidth_gb_s": 0.025})  # 40 ms an expert
    for slots, fetches in ((4, 4), (0, 12)):
        lane = in_ms.replay(in_ms.steps(*TWO_AND_TWO), slow, in_ms.policy("gpu", "lru", scope="global"), slots)
        assert bound_ms(lane) == pytest.approx(40 * fetches, rel=1e-6)
        assert bound_ms(lane) <= 1e3 * lane.log.step["duration_s"].sum()


def test_fewer_slots_than_experts_are_fetched_for_again_and_again():
    """Two slots, and four experts in turn: one of two demands could be a hit at best, and none is in LRU."""
    slow = in_ms.system(link={"bandwidth_gb_s": 0.025})
    in_turn = [in_ms.rows(step % 4) for step in range(400)]
    lane = in_ms.replay(in_ms.steps(*in_turn), slow, in_ms.policy("gpu", "lru", scope="global"), 2)
    assert 400 * 40 * 0.45 < bound_ms(lane) < 400 * 40 * 0.55
    belady = in_ms.replay(in_ms.steps(*in_turn), slow, in_ms.policy("gpu", "belady", scope="global"), 2)
    assert bound_ms(belady) == bound_ms(lane) <= 1e3 * belady.log.step["duration_s"].sum()


def test_the_price_of_a_slot_comes_back():
    """After 5,000 steps of one expert, for which there is more than room, four in turn cost what they do at once."""
    slow = in_ms.system(link={"bandwidth_gb_s": 0.0025})  # 400 ms an expert
    few, many = [0, 1, 2, 3] + [0] * 5000, [0, 1, 2, 3] * 400
    asked = in_ms.policy("gpu", "lru", scope="global")
    lane = in_ms.replay(in_ms.steps(*map(in_ms.rows, few + many)), slow, asked, 2)
    assert 1600 * 400 * 0.4 < bound_ms(lane) < 1600 * 400 * 0.55
    experts = np.array(few + many)[:, None, None]
    nothing = np.zeros(len(experts), int)
    trace = OracleTrace(experts, nothing, np.arange(len(experts)), nothing, np.arange(len(experts) + 1))
    oracle = Bound(machine_of(trace, in_ms.model(), slow, 2, "gpu"), 1, 2, False)
    for step in range(len(experts)):
        oracle.add_step([trace.demand(step, 0)], 1e-3)
    assert lane.lower_bound_s == pytest.approx(oracle.seconds(), rel=1e-9)


def test_experts_resident_from_the_start_need_no_fetch():
    slow = in_ms.system(link={"bandwidth_gb_s": 0.025})
    chosen = in_ms.policy("gpu", "static-popular", scope="global")
    lane = in_ms.replay(in_ms.steps(*TWO_AND_TWO), slow, chosen)
    assert bound_ms(lane) == pytest.approx(18, rel=1e-9) == 1e3 * lane.log.step["duration_s"].sum()


def test_a_fast_link_leaves_the_balance_of_both_sides():
    """Of two experts, at 1 ms on the GPU and 2 ms on the unit, both sides take 4/3 ms, and 1 ms is dense."""
    fast = in_ms.system(link={"bandwidth_gb_s": 1e6}, ndp={})
    lane = in_ms.replay(in_ms.steps(*[in_ms.rows(0, 1)] * 400), fast, in_ms.policy("split", "lru", placement="tp"))
    assert 400 * (4 / 3 + 1) * 0.98 < bound_ms(lane) < 400 * (4 / 3 + 1) * 1.0001
