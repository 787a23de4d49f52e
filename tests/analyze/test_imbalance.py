"""The kernels of balance: judged against plain Python, bounds against every possible plan."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle_balance as oracle
from support.balance_traces import EXPERTS, LAYERS, counted, small_trace

from moetrace.analyze.balance import loads as loads_module
from moetrace.analyze.balance.imbalance import SUMS, Cost, Least, judge, judge_rows, new_tally, percentile
from moetrace.analyze.balance.loads import StepChoices, choices_of
from moetrace.analyze.balance.plans import Plan, copies_of
from moetrace.analyze.balance.units import imbalance


def random_plan(rng, bins, room, experts):
    slots = np.r_[np.arange(experts), rng.integers(0, experts, bins * room - experts)]
    return Plan(1, np.stack([rng.permutation(slots).reshape(bins, room) for _ in range(LAYERS)]).astype(np.int32))


def cost_of(rng, timed):
    size = rng.integers(1, 5, (LAYERS, EXPERTS)).astype(float)
    return drawn_cost(rng, size) if timed else Cost(0.0, 0.0, 0.0, 0.0, 0.0, size)


def drawn_cost(rng, size):
    s_per_row, s_per_byte, each_s, layer_s = rng.choice([0.25, 0.5, 1.0, 2.0], 4)
    return Cost(s_per_row, s_per_byte, float(rng.integers(2)), each_s, layer_s * rng.integers(2), size)


def seconds(cost, layer):
    def of_expert(e, n):
        parts = n * cost.s_per_row, cost.expert_bytes[layer, e] * cost.s_per_byte
        return (sum(parts) if cost.is_serial else max(parts)) + cost.each_s

    return of_expert


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    bins=st.integers(1, 4),
    room=st.integers(2, 4),
    timed=st.booleans(),
    by_place=st.booleans(),
)
def test_judging_agrees_with_plain_python(seed, bins, room, timed, by_place):
    rng = np.random.default_rng(seed)
    room = max(room, -(-EXPERTS // bins))
    trace, plan, cost = small_trace(seed, steps=9), random_plan(rng, bins, room, EXPERTS), cost_of(rng, timed)
    tally, turn = new_tally(LAYERS, 3), int(rng.integers(0, 9))
    ((loads, choices),) = choices_of(trace, np.arange(9))
    period = np.arange(9) * 3 // 9
    if by_place:
        judge_rows(choices, copies_of(plan, EXPERTS), bins, -1, turn, period, cost, tally)
    else:
        judge(loads, copies_of(plan, EXPERTS), bins, turn, period, cost, tally)
    counts, ids = counted(trace), trace.read("experts", 0, trace.rows)
    of_step = [[] for _ in range(9)]
    for layer in range(LAYERS):
        expected, values = np.zeros(len(SUMS)), []
        over_time = np.zeros((3, 2))
        for step in range(9):
            if counts[step, layer].sum() == 0:
                continue
            held = plan.expert_of_slot[layer].tolist()
            if by_place:
                own = ids[trace.offset[step] : trace.offset[step + 1], layer].tolist()
                own = [[e for e in row if e != 255] for row in own]
                rows, busy_s = oracle.bin_loads_of_rows(own, held, lambda place, c: place % c, seconds(cost, layer))
            else:
                rows, busy_s = oracle.bin_loads(counts[step, layer].tolist(), held, turn + step, seconds(cost, layer))
            of_step[step].append(rows)
            busy_s = [own + (cost.layer_s if n else 0.0) for own, n in zip(busy_s, rows, strict=True)]
            values.append(max(rows) / np.mean(rows))
            jain = sum(rows) ** 2 / (bins * sum(r * r for r in rows))
            in_time = max(busy_s) / np.mean(busy_s) if sum(busy_s) else 0.0
            expected += [1, values[-1], jain, max(rows), in_time, max(busy_s), np.mean(rows) / max(rows)]
            over_time[step // 3] += [1, values[-1]]
        assert np.allclose(tally.sums[layer], expected, rtol=1e-12)
        assert np.allclose(tally.over_time[:, layer], over_time, rtol=1e-12)
        for share in (0.5, 0.95):
            exact = sorted(values)[max(1, math.ceil(share * len(values))) - 1]
            got = percentile(tally, share)[layer]
            assert exact * (1 - 1e-12) <= got <= exact * bins ** (1 / imbalance.PARTS) * (1 + 1e-12)
        assert tally.worst[layer] == pytest.approx(max(values), rel=1e-12)
    logged = tally.step_sums[1:] / tally.step_sums[0]
    assert logged.tolist() == pytest.approx(oracle.balancedness(of_step), rel=1e-12)


@pytest.mark.pure
def test_drawn_copies_are_drawn_evenly_and_from_the_seed():
    """4,000 rows of one expert with four copies, in 40 steps: each gets a quarter, in each step another number."""
    rows, steps = 4000, 40
    choices = StepChoices(np.zeros((rows, 1, 1), np.uint8), *(np.arange(i, steps + i) * 100 for i in (0, 1)))
    copies = copies_of(Plan(1, np.zeros((1, 4, 1), np.int32)), 1)
    cost = Cost(1.0, 0.0, 0.0, 0.0, 0.0, np.ones((1, 1)))
    found = []
    for seed in (0, 1, 0):
        tally = new_tally(1, steps)
        with np.errstate(over="ignore"):
            judge_rows(choices, copies, 4, seed, 0, np.arange(steps), cost, tally)
        found.append(tally.over_time[:, 0, 1])
    assert np.array_equal(found[0], found[2]) and not np.array_equal(found[0], found[1])
    # With 100 rows in four bins, the fullest bin has 30.1 on average, with a standard deviation of 2.5.
    fullest = 25 * np.concatenate(found[:2])
    assert abs(fullest.mean() - 30.1) < 3 * 2.5 / np.sqrt(2 * steps) and np.unique(fullest).size > 5


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), bins=st.integers(2, 3), further=st.integers(0, 2), most=st.sampled_from([1, 3, 12]))
def test_no_plan_at_all_beats_the_bound(seed, bins, further, most):
    """Every choice of copies and every place for them: 4 experts, up to 6 slots."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most + 1, (1, 1, 4))
    counts[0, 0, 0] += 1
    cost = drawn_cost(rng, rng.integers(1, 5, (1, 4)).astype(float))
    expert = np.flatnonzero(counts[0, 0])
    loads = loads_module.Loads(1, np.array([0, expert.size]), expert.astype(np.int32), counts[0, 0, expert], 99)
    least = Least(np.zeros(1), np.zeros(1))
    imbalance.bound(loads, np.array([4]), bins, np.array([4 + further]), cost, least)
    rows, busy_s = oracle.best_possible(counts[0, 0].tolist(), bins, 4 + further, seconds(cost, 0))
    assert least.imbalance[0] <= rows * bins / counts.sum() * (1 + 1e-12)
    assert 0 < least.busy_s[0] <= busy_s


@pytest.mark.pure
@pytest.mark.parametrize(
    ("rows", "bins", "slots", "most"),
    [
        ([4, 4, 4, 4], 2, 4, 8),  # the mean
        ([9, 1, 1, 1], 2, 4, 9),  # the heaviest
        ([9, 1, 1, 1], 2, 5, 6),  # it halved, and rounded up with the mean
        ([9, 1, 1, 1], 4, 6, 3),  # in three
        ([5, 5, 5, 1], 2, 4, 10),  # two of three must meet
        ([5, 5, 5, 1], 2, 5, 8),  # unless one of them is there twice
        ([2, 2, 2, 2, 2], 2, 5, 6),  # three of five
    ],
)
def test_bounds_by_hand(rows, bins, slots, most):
    experts = len(rows)
    loads = loads_module.Loads(
        1, np.array([0, experts]), np.arange(experts, dtype=np.int32), np.array(rows, np.int64), sum(rows)
    )
    least = Least(np.zeros(1), np.zeros(1))
    imbalance.bound(
        loads, np.array([experts]), bins, np.array([slots]), Cost(0.0, 0.0, 0.0, 0.0, 0.0, np.ones((1, experts))), least
    )
    assert least.imbalance[0] * sum(rows) / bins == pytest.approx(most, rel=1e-12)
    assert least.busy_s[0] == 0
