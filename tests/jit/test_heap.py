"""The heaps against Python's own."""

import heapq

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.jit.heap import ARITY, KEY, RANK, rise_placed, sink, sink_placed

KEYS = st.lists(st.integers(-5, 5), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(KEYS, st.lists(st.integers(0, 4), max_size=40))
def test_the_root_that_grows_sinks(keys, growths):
    """Least key first, then least number."""
    expected = [(float(key), number) for number, key in enumerate(keys)]
    key, number = np.array(keys, np.float64), np.arange(len(keys))
    for at in range(len(keys) // 2, -1, -1):
        sink(key, number, len(keys), at)
    heapq.heapify(expected)
    for growth in growths:
        assert (key[0], number[0]) == expected[0]
        heapq.heapreplace(expected, (expected[0][0] + growth, expected[0][1]))
        key[0] += growth
        sink(key, number, len(keys), 0)


@settings(deadline=None, max_examples=60)
@given(KEYS)
def test_a_heap_that_knows_places_gives_keys_by_rank(ranks):
    heap, place = np.zeros((len(ranks) + ARITY, 2), np.int64), np.full(len(ranks), -1)
    for key, rank in enumerate(ranks):
        rise_placed(heap, place, key, rank, key)
        assert all(heap[place[k], KEY] == k and heap[place[k], RANK] == ranks[k] for k in range(key + 1))
    taken = []
    for count in range(len(ranks) - 1, -1, -1):
        taken.append(heap[0, RANK])
        last = heap[count].copy()
        if count:
            sink_placed(heap, place, count, 0, last[RANK], last[KEY])
    assert taken == sorted(ranks)
