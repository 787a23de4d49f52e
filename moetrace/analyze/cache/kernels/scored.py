"""Policies whose victim is looked for among all residents: EWMA, least-stale, LFUDA and LFU of a window.

- EWMA: each time a layer comes, the scores of all its keys, resident or not, fade, and those accessed gain by the share
  of the step's rows that chose them; the victim has the least score.
- least-stale: layers come round in order, so that the layer just done is the one that comes last. The victim is of the
  layer that comes last: of this layer itself, then of the one before it, and so on.
- LFUDA: a demand scores its key by its count, which is limited, and the age of the pool: the greatest score that was
  evicted. The victim has the least score, and its count is halved.
- LFU of a window: the score of a key is in how many of the last steps it was accessed.

Among equal ones, the victim is the key touched longest ago. Scores are those of the replay's residencies.
"""

from typing import NamedTuple

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.engine.residency import EVICTED_SHARE, MOST_COUNT, a_step_on, counted, faded, gained, score_of_layer
from moetrace.jit.compile import kernel

EWMA, LEAST_STALE, LFUDA, LFU_WINDOW = 0, 1, 2, 3
ALPHA = 0.3  # as in the timing model, section 7


class Scored(NamedTuple):
    """A cache whose victims are found by a look at all residents of the pool."""

    weight: np.ndarray  # int64 [keys]
    capacity: int  # of each pool, in units of weight
    used: np.ndarray  # int64 [pools]
    residents: np.ndarray  # int64 [pools]: how many keys
    member: np.ndarray  # int32 [keys]: residents in no order; those of pool p begin at p * keys / pools
    place: np.ndarray  # int32 [keys]: where in `member`; -1 = not resident
    score: np.ndarray  # float64 [keys]: EWMA, LFUDA
    demands: np.ndarray  # float64 [keys]: LFUDA, limited and halved; of a window, a bit for each step
    age: np.ndarray  # float64 [pools]: LFUDA
    touched: np.ndarray  # int64 [keys]: number of the last access
    event: np.ndarray  # int64 [keys]: number of the first access of the last event that demanded it


def scored(weight: np.ndarray, capacity: int, pools: int) -> Scored:
    """Return an empty cache of keys of `weight` (int64), with `capacity` in each of the pools."""
    keys = weight.size
    used, residents = np.zeros(pools, np.int64), np.zeros(pools, np.int64)
    member, place = np.zeros(keys, np.int32), np.full(keys, -1, np.int32)
    score, touched, event = np.zeros(keys), np.full(keys, -1), np.full(keys, -1)
    count, age = np.zeros(keys), np.zeros(pools)
    return Scored(weight, capacity, used, residents, member, place, score, count, age, touched, event)


def replay_scored(cache: Scored, rule: int, block: Accesses, layers: int, sequential: bool, hit: np.ndarray) -> None:
    """Replay the accesses of a block, filling hit uint8 [n]; rule is one of those above."""
    _replay(cache, rule, block, layers, sequential, hit)


@kernel(inline=False)
def _replay(cache, rule, block, layers, sequential, hit):
    """Replay the accesses of a block, filling hit uint8 [n]."""
    bounds, experts = block.bounds, cache.score.size // layers
    for number in range(bounds.size - 1):
        step, layer = number // layers, number % layers
        if rule == EWMA:
            for key in range(layer * experts, (layer + 1) * experts):
                cache.score[key] = faded(cache.score[key], ALPHA)
        elif rule == LFU_WINDOW:
            for key in range(layer * experts, (layer + 1) * experts):
                cache.demands[key], left = a_step_on(cache.demands[key])
                cache.score[key] -= left
        pool = layer if cache.used.size > 1 else 0
        start, stop = bounds[number], bounds[number + 1]
        if sequential:
            for i in range(start, stop):
                _demand(cache, rule, pool, (step, layer, layers), block, i, i + 1, hit)
        else:
            _demand(cache, rule, pool, (step, layer, layers), block, start, stop, hit)


@kernel
def _demand(cache, rule, pool, now, block, start, stop, hit):
    """Demand the keys start up to stop at once, filling their part of hit uint8 [n]; now is step, layer and layers."""
    event, ours, by_rows = block.first + start, 0, block.chosen_by.size > 0
    for i in range(start, stop):
        k = block.key[i]
        hit[i] = cache.place[k] >= 0
        ours += hit[i] > 0
        cache.event[k], cache.touched[k] = event, block.first + i
        if rule == EWMA:
            cache.score[k] += gained(block.chosen_by[i] if by_rows else 1, block.step_rows[now[0]], ALPHA)
        elif rule == LFUDA:
            cache.demands[k] = counted(cache.demands[k], MOST_COUNT)
            cache.score[k] = cache.age[pool] + cache.demands[k]
        elif rule == LFU_WINDOW and cache.demands[k] % 2.0 == 0.0:  # once a step
            cache.demands[k] += 1.0
            cache.score[k] += 1.0
    for i in range(start, stop):
        k, weight = block.key[i], cache.weight[block.key[i]]
        if hit[i] or weight > cache.capacity:
            continue
        while cache.used[pool] + weight > cache.capacity and cache.residents[pool] > ours:
            _remove(cache, rule, pool, _victim(cache, rule, pool, now, event))
        if cache.used[pool] + weight <= cache.capacity:
            cache.place[k] = pool * (cache.member.size // cache.used.size) + cache.residents[pool]
            cache.member[cache.place[k]] = k
            cache.used[pool] += weight
            cache.residents[pool] += 1
            ours += 1


@kernel
def _victim(cache, rule, pool, now, event):
    """Return where in `member` the victim is: of least score, touched longest ago, and not of the event."""
    step, layer, layers = now
    experts = cache.member.size // layers
    start = pool * (cache.member.size // cache.used.size)
    best, best_score, best_touched = -1, 0.0, 0
    for place in range(start, start + cache.residents[pool]):
        k = cache.member[place]
        if cache.event[k] == event:
            continue
        score = cache.score[k]
        if rule == LEAST_STALE:
            of_layer = k // experts
            score = score_of_layer(step if of_layer <= layer else step - 1, of_layer, layers)
        if best < 0 or score < best_score or (score == best_score and cache.touched[k] < best_touched):
            best, best_score, best_touched = place, score, cache.touched[k]
    return best


@kernel
def _remove(cache, rule, pool, place):
    """Evict the key at a place of `member`; the last resident of the pool takes that place."""
    victim = cache.member[place]
    cache.age[pool] = max(cache.age[pool], cache.score[victim])
    if rule == LFUDA:
        cache.demands[victim] *= EVICTED_SHARE
    cache.used[pool] -= cache.weight[victim]
    cache.residents[pool] -= 1
    last = pool * (cache.member.size // cache.used.size) + cache.residents[pool]
    cache.member[place] = cache.member[last]
    cache.place[cache.member[place]] = place
    cache.place[victim] = -1
