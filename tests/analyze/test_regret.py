"""Regret and verdict: arithmetic by hand."""

import numpy as np
import polars as pl
import pytest

from moetrace.analyze.cache.hits import cache_hits
from moetrace.analyze.cache.regret import LinkCost, link_of, verdict_lines, with_regret
from moetrace.generators import generate_trace
from moetrace.spec.errors import UsageError
from moetrace.trace import Trace


def frame_of(hits: dict[str, int], accesses: int = 1000, first: int = 10) -> pl.DataFrame:
    rows = [
        {
            "policy": policy,
            "capacity": "5",
            "phase": "all",
            "steps": 10,
            "accesses": accesses,
            "hits": count,
            "hit_rate": count / accesses if accesses else None,
            "compulsory_misses": first,
            "capacity_misses": accesses - first - count,
            "missed_bytes": 100 * (accesses - count),
        }
        for policy, count in hits.items()
    ]
    return pl.DataFrame(rows, schema_overrides={"hit_rate": pl.Float64})


@pytest.mark.parametrize(
    ("hits", "verdict"),
    [
        ({"lru": 500, "lfu": 600, "belady": 900}, "policy"),  # 300 of the policy's, 90 beyond any
        ({"lru": 500, "lfu": 600, "belady": 700}, "working set"),  # 100 and 290
        ({"lru": 500, "static-hindsight": 890, "belady": 700}, "working set"),  # 200 and 290; no engine knows the trace
        ({"lru": 945, "belady": 970}, "neither"),  # 45
        ({"lru": 400, "belady": 390}, "working set"),  # unequal sizes: Belady may lose
        ({"lru": 500}, None),
        ({"belady": 500}, None),
    ],
)
def test_verdicts(hits, verdict):
    found = with_regret(frame_of(hits), None)
    assert found["verdict"].to_list() == [verdict] * len(hits)
    assert len(verdict_lines(found)) == (verdict is not None)


def test_a_sentence_has_the_numbers():
    (line,) = verdict_lines(with_regret(frame_of({"lru": 500, "lfu": 600, "belady": 900}), None))
    assert line == (
        "5, all steps: policy failure. lfu, the best here, misses 40.0 %: 1.0 first uses, 9.0 the working set's, "
        "30.0 the policy's."
    )


def test_no_accesses_no_verdict():
    found = with_regret(frame_of({"lru": 0, "belady": 0}, accesses=0, first=0), LinkCost(1e9, 1e-6))
    assert found["verdict"].to_list() == [None, None] and verdict_lines(found) == []


def test_regret_in_points_and_in_time():
    found = with_regret(frame_of({"lru": 500, "belady": 900}), LinkCost(bytes_s=1000.0, latency_s=0.01))
    assert found["regret_points"].to_list() == [pytest.approx(40), 0]
    # 500 misses of 100 bytes take 0.11 s each, in 10 steps; Belady has 100.
    assert found["miss_ms_per_step"].to_list() == [pytest.approx(5500), pytest.approx(1100)]
    assert found["regret_ms_per_step"].to_list() == [pytest.approx(4400), 0]
    unknown = with_regret(frame_of({"lru": 500, "belady": 900}), None)
    assert unknown["regret_ms_per_step"].null_count() == 2


def test_a_system_s_link_needs_sizes_of_experts_and_a_link():
    link = link_of("rtx4090-offload", known=True)
    assert link.bytes_s > 1e9
    with pytest.raises(UsageError, match="--system needs the sizes of experts"):
        link_of("rtx4090-offload", known=False)
    with pytest.raises(UsageError, match="no link over which"):
        link_of("jetson-orin", known=True)
    trace = generate_trace("tiny-olmoe", requests=2, prompt=2, output=20)
    frame = cache_hits(trace, [24], system="rtx4090-offload").filter(phase="decode", policy="lru").row(0, named=True)
    misses = frame["accesses"] - frame["hits"]
    seconds = frame["missed_bytes"] / link.bytes_s + misses * link.latency_s
    assert frame["miss_ms_per_step"] == pytest.approx(1e3 * seconds / frame["steps"])
    nameless = Trace.from_arrays(np.zeros((3, 1, 1), int), num_experts=2)
    with pytest.raises(UsageError, match="sizes of experts"):
        cache_hits(nameless, [1], system="rtx4090-offload")
