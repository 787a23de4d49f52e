"""LRU's curve of every capacity: the same hits as caches of one capacity each, at every capacity."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle_cache

from moetrace.analyze.cache.accesses import accesses, layer_accesses
from moetrace.analyze.cache.hit_curve import lru_curve
from moetrace.analyze.cache.hits import cache_hits
from moetrace.analyze.cache.kernels import stack
from moetrace.generators import generate_trace
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace


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
    trace.blocks = lambda *_, **__: blocks(rows=rows)
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


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(1, 17),
    experts=st.sampled_from([16, 64, 255, 256, 257]),
    top_k=st.sampled_from([8, 16]),
    most=st.integers(1, 4),
    rows=st.sampled_from([1, 4, None]),
)
def test_distances_of_groups_are_those_of_one_access_after_another(seed, layers, experts, top_k, most, rows):
    """Of rows that lack no choice; some experts are seldom or never chosen."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, most + 1, 60)
    worth = rng.random((int(steps.sum()), layers, experts)) ** 2 * np.arange(1, experts + 1)
    ids = np.argsort(worth, axis=2)[:, :, :top_k].astype(np.uint16)
    trace = Trace.from_arrays(ids, num_experts=experts, steps=steps, expert_bytes=np.ones((layers, experts), int))
    blocks = trace.blocks
    trace.blocks = lambda *_, **__: blocks(rows=rows)
    stacks = [stack.layer_stacks(layers, experts) for _ in range(2)]
    recent: list[list[int]] = [[] for _ in range(layers)]  # what was touched, last first
    for block in accesses(trace, sequential=True):
        assert block.row_choices == top_k
        found = [np.empty(block.key.size, np.int16) for _ in stacks]
        stack.layer_distances(stacks[0], block, experts, True, found[0])
        stack.layer_distances(stacks[1], block._replace(row_choices=0), experts, True, found[1])
        expected = []
        for key in block.key.tolist():
            order = recent[key // experts]
            expected.append(order.index(key) if key in order else experts)
            order[:] = [key, *(other for other in order if other != key)]
        assert found[0].tolist() == expected
        assert found[1].tolist() == expected


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), sequential=st.booleans(), first=st.integers(0, 4), more=st.integers(1, 5))
def test_some_layers_have_the_accesses_that_they_have_among_all(seed, sequential, first, more):
    trace = routing(seed, 5, 7, 3)
    stop = min(first + more, 5)
    for block, whole in zip(trace.blocks(4), accesses(trace, sequential=sequential, block_rows=4), strict=True):
        buffer = np.empty(block.experts.size, np.int32)
        part = layer_accesses(trace, block, (first, stop), sequential=sequential, buffer=buffer)
        events = [
            whole.key[whole.bounds[event] : whole.bounds[event + 1]].tolist() for event in range(whole.bounds.size - 1)
        ]
        expected = [[key - 7 * first for key in event] for i, event in enumerate(events) if first <= i % 5 < stop]
        found = [part.key[a:b].tolist() for a, b in pairwise(part.bounds.tolist())]
        assert found == expected
        assert part.phase.tolist() == whole.phase.tolist()


def test_an_impossible_id_is_named_with_any_number_of_threads():
    ids = np.zeros((6, 4, 1), np.uint8)
    ids[3, 3], ids[4, 0] = 9, 9
    trace = Trace.from_arrays(ids, num_experts=8)
    for threads in (1, 2, 3):
        with pytest.raises(MoetraceError, match="row 3, layer entry 3 holds the id 9"):
            lru_curve(trace, scope="layer", threads=threads)


def test_a_row_that_lacks_a_choice_forms_no_group():
    ids = np.array([[[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2, 3, 4, 5, 6, 255]], [[7, 1, 2, 3, 4, 5, 6, 0]]], np.uint8)
    trace = Trace.from_arrays(ids, num_experts=8, expert_bytes=np.ones((1, 8), int))
    assert [block.row_choices for block in accesses(trace, sequential=True)] == [0]
    hits = lru_curve(trace, scope="layer", sequential=True).filter(phase="all")["hits"].to_list()
    assert hits == lru_curve(trace, scope="global", sequential=True).filter(phase="all")["hits"].to_list()


def test_moments_are_renumbered_often_enough():
    """More touches than there are moments, many times over."""
    trace = generate_trace("tiny-olmoe", requests=2, prompt=20, output=2500)
    curve = lru_curve(trace, sequential=True).filter(phase="all")
    assert int(curve["accesses"][0]) > 10 * stack.global_stack(192).key_at.size
    frame = cache_hits(trace, [30, 60, 100], ["lru"], sequential=True).filter(phase="all")
    assert curve["hits"].gather([29, 59, 99]).to_list() == frame["hits"].to_list()


def test_impossible_arguments_are_refused(monkeypatch):
    trace = routing(0, 2, 7, 2)
    with pytest.raises(UsageError, match="no scope 'step'"):
        lru_curve(trace, scope="step")
    with pytest.raises(UsageError, match="0 threads cannot work"):
        lru_curve(trace, threads=0)
    monkeypatch.setattr("moetrace.analyze.cache.hit_curve._MAX_COUNTS", 1000)
    many = Trace.from_arrays(np.zeros((1, 8, 1), np.uint16), num_experts=600)
    with pytest.raises(MoetraceError, match="too many for a curve"):
        lru_curve(many, scope="layer")
