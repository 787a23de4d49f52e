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
    """The copies that the GPU holds. A *code* is ``layer * E + expert``; a *pool* is a layer, or all layers."""

    slot: np.ndarray  # int64 [L * E]: where in its pool a resident stands, -1 = not resident
    members: np.ndarray  # int64 [pools, capacity]: codes of the residents
    count: np.ndarray  # int64 [pools]
    fresh: np.ndarray  # uint8 [L * E]: prefetched, and not yet run on the GPU
    active: np.ndarray  # uint8 [L * E]: not to be evicted now


def empty_cache(layers: int, experts: int, pools: int, capacity: int) -> Cache:
    """Return an empty cache of ``pools`` pools (1 or ``layers``) that hold ``capacity`` experts each."""
    cells = layers * experts
    return Cache(
        slot=np.full(cells, -1),
        members=np.zeros((pools, max(capacity, 1)), np.int64)[:, :capacity].copy(),
        count=np.zeros(pools, np.int64),
        fresh=np.zeros(cells, np.uint8),
        active=np.zeros(cells, np.uint8),
    )


def empty_cells(layers: int, experts: int, admit: bool) -> np.ndarray:
    """Return the experts' records (``CELL`` [L, E]) as they are before the first step."""
    cells = records((layers, experts), CELL)
    cells["admit"] = admit
    return cells


def hold(cells: np.ndarray, cache: Cache, codes: np.ndarray) -> None:
    """Put experts (int64 [n] codes, as many as fit) into the cache for good, before the first step."""
    pools, experts = len(cache.count), cells.shape[1]
    for code in codes:
        layer, expert = divmod(int(code), experts)
        pool = layer if pools > 1 else 0
        cache.slot[code] = cache.count[pool]
        cache.members[pool, cache.count[pool]] = code
        cache.count[pool] += 1
        cells["resident"][layer, expert] = 1
        cells["score"][layer, expert] = np.inf


# The hooks


def unchanged(state, view, layer, load, plan):
    """``none``, ``static``, ``prefill``, ``lru``: equal scores, so the one touched longest ago goes first."""


def by_frequency(state, view, layer, load, plan):
    """``lfu``: the number of demands so far, halved every ``half_life`` steps."""
    if layer == 0 and view.half_life > 0 and view.step > 0 and view.step % view.half_life == 0:
        for l in range(state.shape[0]):
            for e in range(state.shape[1]):
                state[l, e].score *= 0.5
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
def evict(cells, cache, pool, tally):
    """Evict the member of least score that is not active; return whether there was one.

    Ties: touched longest ago, then lower layer, then lower id.
    """
    experts = cells.shape[1]
    victim, score, touched = -1, np.inf, 0
    for m in range(cache.count[pool]):
        code = cache.members[pool, m]
        cell = cells[code // experts, code % experts]
        if cell.score > score or cell.score == np.inf or cache.active[code]:
            continue
        if cell.score < score or cell.touched < touched or (cell.touched == touched and code < victim):
            victim, score, touched = code, cell.score, cell.touched
    if victim < 0:
        return False
    cells[victim // experts, victim % experts].resident = 0
    tally[0].wasted += cache.fresh[victim]
    cache.fresh[victim] = 0
    cache.count[pool] -= 1
    last = cache.members[pool, cache.count[pool]]
    cache.members[pool, cache.slot[victim]] = last
    cache.slot[last] = cache.slot[victim]
    cache.slot[victim] = -1
    return True


@kernel
def admit(cells, cache, layer, expert, tally):
    """Keep a copy that has arrived, if it may be kept and there is room or a victim; return whether it is kept."""
    pool = layer if cache.count.size > 1 else 0
    if cells[layer, expert].admit == 0:
        return False
    if cache.count[pool] >= cache.members.shape[1] and not evict(cells, cache, pool, tally):
        return False
    code = layer * cells.shape[1] + expert
    cache.slot[code] = cache.count[pool]
    cache.members[pool, cache.count[pool]] = code
    cache.count[pool] += 1
    cells[layer, expert].resident = 1
    return True


@kernel
def settle(cells, cache, layer, active, size, plan, tally):
    """After a layer, in demand order: touch what is resident, offer what was fetched."""
    first = layer * cells.shape[1]
    for i in range(size):
        cache.active[first + active[i].expert] = 1
    for i in range(size):
        expert = active[i].expert
        if cache.slot[first + expert] >= 0 or (plan[i] and admit(cells, cache, layer, expert, tally)):
            tally[0].clock += 1
            cells[layer, expert].touched = tally[0].clock
    for i in range(size):
        cache.active[first + active[i].expert] = 0
