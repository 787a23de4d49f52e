"""The kernels of balance: judged against plain Python, bounds against every possible plan."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle_balance as oracle
from support.balance_traces import EXPERTS, LAYERS, counted, small_trace

from moetrace.analyze.balance import loads as loads_module
from moetrace.analyze.balance.imbalance import SUMS, Cost, Least, judge, new_tally, percentile
from moetrace.analyze.balance.loads import loads_of
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
@given(seed=st.integers(0, 2**32), bins=st.integers(1, 4), room=st.integers(2, 4), timed=st.booleans())
def test_judging_agrees_with_plain_python(seed, bins, room, timed):
    rng = np.random.default_rng(seed)
    room = max(room, -(-EXPERTS // bins))
    trace, plan, cost = small_trace(seed, steps=9), random_plan(rng, bins, room, EXPERTS), cost_of(rng, timed)
    tally, turn = new_tally(LAYERS, 3), int(rng.integers(0, 9))
    (loads,) = loads_of(trace, np.arange(9))
    period = np.arange(9) * 3 // 9
    judge(loads, copies_of(plan, EXPERTS), bins, turn, period, cost, tally)
    counts = counted(trace)
    for layer in range(LAYERS):
        expected, values = np.zeros(len(SUMS)), []
        over_time = np.zeros((3, 2))
        for step in range(9):
            if counts[step, layer].sum() == 0:
                continue
            held = plan.expert_of_slot[layer].tolist()
            rows, busy_s = oracle.bin_loads(counts[step, layer].tolist(), held, turn + step, seconds(cost, layer))
            busy_s = [own + (cost.layer_s if n else 0.0) for own, n in zip(busy_s, rows, strict=True)]
            values.append(max(rows) / np.mean(rows))
            jain = sum(rows) ** 2 / (bins * sum(r * r for r in rows))
            in_time = max(busy_s) / np.mean(busy_s) if sum(busy_s) else 0.0
            expected += [1, values[-1], jain, max(rows), in_time, max(busy_s)]
            over_time[step // 3] += [1, values[-1]]
        assert np.allclose(tally.sums[layer], expected, rtol=1e-12)
        assert np.allclose(tally.over_time[:, layer], over_time, rtol=1e-12)
        for share in (0.5, 0.95):
            exact = sorted(values)[max(1, math.ceil(share * len(values))) - 1]
            got = percentile(tally, share)[layer]
            assert exact * (1 - 1e-12) <= got <= exact * bins ** (1 / imbalance.PARTS) * (1 + 1e-12)
        assert tally.worst[layer] == pytest.approx(max(values), rel=1e-12)


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
    imbalance.bound(loads, 4, bins, 4 + further, cost, least)
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
    imbalance.bound(loads, experts, bins, slots, Cost(0.0, 0.0, 0.0, 0.0, 0.0, np.ones((1, experts))), least)
    assert least.imbalance[0] * sum(rows) / bins == pytest.approx(most, rel=1e-12)
    assert least.busy_s[0] == 0
