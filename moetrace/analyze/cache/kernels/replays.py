"""Which kernel replays which policy: the quick ones where sizes are equal and accesses come one at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moetrace.analyze.cache import eviction
from moetrace.analyze.cache.accesses import Accesses
from moetrace.analyze.cache.kernels import fifo, ghosts, scored, sieve, slots, stack, static

# Shown a block of accesses and their next uses (empty unless the policy looks ahead), yields for each capacity in turn
# which accesses hit, uint8 [n]; the array may be the same one each time.
Replay = Callable[[Accesses, np.ndarray], Iterator[np.ndarray]]

POLICIES = {
    "lru": "the expert accessed longest ago",
    "fifo": "the expert admitted longest ago",
    "sieve": "the first not accessed since a hand passed it, from the expert admitted longest ago on",
    "s3-fifo": "S3-FIFO: a small queue, whose experts go unless accessed twice, and a main one",
    "arc": "ARC: a balance of those accessed once and more often, led by what was evicted lately",
    "lfu": "the expert accessed least often so far; of several, longest ago",
    "lfu-in-cache": "the expert accessed least often since it was admitted; of several, longest ago",
    "ewma": "the expert of the least average of its accesses, which counts those long ago less",
    "least-stale": "an expert of the layer that comes round last; of several, accessed longest ago",
    "static-hindsight": "none: kept are the experts accessed most often in the whole trace",
    "static-prefill": "none: kept are the experts accessed most often in the prefill steps so far",
    "belady": "the expert whose next access is farthest; of several, accessed longest ago",
}
ONE_AT_A_TIME = {"s3-fifo": ghosts.S3_FIFO, "arc": ghosts.ARC}  # and of equal sizes
HINDSIGHT, PREFILL = STATIC = ("static-hindsight", "static-prefill")
_SCORED = {"ewma": scored.EWMA, "least-stale": scored.LEAST_STALE}
_RULES = {"lfu": eviction.LFU, "lfu-in-cache": eviction.LFU_IN_CACHE, "belady": eviction.BELADY}


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


def make_replay(policy: str, budgets: Sequence[Budget], demands: Demands) -> Replay:
    """Return what replays a policy at some capacities, from empty caches on."""
    plain = demands.sequential and not any(budget.in_bytes for budget in budgets)
    per_layer = demands.pools == demands.layers
    amounts = [budget.amount for budget in budgets]
    small = demands.experts <= stack.MAX_EXPERTS
    if plain and policy == "lru" and ((per_layer and small) or (not per_layer and len(budgets) >= _WORTH_A_STACK)):
        return _lru_by_distances(amounts, demands, per_layer)
    if plain and policy == "fifo":
        return _fifo_in_bits(amounts, demands)
    if policy in STATIC:
        return _static(policy, budgets, demands)
    if policy in ONE_AT_A_TIME:
        return _with_ghosts(ONE_AT_A_TIME[policy], amounts, demands)
    fits = demands.experts <= slots.MAX_EXPERTS and demands.choices <= slots.MAX_CHOICES
    if plain and policy in _RULES and per_layer and fits:
        return _in_slots(_RULES[policy], amounts, demands)
    return _one_by_one(policy, budgets, demands)


_WORTH_A_STACK = 4  # capacities: the distances of all layers' keys take as long as so many linked lists


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


def _fifo_in_bits(amounts: list[int], demands: Demands) -> Replay:
    together = [
        fifo.fifo_queues(demands.keys, amounts[first : first + fifo.CACHES], demands.pools)
        for first in range(0, len(amounts), fifo.CACHES)
    ]

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        del next_use
        hits = np.empty(block.key.size, np.uint16)
        for caches in together:
            fifo.replay_queues(caches, block, hits)
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


def _with_ghosts(policy: int, amounts: list[int], demands: Demands) -> Replay:
    caches = [ghosts.queues(demands.keys, amount, demands.pools) for amount in amounts]

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        del next_use
        hit = np.empty(block.key.size, np.uint8)
        for cache in caches:
            ghosts.replay_queues(cache, policy, block, demands.layers, hit)
            yield hit

    return replay


def _static(policy: str, budgets: Sequence[Budget], demands: Demands) -> Replay:
    equal = np.ones(demands.keys, np.int64)
    sets = [static.StaticSet(demands.size if b.in_bytes else equal, b.amount, demands.pools) for b in budgets]
    prefill = static.PrefillCounts(demands.keys)
    if policy == HINDSIGHT:
        for cache in sets:
            cache.want(demands.key_accesses)

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        del next_use
        hits = np.empty((len(sets), block.key.size), np.uint8)
        whole = [(0, block.bounds.size - 1, False)]
        for start, stop, anew in prefill.parts(block, demands.layers) if policy == PREFILL else whole:
            for cache, hit in zip(sets, hits, strict=True):
                if anew:
                    cache.want(prefill.count)
                cache.replay(block, start, stop, hit)
        yield from hits

    return replay


def _one_by_one(policy: str, budgets: Sequence[Budget], demands: Demands) -> Replay:
    equal = np.ones(demands.keys, np.int64)
    makes: dict[str, Any] = {"lru": eviction.recency_list, "fifo": fifo.fifo_list, "sieve": sieve.sieve}
    make = makes.get(policy, scored.scored if policy in _SCORED else eviction.ranked_heap)
    caches = [make(demands.size if b.in_bytes else equal, b.amount, demands.pools) for b in budgets]
    how = (demands.layers, demands.sequential)

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        hit = np.empty(block.key.size, np.uint8)
        for cache in caches:
            if isinstance(cache, eviction.RecencyList):
                eviction.evict_by_recency(cache, block, *how, hit)
            elif isinstance(cache, fifo.FifoList):
                fifo.replay_list(cache, block, *how, hit)
            elif isinstance(cache, sieve.Sieve):
                sieve.replay_sieve(cache, block, *how, hit)
            elif isinstance(cache, scored.Scored):
                scored.replay_scored(cache, _SCORED[policy], block, *how, hit)
            else:
                eviction.evict_by_rank(cache, _RULES[policy], block, next_use, *how, hit)
            yield hit

    return replay
