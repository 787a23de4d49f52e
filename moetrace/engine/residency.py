"""Experts that the GPU keeps between steps (timing model, section 7).

A residency is a hook (`residencies/`), called after each layer before anything is evicted: it writes ``score`` (the
least is evicted first, infinity never) and ``admit`` (whether a copy that arrives may be kept) of any expert in
``state``. Who is then touched, offered and evicted is the engine's business, here: so no hook can exceed the capacity.
"""

from typing import NamedTuple

import numpy as np

from moetrace.engine.state import CELL, ON_GPU, records
from moetrace.jit.compile import kernel
from moetrace.spec.choices import BY_ADMISSION, BY_AGE, BY_HAND, BY_SCORE


class Cache(NamedTuple):
    """The copies that the GPU holds. A *key* is ``layer * E + expert``; a *pool* is a layer, or all layers.

    The experts that may be evicted stand in a ring a pool, by (touched, key) or in the order of their admission:
    touching one, and finding the first, take the same few nanoseconds for any capacity. Node ``L * E + pool`` is where
    the ring closes.
    """

    resident: np.ndarray  # uint8 [L * E]
    after: np.ndarray  # int64 [L * E + pools]: the next to be touched; -1 = not in a ring
    before: np.ndarray  # int64 [L * E + pools]
    residents: np.ndarray  # int64 [pools]
    fresh: np.ndarray  # uint8 [L * E]: prefetched, and not yet run on the GPU
    active: np.ndarray  # uint8 [L * E]: not to be evicted now
    touched: np.ndarray  # int64 [L * E]: when it was last touched, 0 = never
    visited: np.ndarray  # uint8 [L * E]: demanded since it was admitted, or since the hand passed
    wanted: np.ndarray  # uint8 [L * E]: by the prompts, or kept for good: not to be evicted
    hand: np.ndarray  # int64 [pools]: the node that it looks at next
    age: np.ndarray  # float64 [pools]: BY_AGE: the greatest score that was evicted, 0 at the start
    capacity: np.ndarray  # int64 [pools]
    order: int  # BY_AGE, BY_SCORE, BY_TOUCH, BY_ADMISSION or BY_HAND
    evicted_share: float  # BY_AGE: what an expert keeps of its count (`memory`) when it is evicted


def empty_cache(
    layers: int, experts: int, pools: int, capacity: int | np.ndarray, order: int, evicted_share: float = 1.0
) -> Cache:
    """Return an empty cache of ``pools`` pools (1 or ``layers``) that hold ``capacity`` experts, each or one by one."""
    cells = layers * experts
    ring = np.concatenate((np.full(cells, -1), np.arange(cells, cells + pools)))
    return Cache(
        resident=np.zeros(cells, np.uint8),
        after=ring,
        before=ring.copy(),
        residents=np.zeros(pools, np.int64),
        fresh=np.zeros(cells, np.uint8),
        active=np.zeros(cells, np.uint8),
        touched=np.zeros(cells, np.int64),
        visited=np.zeros(cells, np.uint8),
        wanted=np.zeros(cells, np.uint8),
        hand=ring[cells:].copy(),
        age=np.zeros(pools),
        capacity=np.broadcast_to(np.asarray(capacity, np.int64), pools).copy(),
        order=order,
        evicted_share=evicted_share,
    )


def empty_cells(layers: int, experts: int, admit: bool) -> np.ndarray:
    """Return the experts' records (``CELL`` [L, E]) as they are before the first step."""
    cells = records((layers, experts), CELL)
    cells["admit"] = admit
    return cells


def keep_for_good(cells: np.ndarray, cache: Cache, keys: np.ndarray) -> None:
    """Put experts (int64 [n] keys, as many as fit) into the cache for good, before the first step."""
    layer, expert = np.divmod(keys, cells.shape[1])
    cache.resident[keys] = cache.wanted[keys] = 1
    np.add.at(cache.residents, layer if len(cache.residents) > 1 else 0 * layer, 1)
    cells["resident"][layer, expert] = 1
    cells["score"][layer, expert] = np.inf


# The rules that a hook and a cache of `moetrace analyze cache` share

# Defaults of lfuda: the most that a count can be, and the part of it that an evicted expert keeps.
MOST_COUNT, EVICTED_SHARE = 12.0, 0.5
# Steps that lfu-window looks back on: one bit of a float's 53 for each.
WINDOW = 48
WINDOW_MARKS = 2.0**WINDOW


@kernel
def demands(before, since_admitted, resident):
    """Return how many demands an expert has with this one: ever, or since it was admitted."""
    return 1 if since_admitted and not resident else before + 1


@kernel
def counted(count, most_count):
    """Return an expert's count with a demand more."""
    return min(count + 1.0, most_count)


@kernel
def a_step_on(marks):
    """Return the marks of the last ``WINDOW`` steps, bits of a float with the newest lowest, as they are a step later.

    The new step has no mark yet; the second result is 1 if one has left the window, else 0.
    """
    left = marks >= WINDOW_MARKS / 2
    return (2.0 * marks - WINDOW_MARKS if left else 2.0 * marks), 1.0 if left else 0.0


@kernel
def score_of_layer(step, layer, layers):
    """Return the score of experts whose layer ran last in a step: the layer just done comes round last."""
    return -(step * layers + layer + 1.0)


@kernel
def faded(score, alpha):
    """Return an average a step later; ``gained`` is added for experts demanded in it."""
    return score * (1.0 - alpha)


@kernel
def gained(rows, of_rows, alpha):
    """Return what a demand by ``rows`` of a step's ``of_rows`` adds to an average."""
    return alpha * rows / of_rows


@kernel
def find_unvisited(after, visited, guard, guarded, at, end, residents):
    """Return the first of a ring not visited, from ``at`` on; it forgets the visits of those that it passes.

    ``end`` is the node where the ring closes; those whose ``guard`` is ``guarded`` are left as they are. -1 = all are.
    """
    for _ in range(2 * residents + 2):
        if at != end and guard[at] != guarded:
            if not visited[at]:
                return at
            visited[at] = 0
        at = after[at]
    return -1


def unchanged(state, view, layer, load, plan):
    """Residencies that use the ring: equal scores, so the one touched (or admitted) longest ago goes first."""
    return  # Numba names the line after a docstring in debug information, so there must be one


# How the engine calls them


@kernel
def pool_of(cache, layer):
    """Return the pool that a layer's experts share."""
    return layer if cache.residents.size > 1 else 0


@kernel
def link(cache, key, follower):
    """Put an expert into a ring, in front of ``follower``."""
    leader = cache.before[follower]
    cache.after[leader], cache.before[key] = key, leader
    cache.after[key], cache.before[follower] = follower, key


@kernel
def unlink(cache, key):
    """Take an expert out of its ring."""
    leader, follower = cache.before[key], cache.after[key]
    cache.after[leader], cache.before[follower] = follower, leader
    cache.after[key] = -1


@kernel
def evict(cells, cache, pool, tally):
    """Evict the resident of least score that is not active; return whether there was one.

    Ties: touched longest ago, then lower layer, then lower id, which is the order of the ring (but by hand).
    """
    experts = cells.shape[1]
    victim = _first_unvisited(cache, pool) if cache.order == BY_HAND else _least(cells, cache, pool)
    if victim < 0:
        return False
    unlink(cache, victim)
    cells[victim // experts, victim % experts].resident = 0
    if cache.order == BY_AGE:
        _grow_old(cells[victim // experts, victim % experts], cache, pool)
    cache.resident[victim] = 0
    cache.residents[pool] -= 1
    tally[0].wasted += cache.fresh[victim]
    tally[0].evictions += 1
    cache.fresh[victim] = 0
    return True


@kernel
def _grow_old(victim, cache, pool):
    """Let a pool be as old as what it evicts, a record of CELL, which forgets a part of its count."""
    cache.age[pool] = max(cache.age[pool], victim.score)
    victim.memory *= cache.evicted_share


@kernel
def _least(cells, cache, pool):
    """Return the first of the ring of least score that is not active, -1 = none."""
    experts = cells.shape[1]
    end = cache.resident.size + pool
    victim, least = -1, np.inf
    key = cache.after[end]
    while key != end:
        if cache.active[key] == 0:
            score = cells[key // experts, key % experts].score
            if score < least:
                victim, least = key, score
                if cache.order > BY_SCORE:
                    break
        key = cache.after[key]
    return victim


@kernel
def _first_unvisited(cache, pool):
    """Return the first not visited that is not active, -1 = none; the hand then stands behind it."""
    end, residents = cache.resident.size + pool, cache.residents[pool]
    victim = find_unvisited(cache.after, cache.visited, cache.active, 1, cache.hand[pool], end, residents)
    if victim >= 0:
        cache.hand[pool] = cache.after[victim]
    return victim


@kernel
def keep(cells, cache, layer, expert, tally):
    """Keep a copy that has arrived, if it may be kept and there is room or a victim; return whether it is kept.

    It then has yet to be put into the ring.
    """
    pool, key = pool_of(cache, layer), layer * cells.shape[1] + expert
    if cells[layer, expert].admit == 0 or cache.resident[key]:
        return False
    if cache.residents[pool] >= cache.capacity[pool] and not evict(cells, cache, pool, tally):
        return False
    cells[layer, expert].resident = 1
    cache.resident[key] = 1
    cache.residents[pool] += 1
    cache.visited[key] = 0
    return True


@kernel
def link_by_age(cells, cache, key):
    """Put an expert where its last touch (or admission) belongs; without scores, one kept for good has no place."""
    experts = cells.shape[1]
    if cache.order > BY_SCORE and cells[key // experts, key % experts].score == np.inf:
        return
    touched = cache.touched[key]
    end = cache.resident.size + pool_of(cache, key // experts)
    other = end if cache.order >= BY_ADMISSION else cache.after[end]
    while other != end:
        other_touched = cache.touched[other]
        if other_touched > touched or (other_touched == touched and other > key):
            break
        other = cache.after[other]
    link(cache, key, other)


@kernel
def touch_and_admit(cells, cache, layer, size, scratch, fetched, tally):
    """After a layer, in demand order: touch residents, offer those that were ``fetched``; none evicts another."""
    first, active, plan = layer * cells.shape[1], scratch.active, scratch.plan
    end = cache.resident.size + pool_of(cache, layer)
    clock = tally[0].clock
    for i in range(size if fetched > 0 else 0):
        cache.active[first + active[i].expert] = 1
    listed = 0
    for i in range(size):  # listed without a branch: the processor could not guess who is resident
        scratch.load[listed] = i
        listed += (active[i].resident != 0) | (plan[i] == ON_GPU)
    for j in range(listed):
        i = scratch.load[j]
        expert = active[i].expert
        key = first + expert
        if cache.resident[key]:
            linked = cache.after[key] >= 0
            if cache.order >= BY_ADMISSION:
                cache.visited[key] = 1
                linked = False
            elif linked:
                unlink(cache, key)
        elif keep(cells, cache, layer, expert, tally):
            linked = not (cache.order > BY_SCORE and cells[layer, expert].score == np.inf)
        else:
            continue
        if linked:
            link(cache, key, end)
        clock += 1
        cache.touched[key] = cells[layer, expert].touched = clock
    tally[0].clock = clock
    for i in range(size if fetched > 0 else 0):
        cache.active[first + active[i].expert] = 0
