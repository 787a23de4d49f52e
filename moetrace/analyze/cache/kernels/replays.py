"""The replay of each cache policy: the quick kernels where sizes are equal and accesses come one at a time.

The functions at the end are what the records of residencies name (`CachePolicy.replays`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moetrace.analyze.cache import eviction
from moetrace.analyze.cache.accesses import Accesses
from moetrace.analyze.cache.kernels import fifo as queue
from moetrace.analyze.cache.kernels import ghosts, recent, scored, slots, stack, static, tracks, waiting
from moetrace.analyze.cache.kernels import sieve as with_hand
from moetrace.spec.choices import CachePolicy, resolve

# Shown a block of accesses and their next uses (empty unless the policy looks ahead), yields for each capacity in turn
# which accesses hit, uint8 [n]; the array may be the same one each time.
Replay = Callable[[Accesses, np.ndarray], Iterator[np.ndarray]]


class Budget(NamedTuple):
    """A cache's capacity in each pool: of keys, or of their bytes."""

    amount: int
    in_bytes: bool


class Demands(NamedTuple):
    """How the keys of a trace are demanded."""

    layers: int
    experts: int
    size: np.ndarray  # int64 [layers * experts]: bytes, if known
    pools: int  # 1, or one a layer
    sequential: bool
    choices: int  # of one layer, at most
    key_accesses: np.ndarray  # int64 [layers * experts]: accesses of each in the whole trace; [0] if not asked for

    @property
    def keys(self) -> int:
        """The number of keys."""
        return self.layers * self.experts

    @property
    def most_at_once(self) -> int:
        """The most keys that an event may have."""
        return 1 if self.sequential else self.experts


def make_replay(policy: CachePolicy, budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Return what replays a policy at some capacities, from empty caches on."""
    return resolve(policy.replays)(budgets, demands)


_WORTH_A_STACK = 4  # capacities: the distances of all layers' keys take as long as linked lists for this number of them


def _lru_by_distances(amounts: list[int], demands: Demands, per_layer: bool) -> Replay:
    stacks = stack.layer_stacks(demands.layers, demands.experts) if per_layer else stack.global_stack(demands.keys)

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        del next_use
        if isinstance(stacks, stack.LayerStacks):
            distance, most = np.empty(block.key.size, np.int16), demands.experts
            stack.layer_distances(stacks, block, demands.experts, True, distance)
        else:
            distance, most = np.empty(block.key.size, np.int32), demands.keys
            stack.global_distances(stacks, block, True, distance)
        for amount in amounts:
            yield (distance < min(amount, most)).view(np.uint8)

    return replay


def _lru_by_moment(amounts: list[int], demands: Demands) -> Replay:
    caches = [recent.RecentKeys(demands.keys, amount) for amount in amounts]

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        del next_use
        hit = np.empty(block.key.size, np.uint8)
        for cache in caches:
            cache.replay(block, demands.sequential, hit)
            yield hit

    return replay


def _fifo_in_bits(amounts: list[int], demands: Demands) -> Replay:
    together = [
        queue.fifo_queues(demands.keys, amounts[first : first + queue.CACHES], demands.pools)
        for first in range(0, len(amounts), queue.CACHES)
    ]

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        del next_use
        hits = np.empty(block.key.size, np.uint16)
        for caches in together:
            queue.replay_queues(caches, block, hits)
            for cache in range(caches.capacity.size):
                yield (hits >> cache & 1).astype(np.uint8)

    return replay


def _in_slots(rule: int, amounts: list[int], demands: Demands) -> Replay:
    caches = [slots.slots(demands.layers, demands.experts, amount) for amount in amounts]

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        hit = np.empty(block.key.size, np.uint8)
        for cache in caches:
            slots.replay_slots(cache, rule, block, next_use, hit)
            yield hit

    return replay


def _each(caches: Sequence[Any], replay_cache: Callable) -> Replay:
    """Replay caches one at a time, of equal sizes, that no future matters to: ``replay_cache(cache, block, hit)``."""

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        del next_use
        hit = np.empty(block.key.size, np.uint8)
        for cache in caches:
            replay_cache(cache, block, hit)
            yield hit

    return replay


def _belady_by_tracks(amounts: list[int], demands: Demands) -> Replay:
    caches = tracks.BeladyCaches(demands.keys, amounts)

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        del next_use
        hit = np.empty(block.key.size, np.uint8)
        before = caches.begin(block)
        for cache in range(len(amounts)):
            caches.replay(cache, before, hit)
            yield hit
        caches.end(hit.size)

    return replay


def _with_ghosts(policy: int, amounts: list[int], demands: Demands) -> Replay:
    caches = [ghosts.queues(demands.keys, amount, demands.pools) for amount in amounts]

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        del next_use
        hit = np.empty(block.key.size, np.uint8)
        for cache in caches:
            ghosts.replay_queues(cache, policy, block, demands.layers, hit)
            yield hit

    return replay


def _one_by_one(make: Callable, replay_cache: Callable, budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Replay any caches: ``replay_cache(cache, block, next_use, layers, sequential, hit)``."""
    equal = np.ones(demands.keys, np.int64)
    caches = [make(demands.size if b.in_bytes else equal, b.amount, demands.pools) for b in budgets]

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        hit = np.empty(block.key.size, np.uint8)
        for cache in caches:
            replay_cache(cache, block, next_use, demands.layers, demands.sequential, hit)
            yield hit

    return replay


def _scored(rule: int, budgets: Sequence[Budget], demands: Demands) -> Replay:
    def replay_cache(cache: Any, block: Accesses, _: np.ndarray, *how: Any) -> None:
        scored.replay_scored(cache, rule, block, *how)

    return _one_by_one(scored.scored, replay_cache, budgets, demands)


def _ranked(rule: int, budgets: Sequence[Budget], demands: Demands) -> Replay:
    fits = demands.experts <= slots.MAX_EXPERTS and demands.choices <= slots.MAX_CHOICES
    if _is_plain(budgets, demands) and demands.pools == demands.layers and fits:
        return _in_slots(rule, [budget.amount for budget in budgets], demands)

    def replay_cache(cache: Any, block: Accesses, next_use: np.ndarray, *how: Any) -> None:
        eviction.evict_by_rank(cache, rule, block, next_use, *how)

    return _one_by_one(eviction.ranked_heap, replay_cache, budgets, demands)


def _is_plain(budgets: Sequence[Budget], demands: Demands) -> bool:
    return demands.sequential and not any(budget.in_bytes for budget in budgets)


def lru(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Evict the expert accessed longest ago."""
    per_layer, small = demands.pools == demands.layers, demands.experts <= stack.MAX_EXPERTS
    amounts, in_keys = [budget.amount for budget in budgets], not any(budget.in_bytes for budget in budgets)
    by_distances = small if per_layer else len(budgets) >= _WORTH_A_STACK
    if in_keys and demands.pools == 1 and min([*amounts, demands.keys]) >= recent.least_capacity(demands.most_at_once):
        return _lru_by_moment(amounts, demands)
    if _is_plain(budgets, demands) and by_distances:
        return _lru_by_distances(amounts, demands, per_layer)

    def replay_cache(cache: Any, block: Accesses, _: np.ndarray, *how: Any) -> None:
        eviction.evict_by_recency(cache, block, *how)

    return _one_by_one(eviction.recency_list, replay_cache, budgets, demands)


def fifo(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Evict the expert admitted longest ago."""
    if _is_plain(budgets, demands):
        return _fifo_in_bits([budget.amount for budget in budgets], demands)

    def replay_cache(cache: Any, block: Accesses, _: np.ndarray, *how: Any) -> None:
        queue.replay_list(cache, block, *how)

    return _one_by_one(queue.fifo_list, replay_cache, budgets, demands)


def sieve(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Evict the first that a hand finds not accessed."""
    if _is_plain(budgets, demands) and demands.pools == 1:
        return _each([with_hand.sieve_row(demands.keys, budget.amount) for budget in budgets], with_hand.replay_row)

    def replay_cache(cache: Any, block: Accesses, _: np.ndarray, *how: Any) -> None:
        with_hand.replay_sieve(cache, block, *how)

    return _one_by_one(with_hand.sieve, replay_cache, budgets, demands)


def s3_fifo(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Evict by S3-FIFO."""
    return _with_ghosts(ghosts.S3_FIFO, [budget.amount for budget in budgets], demands)


def arc(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Evict by ARC."""
    return _with_ghosts(ghosts.ARC, [budget.amount for budget in budgets], demands)


def lfu(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Evict the expert accessed least often so far."""
    return _ranked(eviction.LFU, budgets, demands)


def lfu_in_cache(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Evict the expert accessed least often since it was admitted."""
    if _is_plain(budgets, demands) and demands.pools == 1:
        return _each([waiting.counted(demands.keys, budget.amount) for budget in budgets], waiting.replay_counted)
    return _ranked(eviction.LFU_IN_CACHE, budgets, demands)


def belady(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Evict the expert whose next access is farthest."""
    if _is_plain(budgets, demands) and demands.pools == 1:
        return _belady_by_tracks([budget.amount for budget in budgets], demands)
    return _ranked(eviction.BELADY, budgets, demands)


def ewma(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Evict the expert of the least average of its accesses."""
    return _scored(scored.EWMA, budgets, demands)


def lfuda(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Evict the expert accessed least often, with limited counts and a cache that ages."""
    return _scored(scored.LFUDA, budgets, demands)


def lfu_window(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Evict the expert accessed in the fewest of the last steps."""
    return _scored(scored.LFU_WINDOW, budgets, demands)


def least_stale(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Evict an expert of the layer that comes round last."""
    return _scored(scored.LEAST_STALE, budgets, demands)


def static_hindsight(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Keep the experts accessed most often in the whole trace."""
    sets = _sets(budgets, demands)
    for cache in sets:
        cache.want(demands.key_accesses)

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        del next_use
        hit = np.empty(block.key.size, np.uint8)
        for cache in sets:
            cache.replay(block, 0, block.bounds.size - 1, hit)
            yield hit

    return replay


def static_prefill(budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Keep the experts that most rows chose in the prefill steps so far."""
    sets, prefill = _sets(budgets, demands), static.PrefillCounts(demands.keys)

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        del next_use
        hits = np.empty((len(sets), block.key.size), np.uint8)
        for start, stop, anew in prefill.parts(block, demands.layers):
            for cache, hit in zip(sets, hits, strict=True):
                if anew:
                    cache.want(prefill.count)
                cache.replay(block, start, stop, hit)
        yield from hits

    return replay


def _sets(budgets: Sequence[Budget], demands: Demands) -> list[static.StaticSet]:
    equal = np.ones(demands.keys, np.int64)
    return [static.StaticSet(demands.size if b.in_bytes else equal, b.amount, demands.pools) for b in budgets]
