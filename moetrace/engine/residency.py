"""What the GPU keeps between steps (timing model, section 7).

A residency is a hook, called after each layer before anything is evicted: it writes ``score`` (the least is evicted
first, infinity never) and ``admit`` (whether a copy that arrives may be kept) of any expert in ``state``. Who is then
touched, offered and evicted is the engine's business, here: so no hook can exceed the capacity.
"""

from typing import NamedTuple

import numpy as np

from moetrace.engine.compile import kernel
from moetrace.engine.state import CELL, records


class Cache(NamedTuple):
    """The copies that the GPU holds. A *code* is ``layer * E + expert``; a *pool* is a layer, or all layers.

    Those that may be evicted stand in a ring a pool, by (touched, code): touching one, and finding the one touched
    longest ago, take the same few nanoseconds whatever the capacity. Node ``L * E + pool`` is where the ring closes.
    """

    resident: np.ndarray  # uint8 [L * E]
    after: np.ndarray  # int64 [L * E + pools]: the next to be touched; -1 = not in a ring
    before: np.ndarray  # int64 [L * E + pools]
    residents: np.ndarray  # int64 [pools]
    fresh: np.ndarray  # uint8 [L * E]: prefetched, and not yet run on the GPU
    active: np.ndarray  # uint8 [L * E]: not to be evicted now
    touched: np.ndarray  # int64 [L * E]: when it was last touched, 0 = never
    capacity: int  # of each pool
    flat: int  # 1: scores are equal where they are not infinite, so the first of the ring is the victim


def empty_cache(layers: int, experts: int, pools: int, capacity: int, flat: bool) -> Cache:
    """Return an empty cache of ``pools`` pools (1 or ``layers``) that hold ``capacity`` experts each."""
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
        capacity=capacity,
        flat=int(flat),
    )


def empty_cells(layers: int, experts: int, admit: bool) -> np.ndarray:
    """Return the experts' records (``CELL`` [L, E]) as they are before the first step."""
    cells = records((layers, experts), CELL)
    cells["admit"] = admit
    return cells


def hold(cells: np.ndarray, cache: Cache, codes: np.ndarray) -> None:
    """Put experts (int64 [n] codes, as many as fit) into the cache for good, before the first step."""
    layer, expert = np.divmod(codes, cells.shape[1])
    cache.resident[codes] = 1
    np.add.at(cache.residents, layer if len(cache.residents) > 1 else 0 * layer, 1)
    cells["resident"][layer, expert] = 1
    cells["score"][layer, expert] = np.inf


# The hooks


def unchanged(state, view, layer, load, plan):
    """``none``, ``static``, ``prefill``, ``lru``: equal scores, so the one touched longest ago goes first."""


def by_frequency(state, view, layer, load, plan):
    """``lfu``: the number of demands so far, halved every ``half_life`` steps."""
    if layer == 0 and view.half_life > 0 and view.step > 0 and view.step % view.half_life == 0:
        for cell_layer in range(state.shape[0]):
            for e in range(state.shape[1]):
                state[cell_layer, e].score *= 0.5
    for i in range(load.size):
        state[layer, view.active[i].expert].score += 1.0


def by_average(state, view, layer, load, plan):
    """``ewma``: ``alpha * n / T + (1 - alpha) * score`` for every expert of the layer."""
    for e in range(state.shape[1]):
        state[layer, e].score *= 1.0 - view.alpha
    for i in range(load.size):
        state[layer, view.active[i].expert].score += view.alpha * load[i] / view.rows


def by_next_use(state, view, layer, load, plan):
    """``belady``: the one whose next demand is farthest goes first."""
    for i in range(load.size):
        state[layer, view.active[i].expert].score = -view.active[i].next_use


# Residencies that keep what arrives only in part or not at all, and those whose scores do not differ.
KEEPS_SOME = ("none", "static", "prefill")
FLAT = (*KEEPS_SOME, "lru")
RESIDENCY = {
    "none": unchanged,
    "static": unchanged,
    "prefill": unchanged,
    "lru": unchanged,
    "lfu": by_frequency,
    "ewma": by_average,
    "belady": by_next_use,
}

# What the engine does with them


@kernel
def pool_of(cache, layer):
    """Return the pool that a layer's experts share."""
    return layer if cache.residents.size > 1 else 0


@kernel
def link(cache, code, follower):
    """Put an expert into a ring, in front of ``follower``."""
    leader = cache.before[follower]
    cache.after[leader], cache.before[code] = code, leader
    cache.after[code], cache.before[follower] = follower, code


@kernel
def unlink(cache, code):
    """Take an expert out of its ring."""
    leader, follower = cache.before[code], cache.after[code]
    cache.after[leader], cache.before[follower] = follower, leader
    cache.after[code] = -1


@kernel
def evict(cells, cache, pool, tally):
    """Evict the resident of least score that is not active; return whether there was one.

    Ties: touched longest ago, then lower layer, then lower id, which is the order of the ring.
    """
    experts = cells.shape[1]
    end = cache.resident.size + pool
    victim, least = -1, np.inf
    code = cache.after[end]
    while code != end:
        if cache.active[code] == 0:
            score = cells[code // experts, code % experts].score
            if score < least:
                victim, least = code, score
                if cache.flat:
                    break
        code = cache.after[code]
    if victim < 0:
        return False
    unlink(cache, victim)
    cells[victim // experts, victim % experts].resident = 0
    cache.resident[victim] = 0
    cache.residents[pool] -= 1
    tally[0].wasted += cache.fresh[victim]
    cache.fresh[victim] = 0
    return True


@kernel
def keep(cells, cache, layer, expert, tally):
    """Keep a copy that has arrived, if it may be kept and there is room or a victim; return whether it is kept.

    It then has yet to be put into the ring.
    """
    pool, code = pool_of(cache, layer), layer * cells.shape[1] + expert
    if cells[layer, expert].admit == 0 or cache.resident[code]:
        return False
    if cache.residents[pool] >= cache.capacity and not evict(cells, cache, pool, tally):
        return False
    cells[layer, expert].resident = 1
    cache.resident[code] = 1
    cache.residents[pool] += 1
    return True


@kernel
def link_by_age(cells, cache, code):
    """Put an expert where its last touch belongs; with equal scores one that is never evicted needs no place."""
    experts = cells.shape[1]
    if cache.flat and cells[code // experts, code % experts].score == np.inf:
        return
    touched = cache.touched[code]
    end = cache.resident.size + pool_of(cache, code // experts)
    other = cache.after[end]
    while other != end:
        other_touched = cache.touched[other]
        if other_touched > touched or (other_touched == touched and other > code):
            break
        other = cache.after[other]
    link(cache, code, other)


@kernel
def settle(cells, cache, layer, active, size, plan, tally):
    """After a layer, in demand order: touch what is resident, offer what was fetched."""
    first = layer * cells.shape[1]
    end = cache.resident.size + pool_of(cache, layer)
    for i in range(size):
        cache.active[first + active[i].expert] = 1
    for i in range(size):
        expert = active[i].expert
        code = first + expert
        if cache.resident[code]:
            linked = cache.after[code] >= 0
            if linked:
                unlink(cache, code)
        elif plan[i] and keep(cells, cache, layer, expert, tally):
            linked = not (cache.flat and cells[layer, expert].score == np.inf)
        else:
            continue
        if linked:
            link(cache, code, end)
        tally[0].clock += 1
        cache.touched[code] = cells[layer, expert].touched = tally[0].clock
    for i in range(size):
        cache.active[first + active[i].expert] = 0
