"""Policies whose order of victims changes as time goes by: EWMA and least-stale. Each victim is looked for among all.

- EWMA: a key's score is the sum over its accesses, resident or not, of `(1 - alpha) ** age`, age in steps; the victim
  has the least score.
- least-stale: layers come round in order, so that the layer just done is the one that comes last. The victim is of the
  layer that comes last: of this layer itself, then of the one before it, and so on.

Among equal ones, the victim is what was touched longest ago.
"""

from typing import NamedTuple

import numpy as np

from moetrace.analyze.accesses import Accesses
from moetrace.engine.compile import kernel

EWMA, LEAST_STALE = 0, 1
ALPHA = 0.3  # as in the timing model, section 7
_LARGE = 1e100


class Scored(NamedTuple):
    """A cache whose victims are found by a look at all residents of the pool."""

    weight: np.ndarray  # int64 [keys]
    capacity: int  # of each pool, in units of weight
    used: np.ndarray  # int64 [pools]
    residents: np.ndarray  # int64 [pools]: how many keys
    member: np.ndarray  # int32 [keys]: residents in no order; those of pool p begin at p * keys / pools
    place: np.ndarray  # int32 [keys]: where in `member`; -1 = not resident
    # EWMA: instead of all scores that fall from step to step, what an access adds grows. Ratios are the same.
    score: np.ndarray  # float64 [keys]
    gain: np.ndarray  # float64 [1]: what an access adds in this step
    touched: np.ndarray  # int64 [keys]: number of the last access
    event: np.ndarray  # int64 [keys]: number of the first access of the last event that demanded it


def scored(weight: np.ndarray, capacity: int, pools: int) -> Scored:
    """Return an empty cache of keys of `weight` (int64), with `capacity` in each of the pools."""
    keys = weight.size
    used, residents = np.zeros(pools, np.int64), np.zeros(pools, np.int64)
    member, place = np.zeros(keys, np.int32), np.full(keys, -1, np.int32)
    score, gain, touched, event = np.zeros(keys), np.ones(1), np.full(keys, -1), np.full(keys, -1)
    return Scored(weight, capacity, used, residents, member, place, score, gain, touched, event)


def replay_scored(cache: Scored, rule: int, block: Accesses, layers: int, sequential: bool, hit: np.ndarray) -> None:
    """Replay the accesses of a block, filling hit uint8 [n]; rule is EWMA or LEAST_STALE."""
    _replay(cache, rule, block, layers, sequential, hit)


@kernel(inline=False)
def _replay(cache, rule, block, layers, sequential, hit):
    bounds = block.bounds
    for event in range(bounds.size - 1):
        layer = event % layers
        if layer == 0:
            _next_step(cache)
        pool = layer if cache.used.size > 1 else 0
        start, stop = bounds[event], bounds[event + 1]
        if sequential:
            for i in range(start, stop):
                _demand(cache, rule, pool, (layer, layers), block, i, i + 1, hit)
        else:
            _demand(cache, rule, pool, (layer, layers), block, start, stop, hit)


@kernel
def _next_step(cache):
    cache.gain[0] /= 1 - ALPHA
    if cache.gain[0] > _LARGE:
        for key in range(cache.score.size):
            cache.score[key] /= _LARGE
        cache.gain[0] /= _LARGE


@kernel
def _demand(cache, rule, pool, layer, block, start, stop, hit):
    event, ours = block.first + start, 0
    for i in range(start, stop):
        k = block.key[i]
        hit[i] = cache.place[k] >= 0
        ours += hit[i] > 0
        cache.event[k], cache.touched[k] = event, block.first + i
        cache.score[k] += cache.gain[0]
    for i in range(start, stop):
        k, weight = block.key[i], cache.weight[block.key[i]]
        if hit[i] or weight > cache.capacity:
            continue
        while cache.used[pool] + weight > cache.capacity and cache.residents[pool] > ours:
            _remove(cache, pool, _victim(cache, rule, pool, layer, event))
        if cache.used[pool] + weight <= cache.capacity:
            cache.place[k] = pool * (cache.member.size // cache.used.size) + cache.residents[pool]
            cache.member[cache.place[k]] = k
            cache.used[pool] += weight
            cache.residents[pool] += 1
            ours += 1


@kernel
def _victim(cache, rule, pool, layer, event):
    """Return where in `member` the victim is: of least score, touched longest ago, and not of the event."""
    experts = cache.member.size // layer[1]
    start = pool * (cache.member.size // cache.used.size)
    best, best_score, best_touched = -1, 0.0, 0
    for place in range(start, start + cache.residents[pool]):
        k = cache.member[place]
        if cache.event[k] == event:
            continue
        score = cache.score[k]
        if rule == LEAST_STALE:
            ahead = (k // experts - layer[0]) % layer[1]
            score = -float(ahead if ahead else layer[1])
        if best < 0 or score < best_score or (score == best_score and cache.touched[k] < best_touched):
            best, best_score, best_touched = place, score, cache.touched[k]
    return best


@kernel
def _remove(cache, pool, place):
    victim = cache.member[place]
    cache.used[pool] -= cache.weight[victim]
    cache.residents[pool] -= 1
    last = pool * (cache.member.size // cache.used.size) + cache.residents[pool]
    cache.member[place] = cache.member[last]
    cache.place[cache.member[place]] = place
    cache.place[victim] = -1
