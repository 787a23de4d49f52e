"""What users measure: which budget explains a hit rate, and how many tokens find all their experts resident."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle_cache

from moetrace.analyze.cache.hits import cache_hits, parse_capacity
from moetrace.analyze.cache.observed import OBSERVED_POLICIES, explain_hit_rate, parse_rate
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace

PHONE = Path(__file__).parents[2] / "traces" / "qwen3-30b-a3b-phone.h5"


def small_trace(seed):
    rng = np.random.default_rng(seed)
    ids = oracle_cache.random_routing(rng, 90, 3, 9, 2)
    return Trace.from_arrays(ids, num_experts=9, request=np.zeros(90, int), phase=(np.arange(90) > 20).astype(int))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    observed=st.floats(0, 1),
    policy=st.sampled_from(["lru", "belady"]),
    scope=st.sampled_from(["global", "layer"]),
)
def test_the_nearest_budget_is_that_of_trying_all(seed, observed, policy, scope):
    """One access at a time, a larger cache of these never hits less, so there is one place to find."""
    trace = small_trace(seed)
    every = list(range(1, 28)) if scope == "global" else list(range(3, 28, 3))
    how = {"scope": scope, "sequential": True}
    rates = cache_hits(trace, every, [policy], **how).filter(phase="all").select("capacity_experts", "hit_rate")
    best = min(abs(rate - observed) for _, rate in rates.rows())
    found = explain_hit_rate(trace, observed, [policy], **how).row(0, named=True)
    assert abs(found["off_points"]) == pytest.approx(100 * best)
    assert (found["capacity_experts"], found["hit_rate"]) in rates.rows()
    assert found["off_points"] == pytest.approx(100 * (found["hit_rate"] - observed))
    assert found["capacity_share"] == found["capacity_experts"] / 27 and found["budget_bytes"] is None


def test_budgets_that_are_given_come_nearest_first():
    trace = small_trace(1)
    found = explain_hit_rate(trace, 0.5, ["lru", "lfu"], [5, 20, 12], phase="decode")
    off = found["off_points"].abs().to_list()
    assert off == sorted(off) and len(off) == 6 and set(found["capacity"]) == {"5", "20", "12"}


def test_the_record_of_an_engine_is_explained_by_its_own_cache():
    """4000 MiB under LRU, experts of two sizes: agrees with all that was recorded, and is found to a few MiB."""
    with Trace.open(PHONE) as trace:
        found = explain_hit_rate(trace, None, phase="decode")
    assert found["policy"][0] == "lru" and found["recorded_agreement"][0] > 0.9998
    assert abs(found["budget_bytes"][0] / 2**20 - 4000) < 5
    assert found["observed_rate"].unique().to_list() == [found["recorded_hit_rate"][0]]
    assert sorted(found["policy"]) == sorted(OBSERVED_POLICIES)
    assert found["recorded_agreement"].is_sorted(descending=True)


def test_layers_of_their_own_numbers_of_experts_make_a_smaller_whole():
    ids = np.stack([np.arange(40) % 4, np.arange(40) % 8], 1).astype(np.uint8)[:, :, None]
    trace = Trace.from_arrays(ids, num_experts=8, layer_experts=[4, 8])
    found = explain_hit_rate(trace, 1.0, ["lru"]).row(0, named=True)
    assert (found["capacity_experts"], found["capacity_share"]) == (12, 1.0)


def test_tokens_whose_experts_are_all_resident():
    """Experts 0 and 1 always together, 2 and 3 each with a rare one: the most frequent two serve no token wholly."""
    rows = [(0, 1)] * 40 + [(2, 4)] * 25 + [(2, 5)] * 20 + [(3, 6)] * 22 + [(3, 7)] * 23
    ids = np.random.default_rng(1).permutation(rows).astype(np.uint8).reshape(-1, 1, 2)
    frame = cache_hits(Trace.from_arrays(ids, num_experts=8), [2, 16], ["static-hindsight", "lru"])
    rate = frame.filter(phase="all").select("policy", "capacity", "hit_rate", "all_resident_rows").rows()
    assert rate[0] == ("static-hindsight", "2", pytest.approx(88 / 130 / 2), 0.0)
    assert rate[1][3] == sum((a == b).all() for a, b in itertools.pairwise(ids)) / 130
    seen, whole = set(), 0
    for row in ids[:, 0].tolist():
        whole += set(row) <= seen
        seen |= set(row)
    assert rate[3][3] == whole / 130


def test_rates():
    assert parse_rate("62%") == parse_rate(" 0.62") == 0.62 and parse_rate("recorded") is None
    for text in ("62", "-1%", "101%", "nan", "", "much", "%"):
        with pytest.raises(UsageError, match=r"the observed hit rate is .*: give a share, as 62% or 0\.62"):
            parse_rate(text)
    with pytest.raises(MoetraceError, match="holds no record of residency"):
        explain_hit_rate(small_trace(0), None)
    with pytest.raises(MoetraceError, match="has no accesses in mixed steps"):
        explain_hit_rate(small_trace(0), 0.5, phase="mixed")


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("400", 400, "experts"),
        ("3000MiB", 3000 << 20, "bytes"),
        ("3GB", 3 * 10**9, "bytes"),
        ("1.5 gib", 3 << 29, "bytes"),
        ("0.1kB", 100, "bytes"),
        ("7B", 7, "bytes"),
        ("2TB", 2 * 10**12, "bytes"),
    ],
)
def test_capacities(text, amount, unit):
    assert parse_capacity(text)[:2] == (amount, unit)


@pytest.mark.parametrize(
    "text", ["", "0", "0.0GB", "-3", "1.5", "3 GiBs", "1e3", "9" * 14 + "TiB", "MiB", "3iB", "3\u212aB", "٣", "9" * 99]
)
def test_capacities_that_make_no_sense(text):
    with pytest.raises(UsageError, match="capacity"):
        parse_capacity(text)
