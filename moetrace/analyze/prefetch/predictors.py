"""Who names the experts that a layer will demand, some layers ahead, and what that is worth to an LRU cache, in Numba.

When the router of a layer has spoken, a predictor names experts of the layer that comes `ahead` layers later (layers
come round: the first one after the last). Experts that will not be resident are fetched over a link, one after another
in the order in which they were named, while layers compute; a fetch that would not arrive in time is not begun. Experts
that arrive in vain are dropped: the cache is as if nothing had been prefetched.
"""

from typing import NamedTuple

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.analyze.cache.eviction import RecencyList, demand_recent
from moetrace.engine.prefetch import chance
from moetrace.jit.compile import kernel

LAST_TOKEN, SCORED, TRANSITION, RECORDED, ORACLE = range(5)
# Columns of totals.
NAMED, CORRECT, DEMANDED, MISSES, COVERED, TIMELY, FETCHED_BYTES, WASTED_BYTES = range(8)
COLUMNS = 8
_PREFETCHED = 2  # in /recorded/resident
_LARGE = 1e100


class Predictor(NamedTuple):
    """The state of a predictor."""

    kind: int
    most: int  # experts that it names; the oracle and recorded predictions name any number
    ahead: int  # layers
    # SCORED: what an access adds to its key's score grows by `growth` each step: by 1, and it is a frequency.
    score: np.ndarray  # float64 [layers, experts]
    gain: np.ndarray  # float64 [1]
    growth: float
    last: np.ndarray  # int32 [layers, experts]: LAST_TOKEN: experts of the layer's last event, the last one first
    last_count: np.ndarray  # int64 [layers]
    # TRANSITION: how often each expert of a layer follows each of the layer `ahead` before, as a share, learnt from the
    # requests of even and of odd numbers, and used for the rows of the others.
    share: np.ndarray  # float32 [2, layers, experts, experts], or [2, 0, 0, 0]
    recall: float  # ORACLE
    seed: int


class Costs(NamedTuple):
    """Times of fetching and computing on a system; without one, fetching takes no time."""

    size: np.ndarray  # int64 [keys]: bytes
    fetch_s: np.ndarray  # float64 [keys]
    run_s: np.ndarray  # float64 [keys]: to read an expert once from the GPU's memory
    dense_s: float  # the same for what else a layer has


class Routing(NamedTuple):
    """The choices of a block of whole steps."""

    experts: np.ndarray  # uint8 | uint16 [rows, layers, k]
    offset: np.ndarray  # int64 [steps + 1]
    half: np.ndarray  # uint8 [rows]: which half of the requests
    absent: int
    first_step: int


class Scratch(NamedTuple):
    """The state of one event, and a clock, in seconds of computing."""

    names: np.ndarray  # int64 [experts]
    named: np.ndarray  # int64 [keys]: number of the last event for which it was named
    arrived: np.ndarray  # int64 [keys]: number of the last event for which it arrived in time
    score: np.ndarray  # float64 [experts]
    now_s: np.ndarray  # float64 [1]: when the router of the layer at hand speaks
    spoke_s: np.ndarray  # float64 [ahead]: when those of the last layers did, a ring
    free_s: np.ndarray  # float64 [1]: when the link has done what it began


def scratch(layers: int, experts: int, ahead: int) -> Scratch:
    """Return scratch memory, as it is before the first event."""
    keys = layers * experts
    named, arrived = np.full(keys, -1), np.full(keys, -1)
    return Scratch(
        np.zeros(experts, np.int64), named, arrived, np.zeros(experts), np.zeros(1), np.zeros(ahead), np.zeros(1)
    )


def learn_transitions(count: np.ndarray, experts: np.ndarray, half: np.ndarray, absent: int, ahead: int) -> None:
    """Count in uint32 [2, layers, experts, experts] which expert follows which; half uint8 [rows] is 0 or 1."""
    _learn(count, experts, half, absent, ahead)


def replay_predictor(
    predictor: Predictor,
    cache: RecencyList,
    costs: Costs,
    scratch: Scratch,
    block: Accesses,
    routing: Routing,
    totals: np.ndarray,
) -> None:
    """Let a predictor name experts for each event of a block, and add the outcome to totals int64 [phases, 8]."""
    hit = np.empty(block.key.size, np.uint8)
    _replay(predictor, cache, costs, scratch, block, routing, hit, totals)


@kernel(inline=False)
def _learn(count, experts, half, absent, ahead):
    """Add to count uint32 [2, L, E, E] what follows what in experts [rows, L, k]; half uint8 [rows]."""
    for row in range(experts.shape[0]):
        for layer in range(ahead, experts.shape[1]):
            for slot in range(experts.shape[2]):
                before = np.int64(experts[row, layer - ahead, slot])
                if before == absent:
                    continue
                for other in range(experts.shape[2]):
                    now = np.int64(experts[row, layer, other])
                    if now != absent:
                        count[half[row], layer, before, now] += np.uint32(1)


@kernel(inline=False)
def _replay(predictor, cache, costs, scratch, block, routing, hit, totals):
    """Let the predictor name experts for each event; fill hit uint8 [n], add to totals int64 [phases, 8]."""
    layers, count = predictor.score.shape
    for event in range(block.bounds.size - 1):
        step, layer = event // layers, event % layers
        start, stop = block.bounds[event], block.bounds[event + 1]
        number = block.first + start
        turn = (routing.first_step * layers + event) % scratch.spoke_s.size
        if layer == 0:
            _next_step(predictor)
        if predictor.kind == TRANSITION:
            _score_transitions(predictor, scratch, routing, step, layer)
        elif predictor.kind == SCORED:
            for expert in range(count):
                scratch.score[expert] = predictor.score[layer, expert]
        names = _name(predictor, scratch, block, layer, start, stop, routing.first_step + step)
        if start < stop:
            of = totals[block.phase[step]]
            _fetch(cache, costs, scratch, layer * count, names, number, turn, of)
            _judge(cache, costs, scratch, block.key, start, stop, number, of)
        demand_recent(cache, layer if cache.used.size > 1 else 0, block.key, start, stop, hit)
        scratch.spoke_s[turn] = scratch.now_s[0]
        _observe(predictor, costs, scratch, block.key, layer, start, stop)


@kernel
def _next_step(predictor):
    """Let older accesses weigh less: what the next ones add grows, and all is scaled before it gets too large."""
    predictor.gain[0] *= predictor.growth
    if predictor.gain[0] > _LARGE:
        for layer in range(predictor.score.shape[0]):
            for expert in range(predictor.score.shape[1]):
                predictor.score[layer, expert] /= _LARGE
        predictor.gain[0] /= _LARGE


@kernel
def _score_transitions(predictor, scratch, routing, step, layer):
    """Sum the shares of a layer's experts over the choices of the step's rows, `ahead` layers before."""
    for expert in range(scratch.score.size):
        scratch.score[expert] = 0.0
    if layer < predictor.ahead:
        return
    for row in range(routing.offset[step], routing.offset[step + 1]):
        for slot in range(routing.experts.shape[2]):
            before = np.int64(routing.experts[row, layer - predictor.ahead, slot])
            if before != routing.absent:
                share = predictor.share[1 - routing.half[row], layer, before]
                for expert in range(scratch.score.size):
                    scratch.score[expert] += share[expert]


@kernel
def _name(predictor, scratch, block, layer, start, stop, step):
    """Fill names with experts, the likeliest first; return how many."""
    found, experts = 0, scratch.score.size
    if predictor.kind == LAST_TOKEN:
        found = min(predictor.most, predictor.last_count[layer])
        for i in range(found):
            scratch.names[i] = predictor.last[layer, i]
    elif predictor.kind == SCORED or predictor.kind == TRANSITION:
        while found < predictor.most:
            best = 0
            for expert in range(1, experts):
                best = expert if scratch.score[expert] > scratch.score[best] else best
            if scratch.score[best] <= 0:
                break
            scratch.names[found] = best
            scratch.score[best] = 0.0
            found += 1
    else:
        for i in range(start, stop):
            expert = block.key[i] - layer * experts
            if predictor.kind == RECORDED:
                known = block.recorded[i] == _PREFETCHED
            else:
                known = chance(predictor.seed, step, layer, expert) < predictor.recall
            if known:
                scratch.names[found] = expert
                found += 1
    return found


@kernel
def _fetch(cache, costs, scratch, first_key, names, number, turn, totals):
    """Fetch the named experts that are not resident and arrive in time over the link; add to totals int64 [8]."""
    begin_s = max(scratch.free_s[0], scratch.spoke_s[turn])
    for i in range(names):
        k = first_key + scratch.names[i]
        scratch.named[k] = number
        # A fetch that would end too late is not begun, but a smaller one after it may be.
        if cache.newer[k] < 0 and begin_s + costs.fetch_s[k] <= scratch.now_s[0]:
            begin_s += costs.fetch_s[k]
            scratch.arrived[k], scratch.free_s[0] = number, begin_s
            totals[FETCHED_BYTES] += costs.size[k]
            totals[WASTED_BYTES] += costs.size[k]  # until it is demanded
    totals[NAMED] += names


@kernel
def _judge(cache, costs, scratch, key, start, stop, number, totals):
    """Add to totals int64 [8] the correct names for keys start up to stop, before they are demanded."""
    for i in range(start, stop):
        k = key[i]
        missed, named = cache.newer[k] < 0, scratch.named[k] == number
        arrived = scratch.arrived[k] == number
        totals[CORRECT] += named
        totals[MISSES] += missed
        totals[COVERED] += missed and named
        totals[TIMELY] += arrived
        totals[WASTED_BYTES] -= costs.size[k] if arrived else 0
    totals[DEMANDED] += stop - start


@kernel
def _observe(predictor, costs, scratch, key, layer, start, stop):
    """Learn the demand, and the least time that the layer computes."""
    experts = scratch.score.size
    seconds = costs.dense_s
    for i in range(start, stop):
        predictor.score[layer, key[i] - layer * experts] += predictor.gain[0]
        predictor.last[layer, stop - 1 - i] = key[i] - layer * experts
        seconds += costs.run_s[key[i]]
    predictor.last_count[layer] = stop - start
    scratch.now_s[0] += seconds
