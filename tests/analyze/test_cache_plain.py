"""The kernels of one cache for all layers, one access at a time and of equal sizes, against those for any demand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.analyze.cache import eviction
from moetrace.analyze.cache.accesses import Accesses, accesses
from moetrace.analyze.cache.kernels import replays
from moetrace.analyze.cache.kernels.replays import Budget, Demands
from moetrace.analyze.cache.kernels.sieve import replay_sieve, sieve
from moetrace.analyze.cache.next_use import NextUses
from moetrace.trace import Trace

RULES = {"belady": eviction.BELADY, "lfu_in_cache": eviction.LFU_IN_CACHE}
POLICIES = (*RULES, "sieve")


def drawn(seed: int, layers: int, experts: int, rows: int) -> Trace:
    """Skewed, with some choices absent, and an idle spell of most experts."""
    rng = np.random.default_rng(seed)
    liked = rng.random((layers, experts)) ** 2
    worth = rng.random((rows, layers, experts)) ** 3 * liked
    worth[rows // 3 : rows // 2, :, experts // 4 :] -= 1
    ids = np.argsort(-worth, axis=2)[:, :, : min(3, experts)].astype(np.uint8)
    ids[rng.random(ids.shape) < 0.1] = 255
    return Trace.from_arrays(ids, num_experts=experts)


def slowly(policy: str, capacity: int, keys: int, blocks: list[tuple[Accesses, np.ndarray]]) -> list[np.ndarray]:
    """Which accesses hit, by the kernel that also knows events and weights."""
    weight, found = np.ones(keys, np.int64), []
    by_hand, ranked = sieve(weight, capacity, 1), eviction.ranked_heap(weight, capacity, 1)
    for block, next_use in blocks:
        hit = np.empty(block.key.size, np.uint8)
        if policy == "sieve":
            replay_sieve(by_hand, block, 1, True, hit)
        else:
            eviction.evict_by_rank(ranked, RULES[policy], block, next_use, 1, True, hit)
        found.append(hit)
    return found


def check(policy: str, trace: Trace, capacities: list[int], block_rows: int) -> int:
    """Compare every access; return how many hit."""
    layers, experts = trace.layers, trace.num_experts
    keys, parts = layers * experts, list(accesses(trace, sequential=True, block_rows=block_rows))
    with NextUses(keys) as next_uses:
        next_uses.learn(parts)
        blocks = [(block, next_uses.of(block)) for block in parts]
    demands = Demands(
        layers, experts, np.zeros(keys, np.int64), 1, True, trace.rows * trace.top_k, np.zeros(0, np.int64)
    )
    replay = getattr(replays, policy)([Budget(capacity, False) for capacity in capacities], demands)
    found = [[hit.copy() for hit in replay(block, next_use)] for block, next_use in blocks]
    for cache, capacity in enumerate(capacities):
        for hit, expected in zip(found, slowly(policy, capacity, keys, blocks), strict=True):
            assert hit[cache].tolist() == expected.tolist(), capacity
    return sum(int(hit.sum()) for hits in found for hit in hits)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(1, 3),
    experts=st.integers(1, 40),
    rows=st.integers(1, 120),
    block_rows=st.sampled_from([1, 7, 40, 10_000]),
    others=st.lists(st.integers(0, 123), max_size=4),
)
def test_as_the_kernel_for_any_demand(policy, seed, layers, experts, rows, block_rows, others):
    keys = layers * experts
    check(policy, drawn(seed, layers, experts, rows), [0, 1, 2, *others, keys - 1, keys, keys + 9], block_rows)


@pytest.mark.parametrize("policy", POLICIES)
def test_many_keys_and_a_long_block(policy):
    # Moments of several groups of words, and ends of tracks far apart.
    trace = drawn(5, 3, 250, 3000)
    assert check(policy, trace, [1, 3, 20, 150, 400, 700, 749], 1700) > 50_000


@pytest.mark.parametrize("policy", POLICIES)
def test_accesses_of_few_keys_again_and_again(policy):
    ids = np.random.default_rng(3).integers(0, 4, (400, 1, 1)).astype(np.uint8)
    assert check(policy, Trace.from_arrays(ids, num_experts=4), [0, 1, 2, 3, 4], 130)


@pytest.mark.pure
@pytest.mark.parametrize("policy", POLICIES)
def test_plain_caches_without_numba(policy):
    assert check(policy, drawn(2, 2, 30, 150), [0, 1, 7, 40, 59, 60], 40)
