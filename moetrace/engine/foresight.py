"""Predictions of choices, learned only from the past, and the worth of an expert (timing model, section 7).

The worth of an expert is the chance that its layer's next visit runs it, and its long run. Chances come from how often
it was chosen of late, from who follows a row's choices at its next visit of the layer, and from who follows a row's
choices some layers on. Nothing but routing that has been seen is used, and nothing is drawn.
"""

from typing import NamedTuple

import numpy as np

from moetrace.engine.chances import LANES, add_up, learn, raise_to, scale_of
from moetrace.engine.schedule import Requests, places_of
from moetrace.jit.compile import kernel
from moetrace.spec.choices import Dispatch, find
from moetrace.spec.errors import MoetraceError
from moetrace.spec.policy import PolicySpec
from moetrace.trace.schema import DECODE

FAST, SLOW = 1 / 4, 1 / 64  # rates of averages of loads
FLOOR = 0.1  # is added to a frequency that something is divided by
MIX = 1 / 8  # share of the fast average in the expected load
PLACES = 4  # in the queue
# Where a policy does not say; found on three captures, where half of each or twice changed little.
AHEAD_LAYERS, NOW_WEIGHT, LONG_WEIGHT, MARGIN = 6, 1.0, 2.0, 0.1
MOST_TABLE_BYTES = 2 << 30


class Foresight(NamedTuple):
    """The knowledge about L layers with E experts, of which a row chooses k."""

    fast: np.ndarray  # float64 [L, E]: share of the rows that chose it
    slow: np.ndarray  # float64 [L, E]
    hope: np.ndarray  # float64 [L, E]: expected load, from both averages
    inverse: np.ndarray  # float64 [L, E]: 1 / (slow + FLOOR)
    follow: np.ndarray  # float64 [L, E]: fast average of what `after` says
    after: np.ndarray  # float32 [L, E, E]: from a row's choice to that of its request's next row; L = 0: not used
    after_count: np.ndarray  # int64 [L, E]: how often a choice was learned from
    ahead: np.ndarray  # float32 [L, E, E]: from a row's choice `ahead_layers` before to its choice here
    ahead_count: np.ndarray  # int64 [L, E]
    now: np.ndarray  # float64 [L, E]: chance that the layer's next visit runs it
    long: np.ndarray  # float64 [L, E]: the same in the long run
    worth: np.ndarray  # float64 [L, E]
    worth_bits: np.ndarray  # int64 [L, E]: the same memory: of numbers that are not negative, bits have their order
    place: np.ndarray  # int32 [requests]: where a request's last row stands
    owner: np.ndarray  # int64 [places]: whose it is, -1 = nobody's
    last: np.ndarray  # uint16 [places, L, k]: choices of a request's last row
    seen: np.ndarray  # int64 [places, L]: the step of that row, -1 = none
    rows: np.ndarray  # int64 [1]: rows of the last decode step
    scratch: np.ndarray  # float64 [6, E, rounded up to LANES]: zero beyond E
    lanes: np.ndarray  # float64 [E / LANES, LANES]: the memory of its first row
    chosen: np.ndarray  # int64 [k]: scratch
    chose: np.ndarray  # float32 [E]: scratch
    best_worth: np.ndarray  # float64 [L + 1]: of a layer, the greatest neither resident nor queued, 0 = none; of all
    best_bits: np.ndarray  # int64 [L + 1]: the same memory
    least_worth: np.ndarray  # float64 [L + 1]: of a layer, the least of a resident, infinity = none; of all
    least_bits: np.ndarray  # int64 [L + 1]: the same memory
    stale: np.ndarray  # uint8 [L]: whether these are not of now
    stale_layers: np.ndarray  # int64 [L]: which are so
    stale_count: np.ndarray  # int64 [1]
    picked: np.ndarray  # int64 [PLACES]: scratch of the queue
    value: np.ndarray  # float64 [PLACES]
    top_k: int
    ahead_layers: int
    now_weight: float
    long_weight: float
    runs_at_home: bool  # whether any expert does, under the policy's dispatch
    margin: float  # an expert is fetched if it is worth more than the least resident by more than this


def foresight_of(policy: PolicySpec, requests: Requests, layers: int, experts: int, top_k: int) -> Foresight:
    """Return the state before the first step; raise MoetraceError if the tables would be too large."""
    ahead = AHEAD_LAYERS if policy.ahead_layers is None else policy.ahead_layers
    ahead = min(ahead, layers - 1)
    after_layers = layers if policy.follows is None or policy.follows else 0
    ahead_of = layers if ahead > 0 else 0
    table_bytes = 4 * (after_layers + ahead_of) * experts**2
    if table_bytes > MOST_TABLE_BYTES:
        raise MoetraceError(
            f"Policy {policy.name}: residency foresee keeps {table_bytes / 1e9:.1f} GB of tables for {layers} x "
            f"{experts} experts, more than {MOST_TABLE_BYTES / 1e9:.1f} GB: use another residency."
        )
    place, places = places_of(requests.first_step, requests.last_step)
    start = top_k / experts
    one, table = np.full((layers, experts), start), np.full((1, 1, 1), start, np.float32)
    dispatch: Dispatch | None = find("dispatch", policy.dispatch)
    weights = [_or(policy.now_weight, NOW_WEIGHT), _or(policy.long_weight, LONG_WEIGHT)]
    worth = weights[0] * one + weights[1] * one
    scratch = np.zeros((6, -(-experts // LANES) * LANES))
    best, least = np.zeros((2, layers + 1))
    return Foresight(
        fast=one.copy(),
        slow=one.copy(),
        hope=one.copy(),
        inverse=1.0 / (one + FLOOR),
        follow=one.copy(),
        after=table.repeat(after_layers, 0).repeat(experts, 1).repeat(experts, 2),
        after_count=np.zeros((after_layers, experts), np.int64),
        ahead=table.repeat(ahead_of, 0).repeat(experts, 1).repeat(experts, 2),
        ahead_count=np.zeros((ahead_of, experts), np.int64),
        now=one.copy(),
        long=one.copy(),
        worth=worth,
        worth_bits=worth.view(np.int64),
        place=place,
        owner=np.full(places, -1),
        last=np.zeros((places, layers, top_k), np.uint16),
        seen=np.full((places, layers), -1),
        rows=np.ones(1, np.int64),
        scratch=scratch,
        lanes=scratch[0].reshape(-1, LANES),
        chosen=np.zeros(top_k, np.int64),
        chose=np.zeros(experts, np.float32),
        best_worth=best,
        best_bits=best.view(np.int64),
        least_worth=least,
        least_bits=least.view(np.int64),
        stale=np.ones(layers, np.uint8),
        stale_layers=np.arange(layers),
        stale_count=np.array([layers]),
        picked=np.zeros(PLACES, np.int64),
        value=np.zeros(PLACES),
        top_k=top_k,
        ahead_layers=ahead,
        now_weight=weights[0],
        long_weight=weights[1],
        runs_at_home=dispatch is None or not dispatch.without_units,
        margin=_or(policy.margin, MARGIN),
    )


def _or(given: float | None, default: float) -> float:
    return default if given is None else float(given)


@kernel
def foresee(f, batch, s, layer, machine):
    """After the router of ``layer`` has spoken in the block's step ``s``: learn, and set the worth of each expert."""
    layers = f.worth.shape[0]
    begin, stop = batch.offset[s], batch.offset[s + 1]
    decode = batch.steps.phase[s] == DECODE
    if decode:
        f.rows[0] = stop - begin
    _average(f, batch, s, layer)
    for row in range(begin, stop):
        _learn_row(f, batch, row, batch.steps.first + s, layer)
    first = begin if decode else (stop - 1 if f.rows[0] == 1 else stop)
    _expect_next(f, batch.experts, first, stop, layer, _compute_share(f, machine, layer))
    target = layer + f.ahead_layers
    if f.ahead_layers > 0 and (decode or (target >= layers and f.rows[0] == 1)):
        target -= layers if target >= layers else 0
        _expect_ahead(f, batch.experts, first, stop, (layer, target), _compute_share(f, machine, target))


@kernel
def _compute_share(f, machine, layer):
    """Return how long a row's arithmetic takes at home, beside an expert of one row whose weights are read."""
    if not f.runs_at_home:
        return 0.0
    for first in range(machine.weight_bytes.shape[1]):  # those before it are remote
        if machine.weight_bytes[layer, first] > 0.0:
            home = machine.device[machine.home[layer, first]]
            whole_s = machine.weight_bytes[layer, first] * home.s_per_byte + home.fetched_s
            return home.s_per_row / whole_s
    return 0.0


@kernel
def _choices(choices, experts):
    """Return how many choices, uint16 [k], are not absent."""
    found = 0
    for slot in range(choices.size):
        found += choices[slot] < experts
    return found


@kernel
def grow_stale(f, layer):
    """Note that a layer's known least and best are out of date."""
    if not f.stale[layer]:
        f.stale[layer] = 1
        f.stale_layers[f.stale_count[0]] = layer
        f.stale_count[0] += 1


@kernel
def _average(f, batch, s, layer):
    """Let the averages of a layer's loads follow a step's, a decode step being one visit."""
    layers, experts = f.worth.shape
    load, there = f.scratch[1], 0
    for row in range(batch.offset[s], batch.offset[s + 1]):
        there += _choices(batch.experts[row, layer], experts) > 0
    if there == 0:
        return
    for e in range(experts):
        load[e] = 0.0
    at = s * layers + layer
    for i in range(batch.demand.start[at], batch.demand.start[at + 1]):
        load[batch.demand.expert[i]] = batch.demand.rows[i] / there
    fast, slow = FAST, SLOW
    if there != f.rows[0]:
        fast, slow = 1.0 - (1.0 - FAST) ** (there / f.rows[0]), 1.0 - (1.0 - SLOW) ** (there / f.rows[0])
    for e in range(experts):
        f.fast[layer, e] += fast * (load[e] - f.fast[layer, e])
    for e in range(experts):
        f.slow[layer, e] += slow * (load[e] - f.slow[layer, e])
    for e in range(experts):
        f.hope[layer, e] = MIX * f.fast[layer, e] + (1.0 - MIX) * f.slow[layer, e]
    for e in range(experts):
        f.inverse[layer, e] = 1.0 / (f.slow[layer, e] + FLOOR)


@kernel
def _learn_row(f, batch, row, step, layer):
    """Learn who followed whom from a row's choices, and remember them."""
    layers, experts = f.worth.shape
    choices, request = batch.experts[row, layer], batch.request[row]
    place, chosen = f.place[request], f.chose
    if f.owner[place] != request:
        f.owner[place] = request
        for other in range(layers):
            f.seen[place, other] = -1
    if _choices(choices, experts) > 0:
        for e in range(experts):
            chosen[e] = np.float32(0.0)
        for slot in range(choices.size):
            if choices[slot] < experts:
                chosen[choices[slot]] = np.float32(1.0)
        source = layer - f.ahead_layers
        if f.ahead_layers > 0 and source >= 0:
            learn(f.ahead[layer], f.ahead_count[layer], batch.experts[row, source], chosen)
        elif f.ahead_layers > 0 and f.seen[place, source + layers] >= 0 and f.seen[place, layer] < step:
            learn(f.ahead[layer], f.ahead_count[layer], f.last[place, source + layers], chosen)
        if f.after.shape[0] > 0 and f.seen[place, layer] >= 0:
            learn(f.after[layer], f.after_count[layer], f.last[place, layer], chosen)
    for slot in range(choices.size):
        f.last[place, layer, slot] = choices[slot]
    f.seen[place, layer] = step


@kernel
def _clear(away, rows, total):
    """Begin with no source: for each expert, the chance that none chooses it is 1, and the expectations are 0."""
    for e in range(away.size):
        away[e] = 1.0
    for e in range(away.size):
        rows[e] = 0.0
    for e in range(away.size):
        total[e] = 0.0


@kernel
def _add_source(f, table, choices, layer, is_ahead):
    """Add what a row's choices say about a layer's experts to the scratch; return whether there are any."""
    experts = f.worth.shape[1]
    p, mean, away, rows, total = f.scratch[0], f.scratch[1], f.scratch[2], f.scratch[3], f.scratch[4]
    found = add_up(table, choices, f.chosen, mean)
    if found == 0:
        return False
    part = 1.0 / found
    if is_ahead:
        for e in range(experts):
            lift = mean[e] * part * f.inverse[layer, e]
            p[e] = f.hope[layer, e] * (lift * lift)
    else:
        for e in range(experts):
            total[e] += mean[e] * part
        for e in range(experts):
            p[e] = f.hope[layer, e] * (mean[e] * part * f.inverse[layer, e])
    scale = scale_of(f.lanes, f.top_k)
    for e in range(experts):
        chance = min(p[e] * scale, 1.0)
        away[e] *= 1.0 - chance
        rows[e] += chance
    return True


@kernel
def _value(f, layer, compute_share):
    """Set the chances at a layer's next visit from the scratch, and what its experts are worth."""
    away, rows = f.scratch[2], f.scratch[3]
    for e in range(f.worth.shape[1]):
        f.now[layer, e] = max(1.0 - away[e], compute_share * rows[e])
    for e in range(f.worth.shape[1]):
        f.worth[layer, e] = f.now_weight * f.now[layer, e] + f.long_weight * f.long[layer, e]
    grow_stale(f, layer)


@kernel
def _expect_next(f, experts_of, first, stop, layer, compute_share):
    """Set the chances of a layer's experts in the long run and, from the choices of rows, at its next visit."""
    experts, in_batch = f.worth.shape[1], f.rows[0]
    p, x, away, rows, total = f.scratch[0], f.scratch[1], f.scratch[2], f.scratch[3], f.scratch[4]
    power = f.scratch[5]
    follows = f.after.shape[0] > 0
    _clear(away, rows, total)
    used = 0
    for row in range(first, stop if follows else first):
        used += _add_source(f, f.after[layer], experts_of[row, layer], layer, False)
    if used > 0:
        part = 1.0 / used
        for e in range(experts):
            f.follow[layer, e] += FAST * (total[e] * part - f.follow[layer, e])
    else:
        for e in range(experts):
            x[e] = 1.0 - f.hope[layer, e]
        raise_to(x, in_batch, away)
        for e in range(experts):
            rows[e] = in_batch * f.hope[layer, e]
    if follows:
        for e in range(experts):
            p[e] = f.slow[layer, e] * (f.follow[layer, e] * f.inverse[layer, e])
    else:
        for e in range(experts):
            p[e] = f.slow[layer, e]
    scale = scale_of(f.lanes, f.top_k)
    for e in range(experts):
        p[e] = min(p[e] * scale, 1.0)
    for e in range(experts):
        x[e] = 1.0 - p[e]
    raise_to(x, in_batch, power)
    for e in range(experts):
        f.long[layer, e] = max(1.0 - power[e], compute_share * in_batch * p[e])
    _value(f, layer, compute_share)


@kernel
def _expect_ahead(f, experts_of, first, stop, pair, compute_share):
    """Set the chances of a target layer's experts at its next visit, from the choices of rows at a source."""
    source, target = pair
    _clear(f.scratch[2], f.scratch[3], f.scratch[4])
    used = 0
    for row in range(first, stop):
        used += _add_source(f, f.ahead[target], experts_of[row, source], target, True)
    if used > 0:
        _value(f, target, compute_share)
