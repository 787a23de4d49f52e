"""The caches: kernels against a slow oracle, what must hold of any policy, and figures that others published."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle_cache
from support.small_caches import (
    EXPERTS,
    GENERAL,
    ONE_AT_A_TIME,
    POLICIES,
    frame_of,
    oracle_frame,
    small_trace,
)

from moetrace.analyze.cache import next_use as look_ahead
from moetrace.analyze.cache.accesses import accesses
from moetrace.analyze.cache.hit_curve import lru_curve
from moetrace.analyze.cache.hits import cache_hits, expert_bytes
from moetrace.analyze.cache.next_use import NEVER, NextUses
from moetrace.analyze.locality.reuse import add_all, no_reuse
from moetrace.analyze.locality.rows import ABSENT
from moetrace.generators import generate_trace
from moetrace.importers.importing import import_traces
from moetrace.spec import Model
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace

CAPTURES = Path(__file__).parents[3] / "shared" / "traces"
captured = pytest.mark.skipif(not CAPTURES.exists(), reason="needs the captures beside the repository")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(GENERAL),
    scope=st.sampled_from(["global", "layer"]),
    sequential=st.booleans(),
    in_experts=st.booleans(),
    budget=st.integers(1, 250),  # all the experts together have 21 to 630 bytes, so that some are beyond the budget
    most=st.sampled_from([1, 3, 6]),
)
def test_kernels_agree_with_the_oracle(seed, policy, scope, sequential, in_experts, budget, most):
    given = small_trace(seed, most=most)
    budget = 1 + budget // 10 if in_experts else budget
    trace = Trace.from_arrays(**given)
    capacity = budget if in_experts else f"{budget}B"
    frame = cache_hits(trace, [capacity], [policy], scope=scope, sequential=sequential)
    assert frame_of(frame) == oracle_frame(given, policy, budget, scope, sequential, in_experts)


@pytest.mark.parametrize("capacity", [2, 5])
def test_layers_in_turn_agree_with_the_oracle(capacity):
    """Where every layer has as many accesses, kernels take eight layers at a time; ten layers leave two."""
    given = small_trace(4, steps=25, layers=10)
    ids = oracle_cache.random_routing(np.random.default_rng(4), len(given["experts"]), 10, EXPERTS, 3)
    whole = np.where((ids == 255).any(2, keepdims=True), [0, 3, 5], ids).astype(np.uint8)
    given |= {"experts": whole, "recorded": np.ones(whole.shape, int)}
    for policy in GENERAL:
        frame = cache_hits(Trace.from_arrays(**given), [10 * capacity], [policy], scope="layer", sequential=True)
        assert frame_of(frame) == oracle_frame(given, policy, 10 * capacity, "layer", True, True)
    curve = lru_curve(Trace.from_arrays(**given), scope="layer", sequential=True).filter(phase="all")
    assert curve["hits"][capacity - 1] == oracle_frame(given, "lru", 10 * capacity, "layer", True, True)["all"][1]


@pytest.mark.pure
@pytest.mark.parametrize(("capacity", "lru", "belady"), [(3, 2, 5), (4, 4, 6)])
def test_the_textbook_s_reference_string(capacity, lru, belady):
    """Twelve references of Belady, Nelson and Shedler 1969: LRU faults 10 and 8 times, the optimum 7 and 6 times."""
    experts = np.array([1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]).reshape(-1, 1, 1)
    frame = cache_hits(Trace.from_arrays(experts, num_experts=6), [capacity], ["lru", "belady"]).filter(phase="all")
    assert frame["hits"].to_list() == [lru, belady]
    demands = oracle_cache.events(experts, [1] * 12, [1] * 12, 255, True)
    weight = np.ones((1, 6))
    assert [sum(oracle_cache.replay(demands, policy, capacity, weight)) for policy in ("lru", "belady")] == [
        lru,
        belady,
    ]


def test_more_caches_than_bits_are_counted_in_turns():
    given = small_trace(5, most=4)
    budgets, policies = list(range(1, 18)), ("lru", "lfu", "fifo", "belady")  # 68 caches, and 64 bits
    frame = cache_hits(Trace.from_arrays(**given), budgets, policies)
    for policy in policies:
        for budget in budgets:
            own = frame.filter(policy=policy, capacity=str(budget))
            assert frame_of(own) == oracle_frame(given, policy, budget, "global", False, True)


@pytest.mark.pure
def test_kernels_agree_with_the_oracle_without_numba():
    given = small_trace(1)
    for policy in GENERAL:
        for sequential in (True, False):
            frame = cache_hits(Trace.from_arrays(**given), ["60B"], [policy], sequential=sequential)
            assert frame_of(frame) == oracle_frame(given, policy, 60, "global", sequential, False)


@pytest.mark.pure
def test_quick_kernels_agree_with_the_oracle_without_numba():
    given = small_trace(2, steps=12)
    trace = Trace.from_arrays(**given)
    for policy in GENERAL:
        frame = cache_hits(trace, [9], [policy], scope="layer", sequential=True)
        assert frame_of(frame) == oracle_frame(given, policy, 9, "layer", True, True)
    hits = cache_hits(trace, [9], ["lru", *ONE_AT_A_TIME, "belady"], sequential=True).filter(phase="all")["hits"]
    assert hits.min() > 0 and hits.max() == hits[-1]


@pytest.mark.parametrize("sequential", [True, False])
def test_the_size_of_blocks_changes_nothing(monkeypatch, sequential):
    trace = Trace.from_arrays(**small_trace(3, steps=40))
    whole = cache_hits(trace, ["80B", 4], GENERAL, sequential=sequential)
    blocks = trace.blocks
    monkeypatch.setattr(trace, "blocks", lambda *_, **__: blocks(rows=2))
    assert len(list(trace.blocks())) > 10
    assert cache_hits(trace, ["80B", 4], GENERAL, sequential=sequential).equals(whole)
    monkeypatch.setattr(look_ahead, "_IN_MEMORY_BYTES", 64)  # the tables go to a file
    assert cache_hits(trace, ["80B", 4], GENERAL, sequential=sequential).equals(whole)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), capacity=st.integers(1, 21), sequential=st.booleans(), most=st.sampled_from([1, 4]))
def test_belady_is_never_beaten_at_equal_sizes(seed, capacity, sequential, most):
    trace = Trace.from_arrays(**small_trace(seed, most=most, equal=True))
    # All that an event demands at once has to fit: otherwise the policy has no choice.
    capacity = capacity if sequential else max(capacity, EXPERTS)
    # Static sets may win: they do not have to keep each demanded expert.
    filled = [policy for policy in (POLICIES if sequential else GENERAL) if not policy.startswith("static-")]
    frame = cache_hits(trace, [capacity], filled, sequential=sequential).filter(phase="all")
    hits = dict(zip(frame["policy"], frame["hits"], strict=True))
    assert hits["belady"] == max(hits.values())
    frame = cache_hits(trace, [capacity], GENERAL, sequential=sequential).filter(phase="all")
    in_bytes = cache_hits(trace, [f"{8 * capacity}B"], GENERAL, sequential=sequential).filter(phase="all")
    assert in_bytes["hits"].equals(frame["hits"])


def test_lru_of_a_layer_is_its_stack_distances():
    """One capacity at a time, and all at once by Mattson's stack: two ways to the same hits."""
    given = small_trace(7, steps=60)
    ids = np.where(given["experts"] == 255, ABSENT, given["experts"].astype(np.uint16)).transpose(1, 0, 2)
    reuse = no_reuse(3, EXPERTS)
    add_all(reuse, np.ascontiguousarray(ids), np.arange(ids.shape[1], dtype=np.int32))
    capacities = [3 * capacity for capacity in range(1, EXPERTS + 1)]
    frame = cache_hits(Trace.from_arrays(**given), capacities, ["lru"], scope="layer", sequential=True)
    assert frame.filter(phase="all")["hits"].to_list() == np.cumsum(reuse.stack.sum(0)).tolist()


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_cache_of_everything_misses_only_first_accesses(sequential, scope):
    trace = Trace.from_arrays(**small_trace(5))
    most = 3 * int(trace.expert_bytes.sum())
    # static-prefill never wants experts that were not in a prefill step.
    policies = [policy for policy in GENERAL if policy != "static-prefill"]
    frame = cache_hits(trace, [21, f"{most}B"], policies, scope=scope, sequential=sequential)
    assert (frame["accesses"] - frame["hits"]).equals(frame["compulsory_misses"].rename("accesses"))
    everything = frame.filter(phase="all", policy="lru")
    choices = trace.read("experts", 0, trace.rows)
    seen = {(layer, int(e)) for layer in range(3) for e in choices[:, layer].ravel() if e != 255}
    assert everything["compulsory_misses"].to_list() == [len(seen)] * 2
    assert everything["missed_bytes"].to_list() == [sum(int(trace.expert_bytes[key]) for key in seen)] * 2


@pytest.mark.parametrize("policy", [policy for policy in GENERAL if policy != "static-prefill"])
def test_an_expert_larger_than_the_budget_is_never_kept_and_evicts_nothing(policy):
    experts = np.array([0, 2, 0, 2, 1, 0]).reshape(-1, 1, 1)
    trace = Trace.from_arrays(experts, num_experts=3, expert_bytes=np.array([[4, 4, 11]]))
    frame = cache_hits(trace, ["10B"], [policy]).filter(phase="all")
    assert frame["hits"].to_list() == [2] and frame["missed_bytes"].to_list() == [30]


def test_victims_go_until_it_fits_but_never_one_of_the_same_event():
    # Two rows at once: 0 and 1 (3 bytes each) are demanded, then 0 and 2 (6 bytes): only 1 may go, and 2 is not kept.
    experts = np.array([[0], [1], [0], [2], [0], [1], [2]]).reshape(-1, 1, 1)
    steps = np.array([2, 2, 1, 1, 1])
    trace = Trace.from_arrays(experts, num_experts=3, steps=steps, expert_bytes=np.array([[3, 3, 6]]))
    frame = cache_hits(trace, ["8B"], ["lru"])
    assert frame.filter(phase="all").row(0, named=True)["hits"] == 2
    one_by_one = cache_hits(trace, ["8B"], ["lru"], sequential=True)
    assert one_by_one.filter(phase="all").row(0, named=True)["hits"] == 1


def test_distinct_experts_come_in_the_order_of_their_last_choices():
    experts = np.array([[[1, 2]], [[3, 1]], [[2, 255]], [[0, 255]]], np.uint8)
    recorded = np.array([[[0, 1]], [[2, 1]], [[2, 255]], [[0, 255]]], np.uint8)
    trace = Trace.from_arrays(experts, num_experts=4, steps=np.array([3, 1]), recorded=recorded)
    (block,) = accesses(trace, sequential=False, recorded=True)
    assert (block.key.tolist(), block.bounds.tolist(), block.recorded.tolist()) == (
        [3, 1, 2, 0],
        [0, 3, 4],
        [2, 0, 1, 0],
    )
    (block,) = accesses(trace, sequential=True, recorded=True)
    assert (block.key.tolist(), block.bounds.tolist()) == ([1, 2, 3, 1, 2, 0], [0, 5, 6])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 5))
def test_next_uses(seed, rows):
    trace = Trace.from_arrays(**small_trace(seed))
    blocks = trace.blocks
    trace.blocks = lambda *_, **__: blocks(rows=rows)
    order = [int(key) for block in accesses(trace, sequential=True) for key in block.key]
    expected = [
        next((j for j in range(i + 1, len(order)) if order[j] == key), NEVER - i) for i, key in enumerate(order)
    ]
    with NextUses(21) as uses:
        uses.learn(accesses(trace, sequential=True))
        found = [int(number) for block in accesses(trace, sequential=True) for number in uses.of(block)]
    assert found == expected


def test_sizes_are_the_trace_s_or_the_model_s():
    tiny = generate_trace("tiny-olmoe", requests=1, prompt=2, output=2)
    assert expert_bytes(tiny).shape == (6, 32) and expert_bytes(tiny).dtype == np.int64
    assert expert_bytes(tiny, "tiny-olmoe")[0, 0] == expert_bytes(tiny)[0, 0]
    with pytest.raises(UsageError, match="6 MoE layers of 32 experts, but the model mixtral-8x7b has 32 of 8"):
        expert_bytes(tiny, "mixtral-8x7b")
    given = small_trace(0)
    own = Trace.from_arrays(**given)
    assert np.array_equal(expert_bytes(own), given["expert_bytes"])
    for model, sentence in (("mixtral-8x7b", "name the right one with --model"), ("none", "'none'")):
        with pytest.raises(UsageError, match=sentence):
            cache_hits(own, [3], model=model)  # even where its sizes are not needed
    per_layer = Trace.from_arrays(**(given | {"expert_bytes": np.array([5, 6, 7])}))
    assert expert_bytes(per_layer).tolist() == [[5] * EXPERTS, [6] * EXPERTS, [7] * EXPERTS]
    del given["expert_bytes"]
    unknown = Trace.from_arrays(**given, model="no such model")
    assert expert_bytes(unknown) is None
    assert cache_hits(unknown, [3])["missed_bytes"].null_count() == 3 * 4
    with pytest.raises(UsageError, match="no /layers/expert_bytes and its model 'no such model' is no preset"):
        cache_hits(unknown, ["3MB"])


def test_impossible_arguments_are_refused():
    trace = Trace.from_arrays(**small_trace(0))
    with pytest.raises(UsageError, match=r"no cache policy 'mru' \(the nearest is 'lru'\); known are lru"):
        cache_hits(trace, [3], ["mru"])
    for policy in ONE_AT_A_TIME:
        for capacity, sequential in ((3, False), ("30B", True)):
            with pytest.raises(UsageError, match=f"{policy} is defined one access at a time and for equal sizes"):
                cache_hits(trace, [capacity], [policy], sequential=sequential)
    with pytest.raises(UsageError, match="no scope 'step'; known are global, layer"):
        cache_hits(trace, [3], scope="step")
    wrong = small_trace(0)
    wrong["experts"][40, 1] = [3, 3]
    with pytest.raises(MoetraceError, match="/experts row 40, layer entry 1 chooses expert 3 more than once"):
        cache_hits(Trace.from_arrays(**wrong), [3], sequential=True)
    wrong["experts"][40, 1] = [3, 9]
    for sequential in (True, False):
        with pytest.raises(MoetraceError, match="/experts row 40, layer entry 1 holds the id 9, but the model has 7"):
            cache_hits(Trace.from_arrays(**wrong), [3], sequential=sequential)
    wrong = small_trace(0)
    wrong["recorded"][12, 0, 0] = 9
    with pytest.raises(MoetraceError, match="/recorded/resident row 12, layer entry 0 is 9"):
        cache_hits(Trace.from_arrays(**wrong), [3])
    large = Trace.from_arrays(np.zeros((8, 1, 1), int), num_experts=2, expert_bytes=np.array([2**60]))
    with pytest.raises(MoetraceError, match="experts of 1152921504606846976 bytes: missed bytes would be more"):
        cache_hits(large, [3])
    many = Trace.from_arrays(np.zeros((1, 20, 1), np.uint16), num_experts=65535)
    with pytest.raises(MoetraceError, match="20 x 65535 experts; caches take 1048576 at most"):
        cache_hits(many, [3])


def test_a_trace_too_long_for_exact_counts_is_refused(monkeypatch):
    monkeypatch.setattr("moetrace.analyze.cache.eviction.MAX_COUNT", 4)
    with pytest.raises(MoetraceError, match=r"rows and \d+ choices, more than LFU counts exactly"):
        cache_hits(Trace.from_arrays(**small_trace(0)), [3])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Qwen3-30B-A3B, recorded by BigMoeOnEdge with 4000 MiB of cache, layers of two sizes."""
    path = tmp_path_factory.mktemp("qwen") / "qwen.h5"
    import_traces([CAPTURES / "qwen3-30b_bigmoeonedge.route.csv"], path)
    return Trace.open(path)


def decode(frame: pl.DataFrame, column: str) -> dict[str, float]:
    return dict(frame.filter(phase="decode").select("policy", column).iter_rows())


@captured
def test_an_lru_of_4000_mib_is_the_recorded_residency(qwen):
    agreement = decode(cache_hits(qwen, ["4000MiB"], ["lru"], sequential=True), "recorded_agreement")["lru"]
    assert round(agreement, 4) == 0.9999  # 5 of 36,864 differ
    assert decode(cache_hits(qwen, ["4000MiB"], ["lru"]), "recorded_agreement")["lru"] == 1
    for other in ("3000MiB", "3900MiB", "4100MiB", "5000MiB"):
        assert 0.9 < decode(cache_hits(qwen, [other], ["lru"]), "recorded_agreement")["lru"] < 0.995


@captured
def test_hit_rates_at_3000_mib_are_the_published_ones(qwen):
    rates = decode(cache_hits(qwen, ["3000MiB"], ["belady", "lru", "lfu"]), "hit_rate")
    assert {policy: round(100 * rate, 1) for policy, rate in rates.items()} == {
        "belady": 87.8,
        "lru": 70.6,
        "lfu": 71.3,
    }
    assert round(100 * decode(cache_hits(qwen, ["3000MiB"], ["lru"], sequential=True), "hit_rate")["lru"], 1) == 70.6


def test_hit_rates_of_independent_draws_are_those_of_three_other_tools():
    model = Model(
        name="26 x 64",
        moe_layers=26,
        experts=64,
        top_k=6,
        hidden=8,
        expert_intermediate=8,
        weight_bits=16,
        dense_weight_bits=16,
        dense_params_per_layer=0,
        once_params=0,
        kv_bytes_per_token_layer=0,
    )
    trace = generate_trace(model, requests=1, prompt=0, output=1000, zipf=0.8, stick=0.0, seed=1)
    rates = decode(cache_hits(trace, [400], ["lru", "belady"], sequential=True, model=model), "hit_rate")
    assert 0.411 <= round(rates["lru"], 3) <= 0.412
    assert 0.695 <= round(rates["belady"], 3) <= 0.697
