"""LRU by the moment of the last touch, against a list, in caches that are large enough for it."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.analyze.cache.accesses import accesses
from moetrace.analyze.cache.kernels.recent import RecentKeys, least_capacity
from moetrace.trace import Trace

LAYERS, EXPERTS = 5, 64


def drawn(seed: int, steps: int, most_rows: int) -> Trace:
    """Skewed, with some choices absent, and an idle spell of most experts."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, most_rows + 1, steps)
    rows = int(lengths.sum())
    worth = rng.random((rows, LAYERS, EXPERTS)) ** 3 * rng.random((LAYERS, EXPERTS))
    worth[rows // 3 : rows // 2, :, EXPERTS // 4 :] -= 1
    ids = np.argsort(-worth, axis=2)[:, :, :4].astype(np.uint8)
    ids[rng.random(ids.shape) < 0.03] = 255
    return Trace.from_arrays(ids, num_experts=EXPERTS, steps=lengths)


def hits_by_hand(blocks: list, capacity: int, sequential: bool) -> list[bool]:
    recent: list[int] = []  # the newest last
    found = []
    for block in blocks:
        keys = block.key.tolist()
        edges = range(len(keys) + 1) if sequential else block.bounds.tolist()
        for start, stop in pairwise(edges):
            found += [key in recent for key in keys[start:stop]]
            for key in keys[start:stop]:
                if key in recent:
                    recent.remove(key)
                recent.append(key)
            del recent[:-capacity]
    return found


def check(trace: Trace, capacity: int, sequential: bool, rows: int) -> None:
    blocks = list(accesses(trace, sequential=sequential, block_rows=rows))
    cache, found = RecentKeys(LAYERS * EXPERTS, capacity), []
    for block in blocks:
        hit = np.empty(block.key.size, np.uint8)
        cache.replay(block, sequential, hit)
        found += hit.astype(bool).tolist()
    assert found == hits_by_hand(blocks, capacity, sequential)
    assert any(found) and not all(found)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    capacity=st.integers(least_capacity(EXPERTS), LAYERS * EXPERTS + 9),
    sequential=st.booleans(),
    rows=st.sampled_from([1, 7, 40, 10_000]),
    most_rows=st.sampled_from([1, 6]),
)
def test_as_a_list_of_the_newest(seed, capacity, sequential, rows, most_rows):
    check(drawn(seed, 60, most_rows), capacity, sequential, rows)


@pytest.mark.parametrize("capacity", [least_capacity(1), least_capacity(1) + 1, 300])
def test_one_at_a_time_smaller_caches_will_do(capacity):
    check(drawn(1, 150, 2), capacity, True, 33)


@pytest.mark.pure
def test_recent_keys_without_numba():
    for sequential in (True, False):
        check(drawn(2, 40, 3), least_capacity(EXPERTS), sequential, 9)
