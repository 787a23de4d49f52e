"""Which experts a set holds: one rule, whether it is made in a replay's loop or beforehand."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.engine.decoded import Decoded, needs_of
from moetrace.engine.prompt import make_wanted
from moetrace.engine.residency import empty_cache, empty_cells
from moetrace.engine.static_set import keep_only, most_demanded
from moetrace.generators import generate_trace
from moetrace.spec.choices import BY_TOUCH


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), capacity=st.integers(0, 13), pools=st.sampled_from([1, 3]))
def test_the_wanted_of_prompts_are_the_most_demanded_of_equal_sizes(seed, capacity, pools):
    rng, found, cache = (
        np.random.default_rng(seed),
        empty_cells(3, 4, False),
        empty_cache(3, 4, pools, capacity, BY_TOUCH),
    )
    for _ in range(3):  # prompts: what the last one wanted stands in the cells
        count, expected = rng.integers(0, 5, 12), empty_cells(3, 4, False)
        make_wanted(found, cache, count)
        keep_only(expected, most_demanded(count, np.ones(12, np.int64), capacity, pools))
        assert found.tolist() == expected.tolist()


def test_an_expert_that_does_not_fit_leaves_room_for_smaller_ones():
    count, weight = np.array([3, 2, 1, 0]), np.array([6, 5, 4, 1])
    assert most_demanded(count, weight, 10, 1).tolist() == [1, 0, 1, 0]
    assert most_demanded(count, weight, 5, 2).tolist() == [0, 1, 1, 0]


def test_demands_are_counted_alike_whether_blocks_are_kept_or_not(monkeypatch):
    """Blocks that are kept carry steps ahead, which are not theirs to count."""
    from moetrace.spec import load_policy
    from moetrace.trace import format as trace_format

    trace = generate_trace("tiny-olmoe", requests=2, prompt=3, output=9)
    monkeypatch.setattr(trace_format, "BLOCK_BYTES", 200)
    needs = needs_of([load_policy("on-demand", {"prefetch": "oracle:9"})])
    ids = trace.read("experts", 0, trace.rows)
    step = np.repeat(np.arange(trace.steps), np.diff(trace.offset))
    chosen = {(s, layer, int(e)) for s, row in zip(step, ids, strict=True) for layer in range(6) for e in row[layer]}
    expected = np.bincount([layer * 32 + e for _, layer, e in chosen if e < 32], minlength=192)
    for keep_bytes in (0, 1 << 30):
        decoded = Decoded(trace, needs, keep_bytes)
        assert decoded.demand_count.tolist() == expected.tolist()
