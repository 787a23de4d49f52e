"""What is counted of hits: by request, by step; against counting by hand."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle_cache

from moetrace.analyze.cache import tally as cache_tally
from moetrace.analyze.cache.hits import cache_hits
from moetrace.analyze.cache.tally import intervals, quantiles, requests_of
from moetrace.trace import Trace

LAYERS, EXPERTS = 3, 7


def several_requests(seed: int, steps: int = 30) -> dict:
    rng = np.random.default_rng(seed)
    step_rows = rng.integers(1, 5, steps)
    rows = int(step_rows.sum())
    phase = rng.integers(0, 3, steps)
    return {
        "experts": oracle_cache.random_routing(rng, rows, LAYERS, EXPERTS, 2),
        "num_experts": EXPERTS,
        "request": rng.choice([3, 40, 2_000_000_000, 7], rows),
        "steps": step_rows,
        "phase": phase,
        "row_phase": np.minimum(np.repeat(phase, step_rows), 1),
    }


def row_of_each_access(given: dict, sequential: bool) -> list[int]:
    rows, first = [], 0
    for of_step in given["steps"]:
        for layer in range(LAYERS):
            choices = [
                (int(expert), row)
                for row in range(first, first + of_step)
                for expert in given["experts"][row, layer]
                if expert != 255
            ]
            last = [i for i, (expert, _) in enumerate(choices) if expert not in [e for e, _ in choices[i + 1 :]]]
            rows += [choices[i][1] for i in (range(len(choices)) if sequential else last)]
        first += of_step
    return rows


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), sequential=st.booleans())
def test_hits_of_requests_and_of_steps(seed, sequential):
    given = several_requests(seed)
    trace = Trace.from_arrays(**given)
    demands = oracle_cache.events(given["experts"], given["steps"], given["phase"], 255, sequential)
    hits = oracle_cache.replay(demands, "lru", 8, np.ones((LAYERS, EXPERTS)))
    rows = row_of_each_access(given, sequential)
    requests = sorted(set(given["request"].tolist()))
    by_request = np.zeros((2, len(requests)), int)
    step_of_row = np.repeat(np.arange(len(given["steps"])), given["steps"])
    missed = [0] * len(given["steps"])
    for row, hit in zip(rows, hits, strict=True):
        by_request[:, requests.index(given["request"][row])] += (hit, 1)
        missed[step_of_row[row]] += not hit
    low, high = intervals(by_request[:1], by_request[1:], 5)
    frame = cache_hits(trace, [8], ["lru"], sequential=sequential, seed=5).row(0, named=True)
    assert (frame["hit_rate_low"], frame["hit_rate_high"]) == (low[0], high[0])
    assert frame["capacity_misses"] == sum(missed) - frame["compulsory_misses"]
    for percent in (50, 95, 99):
        expected = np.quantile(missed, percent / 100, method="inverted_cdf")
        assert frame[f"step_misses_p{percent}"] == expected


def test_intervals_are_those_of_drawing_requests_one_by_one():
    """Against another way to draw, within what 1000 draws leave open."""
    rng = np.random.default_rng(0)
    accesses = rng.integers(100, 1000, 30)
    hits = rng.binomial(accesses, rng.uniform(0.3, 0.7, 30))
    rates = []
    for _ in range(20_000):
        drawn = rng.integers(0, 30, 30)
        rates.append(hits[drawn].sum() / accesses[drawn].sum())
    low, high = intervals(hits[None], accesses[None], 0)
    assert np.allclose([low[0], high[0]], np.quantile(rates, [0.025, 0.975]), atol=0.01)
    again = intervals(hits[None], accesses[None], 0)
    assert (low, high) == again
    assert intervals(hits[None], accesses[None], 1) != again


def test_one_request_has_no_interval():
    low, high = intervals(np.array([[3, 0]]), np.array([[9, 0]]), 0)
    assert np.isnan([low[0], high[0]]).all()
    given = several_requests(0)
    frame = cache_hits(Trace.from_arrays(**given | {"request": np.zeros(len(given["request"]), int)}), [8], ["lru"])
    assert frame["hit_rate_low"].null_count() == len(frame)


def test_quantiles_of_no_step():
    assert quantiles(Counter()) == [None] * 3
    assert quantiles(Counter({4: 1})) == [4] * 3


def test_more_requests_than_groups(monkeypatch):
    monkeypatch.setattr(cache_tally, "MAX_GROUPS", 2)
    trace = Trace.from_arrays(**several_requests(1))
    requests = requests_of(trace)
    assert requests.number.tolist() == [3, 7, 40, 2_000_000_000] and requests.groups == 2
    assert requests.group_of(np.array([40, 3, 7, 2_000_000_000], np.int32)).tolist() == [0, 0, 1, 1]
    frame = cache_hits(trace, [8], ["lru"]).row(0, named=True)
    assert frame["hit_rate_low"] <= frame["hit_rate"] <= frame["hit_rate_high"]


@pytest.mark.pure
def test_counting_without_numba():
    trace = Trace.from_arrays(**several_requests(2))
    whole = cache_hits(trace, [8], ["lru", "fifo"])
    assert whole.filter(phase="all")["steps"].to_list() == [30, 30]
    assert whole["accesses"].sum() == 2 * whole.filter(policy="lru", phase="all")["accesses"].sum() * 2


def test_the_interval_of_two_or_three_requests_is_the_range_of_their_rates():
    for hits in ([1, 9], [1, 9, 5]):
        low, high = intervals(np.array([hits]), np.full((1, len(hits)), 10), 0)
        assert (low, high) == ([0.1], [0.9])
    assert np.isnan(intervals(np.array([[1]]), np.array([[10]]), 0)).all()
