"""Dispatches of machines with more tiers, layer by layer, against plans that are timed from scratch."""

import numpy as np
import pytest
from hypothesis import given, settings
from support.tier_layers import CPU, GPU, HOME, Expert, Layer, layers

from moetrace.engine.dispatches import bottleneck, cheapest, hot_ratio, optimal
from moetrace.engine.tiers import tier_moves
from moetrace.engine.tiers.tier_search import is_searched, optimal_of
from moetrace.engine.tiers.tier_times import moe_s, term_of
from moetrace.jit.compile import kernel


@kernel(inline=False)
def decide(kind, view, plan):
    """Write the plan of a dispatch, by number, and return the layer's seconds."""
    size = plan.size
    if kind == 0:
        tier_moves.cheapest(view, size, plan)
    elif kind == 1:
        bottleneck.refine(view, size, plan)
    elif kind == 2:
        return optimal_of(view, size, plan)
    elif kind == 3:
        tier_moves.balance(view, size, plan)
    elif kind == 4:
        tier_moves.hottest_by_ratio(view, size, plan)
    elif kind == 6:
        tier_moves.hottest(view, size, plan)
    elif kind == 5:
        return 1.0 if is_searched(view, size) else 0.0
    return moe_s(term_of(view), view, size, plan)


CHEAPEST, BOTTLENECK, OPTIMAL, BALANCE, RATIO, IS_SEARCHED, HOT = range(7)


def planned(kind, layer):
    view, alive = layer.view()
    plan = np.zeros(len(layer.experts), np.uint8)
    seconds = decide(kind, view, plan)
    del alive
    return plan.tolist(), seconds


@settings(max_examples=400, deadline=None)
@given(layer=layers(most=9))
def test_cheapest_and_bottleneck_are_those_of_the_text(layer):
    greedy, greedy_s = planned(CHEAPEST, layer)
    assert greedy == layer.cheapest()
    assert greedy_s == pytest.approx(layer.moe(greedy), rel=1e-12)
    refined, refined_s = planned(BOTTLENECK, layer)
    assert refined == layer.bottleneck()
    assert refined_s == pytest.approx(layer.moe(refined), rel=1e-12)
    assert refined_s <= greedy_s * (1 + 1e-12)


@settings(max_examples=200, deadline=None)
@given(layer=layers(most=9))
def test_balance_and_hot_are_those_of_the_text(layer):
    plan, seconds = planned(BALANCE, layer)
    assert plan == layer.balance() and seconds == pytest.approx(layer.moe(plan), rel=1e-12)
    for expert in layer.experts:
        expert.resident = False
    assert planned(HOT, layer)[0] == layer.hot()


@settings(max_examples=100, deadline=None)
@given(layer=layers(most=5))
def test_optimal_is_the_best_of_all_assignments(layer):
    plan, seconds = planned(OPTIMAL, layer)
    best = layer.optimal()
    assert plan == best
    assert seconds == pytest.approx(layer.moe(best), rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(layer=layers(most=10))
def test_optimal_is_never_beaten(layer):
    _, seconds = planned(OPTIMAL, layer)
    assert planned(IS_SEARCHED, layer)[1] == 1.0
    for kind in (CHEAPEST, BOTTLENECK, BALANCE):
        assert seconds <= planned(kind, layer)[1] * (1 + 1e-9)


def test_how_far_all_assignments_are_tried():
    expert = Expert(1, False, 1.0, 1.0, np.inf, 1.0, 0)
    for has_cpu, most in ((1, 12), (0, 20)):
        searched = [planned(IS_SEARCHED, Layer([expert] * n, term={"has_cpu": has_cpu}))[1] for n in (most, most + 1)]
        assert searched == [1.0, 0.0]
    beyond = Layer([Expert(1, False, 1.0, 1.0 + i / 8, 5.0, 2.0, 0) for i in range(13)], term={"has_cpu": 1})
    assert planned(OPTIMAL, beyond) == planned(BALANCE, beyond)


def test_ties_go_to_gpu_then_cpu_then_home():
    alike = Expert(1, True, 1.0, 0.0, 1.0, 1.0, 0)
    layer = Layer([alike], term={"has_cpu": 1})
    assert planned(CHEAPEST, layer)[0] == [GPU]
    slower = Expert(1, True, 2.0, 0.0, 1.0, 1.0, 0)
    assert planned(CHEAPEST, Layer([slower], term={"has_cpu": 1}))[0] == [CPU]
    assert planned(CHEAPEST, Layer([slower]))[0] == [CPU]  # without a CPU its seconds are infinite: see below
    assert planned(CHEAPEST, Layer([Expert(1, True, 2.0, 0.0, np.inf, 1.0, 0)]))[0] == [HOME]


def test_three_experts_by_hand():
    """What TriMoE does, in seconds, on two units, with fetches that stream without a limit.

    Cheapest: all three on the CPU, which takes 3 + 2 + 2 = 7. It ends last, its costliest is the first: on the GPU the
    fetch of 5 makes the layer max(5, 4) = 5, on its unit of 6 it would be 6. Now the GPU ends last, at 5, and has that
    one only: on the CPU 7, on the unit 6: it stays.
    """
    first, second, third = (
        Expert(9, False, 1.0, 5.0, 3.0, 6.0, 0),
        Expert(5, False, 1.0, 5.0, 2.0, 3.0, 0),
        Expert(1, False, 1.0, 5.0, 2.0, 3.0, 1),
    )
    layer = Layer([first, second, third], units=2, term={"has_cpu": 1, "stream": 0})
    assert planned(CHEAPEST, layer) == ([CPU, CPU, CPU], 7.0)
    assert planned(BOTTLENECK, layer) == ([GPU, CPU, CPU], 5.0)
    # The best is two moves away: the first on the CPU, the others each on its unit.
    assert planned(OPTIMAL, layer) == ([CPU, HOME, HOME], 3.0)
    # Without streaming the GPU runs it when all of it is there, and ends at 6, as its unit would: ties go to the GPU.
    layer.term["stream"] = 1
    assert planned(BOTTLENECK, layer) == ([GPU, CPU, CPU], 6.0)


def test_contention_is_a_part_of_each_decision():
    """Reading from outside keeps the unit busy: an expert that the CPU takes costs the others of its unit its read."""
    experts = [
        Expert(4, False, 9.0, 9.0, 1.0, 3.0, 0, outside=4.0),
        Expert(1, False, 9.0, 9.0, 8.0, 2.0, 0, outside=4.0),
    ]
    layer = Layer(experts, term={"has_cpu": 1, "contends": 1})
    assert planned(CHEAPEST, layer) == ([CPU, HOME], 6.0)  # the unit: 2, and 4 for the read of the other
    assert planned(BOTTLENECK, layer) == ([CPU, HOME], 6.0)  # the second on the CPU: 9; the GPU: 18
    assert planned(OPTIMAL, layer) == ([HOME, HOME], 5.0)


@pytest.mark.parametrize(("active", "most"), [(1, 1), (8, 1), (17, 1), (18, 2), (34, 2), (128, 8)])
def test_the_ratio_of_monde(active, most):
    """32 GB/s and 512 GB/s: H = ceil(E/17)."""
    term = {"link_bytes_s": 32e9, "home_bytes_s": 512e9}
    expert = Expert(1, False, 1.0, 1.0, np.inf, 1.0, 0)
    assert planned(RATIO, Layer([expert] * active, term=term))[0] == [GPU] * most + [HOME] * (active - most)


def test_records():
    for module in (bottleneck, cheapest):
        assert module.RECORD.hook is None and module.RECORD.beside_units and module.RECORD.uses_cpu
    assert hot_ratio.RECORD.forms == ("hot:ratio",) and optimal.RECORD.tiers_hook is not None
