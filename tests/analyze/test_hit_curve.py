"""LRU's curve of every capacity: the same hits as caches of one capacity each, at every capacity."""

import numpy as np
import oracle_cache
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.analyze.cache import cache_hits
from moetrace.analyze.caches import stack
from moetrace.analyze.hit_curve import lru_curve
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace
from moetrace.trace.generate import generate_trace


def routing(seed: int, layers: int, experts: int, top_k: int, rows: int = 40, most: int = 3) -> Trace:
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, most + 1, rows)
    ids = oracle_cache.random_routing(rng, int(steps.sum()), layers, experts, top_k).astype(np.uint16)
    ids[ids == 255] = 255 if experts <= 255 else 65535
    phase = rng.integers(0, 3 if most > 1 else 2, rows)
    row_phase = np.minimum(np.repeat(phase, steps), 1)
    return Trace.from_arrays(
        ids,
        num_experts=experts,
        steps=steps,
        phase=phase,
        row_phase=row_phase,
        expert_bytes=np.ones((layers, experts), int),
    )


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(1, 9),
    experts=st.sampled_from([2, 7, 8, 65]),
    scope=st.sampled_from(["global", "layer"]),
    sequential=st.booleans(),
    threads=st.integers(1, 3),
    rows=st.sampled_from([1, 4, None]),
)
def test_the_curve_is_what_caches_of_one_capacity_hit(seed, layers, experts, scope, sequential, threads, rows):
    trace = routing(seed, layers, experts, min(experts, 3))
    blocks = trace.blocks
    trace.blocks = lambda: blocks(rows=rows)
    curve = lru_curve(trace, scope=scope, sequential=sequential, threads=threads)
    capacities = curve.filter(phase="all")["capacity_experts"].to_list()
    pools = layers if scope == "layer" else 1
    assert capacities == list(range(capacities[0], pools * experts * (layers // pools) + 1, pools))
    assert capacities[0] == pools or not sequential
    # In bytes of equal sizes, so that one at a time, too, it is a linked list that stands beside the distances.
    frame = cache_hits(trace, [f"{c}B" for c in capacities], ["lru"], scope=scope, sequential=sequential)
    for phase in curve["phase"].unique():
        assert curve.filter(phase=phase)["hits"].to_list() == frame.filter(phase=phase)["hits"].to_list()
        assert curve.filter(phase=phase)["accesses"].to_list() == frame.filter(phase=phase)["accesses"].to_list()


@pytest.mark.parametrize("experts", [255, 256, 257, 384])
def test_many_experts(experts):
    trace = generate_trace_of(experts)
    curve = lru_curve(trace, scope="layer", sequential=True).filter(phase="all")
    some = [5, 5 * (experts // 3), 5 * (experts - 1), 5 * experts]
    frame = cache_hits(trace, [f"{c}B" for c in some], ["lru"], scope="layer", sequential=True).filter(phase="all")
    assert curve.filter(curve["capacity_experts"].is_in(some))["hits"].to_list() == frame["hits"].to_list()


def generate_trace_of(experts: int) -> Trace:
    rng = np.random.default_rng(experts)
    ids = np.argsort(rng.random((200, 5, experts)) ** 3 * np.arange(1, experts + 1), axis=2)[:, :, :8]
    return Trace.from_arrays(ids.astype(np.uint16), num_experts=experts, expert_bytes=np.ones((5, experts), int))


def test_moments_are_renumbered_often_enough():
    """More touches than there are moments, many times over."""
    trace = generate_trace("tiny-olmoe", requests=2, prompt=20, output=2500)
    curve = lru_curve(trace, sequential=True).filter(phase="all")
    assert int(curve["accesses"][0]) > 10 * stack.global_stack(192).key_at.size
    frame = cache_hits(trace, [30, 60, 100], ["lru"], sequential=True).filter(phase="all")
    assert curve["hits"].gather([29, 59, 99]).to_list() == frame["hits"].to_list()


def test_what_cannot_be_asked():
    trace = routing(0, 2, 7, 2)
    with pytest.raises(UsageError, match="no scope 'step'"):
        lru_curve(trace, scope="step")
    with pytest.raises(UsageError, match="0 threads cannot work"):
        lru_curve(trace, threads=0)
    many = Trace.from_arrays(np.zeros((1, 800, 1), np.uint16), num_experts=60000)
    with pytest.raises(MoetraceError, match="too many for a curve"):
        lru_curve(many, scope="layer")
