"""bench/ep_loads.py: what falls on the busiest GPU of a group, beside a plain loop."""

import ep_loads
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def dealt_one_by_one(counts: list[list[int]], wanted: int, most: int) -> list[list[int]]:
    """Deal to the GPUs in turn, each time to the lowest count."""
    counts = [list(gpu) for gpu in counts]
    missing = wanted - sum(map(sum, counts))
    while missing > 0:
        for gpu in counts:
            lowest = min(range(len(gpu)), key=gpu.__getitem__)
            if missing and gpu[lowest] < most:
                gpu[lowest] += 1
                missing -= 1
    return counts


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_missing_choices_are_dealt_as_one_by_one(gpus, each, most, data):
    counts = data.draw(
        st.lists(st.lists(st.integers(0, most), min_size=each, max_size=each), min_size=gpus, max_size=gpus)
    )
    wanted = data.draw(st.integers(0, gpus * each * most))
    found = ep_loads._dealt(np.array([counts]), wanted, most)[0]
    assert found.tolist() == dealt_one_by_one(counts, wanted, most)


@pytest.mark.parametrize(("experts", "top_k", "rows", "gpus"), [(8, 2, 64, 4), (64, 6, 3, 8), (32, 4, 100, 1)])
def test_a_power_law_keeps_the_choices_that_there_are(experts, top_k, rows, gpus):
    counts = ep_loads._power_law(experts, top_k, rows, gpus, 1.2)
    assert counts.shape == (ep_loads.DRAWS, gpus, experts // gpus)
    assert (counts.sum(axis=(1, 2)) == rows * top_k).all() and counts.min() >= 0 and counts.max() <= rows
    active, choices = ep_loads.busiest(experts, top_k, rows, gpus, "power_law_1.2")
    assert rows * top_k / gpus <= choices <= rows * top_k and 0 < active <= experts / gpus


def test_balanced_routing_spreads_choices_evenly():
    assert ep_loads.busiest(8, 2, 4, 1, "balanced") == (8, 8)
    assert ep_loads.busiest(8, 2, 4, 4, "balanced") == (2, 2)
    assert ep_loads.busiest(8, 2, 1, 4, "balanced") == (1, 1)  # a row's two experts are on two GPUs
    assert ep_loads.busiest(64, 8, 256, 8, "balanced") == (8, 256)
