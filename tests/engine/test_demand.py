"""Who is demanded, and which ids are wrong, beside the same said in plain Python."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.engine.demand import demand_of


@st.composite
def blocks(draw) -> tuple[np.ndarray, np.ndarray, int]:
    """Steps of one row, of a few and of many; ids of experts, some rows absent."""
    num_experts = draw(st.sampled_from([1, 2, 3, 5, 8, 30, 127, 254, 255, 256, 300]))
    top_k, layers = draw(st.integers(1, min(num_experts, 6))), draw(st.integers(1, 9))
    sizes = draw(st.lists(st.sampled_from([1, 1, 2, 3, 9, 60]), min_size=1, max_size=5))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = 1 / (1 + np.arange(num_experts))
    keys = random.random((sum(sizes), layers, num_experts)) ** (1 / weight)
    ids = np.argsort(-keys, axis=-1)[..., :top_k].astype(np.uint8 if num_experts <= 255 else np.uint16)
    ids[random.random((sum(sizes), layers)) < 0.1] = np.iinfo(ids.dtype).max
    return np.ascontiguousarray(ids), np.concatenate([[0], np.cumsum(sizes)]), num_experts


@settings(max_examples=60, deadline=None)
@given(block=blocks())
def test_demand_lists_the_active_experts_by_rows_then_id(block):
    ids, offset, num_experts = block
    demand = demand_of(ids, offset, num_experts)
    at = 0
    for begin, stop in pairwise(offset):
        for layer in range(ids.shape[1]):
            count = Counter(e for e in ids[begin:stop, layer].ravel().tolist() if e < num_experts)
            first, last = demand.start[at : at + 2]
            found = list(zip(demand.expert[first:last].tolist(), demand.rows[first:last].tolist(), strict=True))
            assert found == sorted(count.items(), key=lambda pair: (-pair[1], pair[0]))
            at += 1
    assert demand.start[-1] == len(demand.expert) == len(demand.rows)


@settings(max_examples=60, deadline=None)
@given(block=blocks(), place=st.integers(0, 2**20), other=st.integers(1, 2**20))
def test_an_id_of_no_expert_and_one_that_stands_twice_are_wrong(block, place, other):
    ids, offset, num_experts = block
    row, layer, slot = np.unravel_index(place % ids.size, ids.shape)
    choice = ids[row, layer]
    absent = np.iinfo(ids.dtype).max
    if num_experts < absent:
        before = choice[slot]
        choice[slot] = num_experts + other % (absent - num_experts)
        assert demand_of(ids, offset, num_experts) is None
        choice[slot] = before
    if len(choice) > 1:
        choice[(slot + 1 + other % (len(choice) - 1)) % len(choice)] = choice[slot] = other % num_experts
        assert demand_of(ids, offset, num_experts) is None


@pytest.mark.parametrize("rows", [1, 700])
def test_the_last_rows_of_a_block_are_looked_at(rows):
    ids = np.tile(np.array([[[0, 1], [2, 3]]], np.uint8), (rows, 1, 1))
    offset = np.array([0, rows])
    assert demand_of(ids, offset, 4) is not None
    ids[-1, -1] = 3
    assert demand_of(ids, offset, 4) is None
