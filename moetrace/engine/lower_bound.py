"""A lower bound that counts starts, the link and the slots: no policy beats it (timing model, section 8, proves it).

Whatever a policy does, its time is at least any weighing of three things: of what the GPU does, of what home does, and
of what the link carries. The weights decide only how good the bound is, so they may be found while the trace passes.
"""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.cost import dense_s, head_s
from moetrace.engine.foresight import PLACES
from moetrace.engine.layer import less
from moetrace.engine.machine import FIRST_HOME, GPU_DEVICE, Machine
from moetrace.engine.prefetch import BY_WORTH, DONE_BYTES, NO_PREFETCH
from moetrace.engine.replay import smallest_work
from moetrace.engine.state import records
from moetrace.jit.compile import kernel

BELOW = 0.98  # of the link's weight at which fetching an expert costs what it saves at home: just below, it pays
NEVER = -1e30  # level of an expert that has not been demanded yet: to have held it would cost more than any fetch
# How fast weights move: the GPU's with each layer, the price of a slot with each step, e-fold at most by MOST_STEP.
SHARE_STEP, PRICE_STEP, MOST_STEP = 0.02, 0.05, 0.3
LEAST_PRICE = 1e-4  # of the first: a price that fell to nothing while few experts were in use would not come back
NOTHING_HELD = 1e9  # the price where there is no slot

SUMS = np.dtype(
    [
        (name, np.float64)
        for name in (
            "link_weight",  # where the link has any
            "fetch_s",  # of a mean expert: what a level of 1 costs
            "room",  # experts that the GPU holds at most
            "level",  # what a slot has cost so far, in fetches
            "price",  # by which a step raises the level
            "least_price",  # from the first price on
            "seen",  # experts demanded so far
            "free_gpu",  # the GPU's weight in the next layer, where the link's weight is 0
            "linked_gpu",  # and where it is above 0
            "free_share",  # these, as parts of the weight at which all experts cost the same on the GPU and at home
            "linked_share",
            "free_s",  # sum of both weighings over the layers
            "linked_s",
            "dense_s",
            "head_s",
        )
    ]
)


class LowerBound(NamedTuple):
    """The bound of one machine on its way through a trace."""

    sums: Any  # SUMS [1]
    level: np.ndarray  # float64 [L, E]: the level at an expert's last demand, or NEVER


class OfAllExperts(NamedTuple):
    """Values that the experts of all layers share, in registers: seconds of a row, a byte, a start."""

    gpu: "MeanRates"
    home: "MeanRates"  # of all groups of units, each on average
    has_home: bool
    gpu_layer_s: float
    home_layer_s: float
    act_s_per_row: float
    fetch_s_per_byte: float
    latency_s: float


class MeanRates(NamedTuple):
    """The time of an expert on a device."""

    s_per_row: float
    s_per_byte: float
    start_s: float
    is_serial: bool


def new_lower_bound(machine: Machine, room: int, starts_full: bool) -> LowerBound:
    """Return the bound before the first step, of a GPU that holds ``room`` experts; ``starts_full``: from the start."""
    layers, experts = machine.weight_bytes.shape
    sums = records(1, SUMS)
    mean_bytes = float(machine.weight_bytes[machine.weight_bytes > 0].mean())
    fetch_s = mean_bytes * float(machine.link["s_per_byte"][0])
    home = machine.device[FIRST_HOME]
    groups = len(machine.device) - FIRST_HOME
    home_s = (max(float(home["s_per_row"]), mean_bytes * float(home["s_per_byte"])) + float(home["each_s"])) / groups
    sums["link_weight"] = BELOW * home_s / (home_s + fetch_s) if home["bytes_s"] > 0 else float(fetch_s > 0.0)
    sums["fetch_s"], sums["room"] = fetch_s, room
    sums["price"] = NOTHING_HELD if room == 0 else 0.0
    sums["seen"] = layers * experts if starts_full else 0
    sums["free_share"] = sums["linked_share"] = 1.0
    start = 0.0 if starts_full else NEVER
    return LowerBound(sums, np.full((layers, experts), start))


def room_of(setting: Any, experts: int) -> int:
    """Return how many of all ``experts`` the GPU may hold at once under a policy's ``SETTING``.

    The parts of queued experts that dispatch `split` may run lie outside the slots, and only one queue is short.
    """
    if not setting["splits"] or setting["prefetch"] == NO_PREFETCH:
        return int(setting["slots"])
    return int(setting["slots"]) + PLACES if setting["prefetch"] == BY_WORTH else experts


def seconds_of(bound: LowerBound) -> float:
    """Return the bound in seconds, after the last step."""
    sums = bound.sums[0]
    weight = float(sums["link_weight"])
    slots_s = float(sums["fetch_s"] * sums["room"] * sums["level"]) if sums["room"] > 0 else 0.0
    linked_s = (1.0 - weight) * float(sums["dense_s"]) + float(sums["linked_s"]) - weight * slots_s
    return float(sums["head_s"]) + max(float(sums["dense_s"] + sums["free_s"]), linked_s)


def _signature() -> Any:
    from numba import typeof, types

    work = smallest_work()
    batch, machine = work.batch, work.machine
    return types.void(*map(typeof, (batch.steps, batch.demand, machine, new_lower_bound(machine, 1, False))))


@kernel(signature=_signature)
def add_to_lower_bound(steps, demand, machine, bound):
    """Add a block of steps to the sums of a bound."""
    layers, sums, costs = machine.weight_bytes.shape[0], bound.sums[0], _costs_of(machine)
    for s in range(steps.rows.size):
        sums.dense_s += layers * dense_s(machine, steps.rows[s], steps.kv_tokens[s])
        sums.head_s += head_s(machine)
        held_s = 0.0
        for layer in range(layers):
            first = demand.start[s * layers + layer]
            size = demand.start[s * layers + layer + 1] - first
            if size > 0:
                held_s += _add_layer(demand, first, size, layer, costs, machine, bound)
            sums.level += sums.price / layers
        if 0 < sums.room < sums.seen:
            if sums.price == 0.0:  # until here, all experts that were demanded have had room
                active = demand.start[(s + 1) * layers] - demand.start[s * layers]
                sums.price = active / (4.0 * sums.room)
                sums.least_price = LEAST_PRICE * sums.price
            else:
                held = held_s / (sums.fetch_s * sums.price)
                change = PRICE_STEP * (held / sums.room - 1.0)
                price = sums.price * np.exp(max(-MOST_STEP, min(MOST_STEP, change)))
                sums.price = max(price, sums.least_price)


@kernel
def _costs_of(machine):
    """Return the machine's ``OfAllExperts``."""
    gpu, home, link = machine.device[GPU_DEVICE], machine.device[FIRST_HOME], machine.link[0]
    part = 1.0 / (machine.device.size - FIRST_HOME)
    return OfAllExperts(
        MeanRates(gpu.s_per_row, gpu.s_per_byte, gpu.each_s, gpu.is_serial > 0.0),
        MeanRates(home.s_per_row * part, home.s_per_byte * part, home.each_s * part, home.is_serial > 0.0),
        home.bytes_s > 0.0,
        gpu.layer_s,
        home.layer_s,
        machine.work[0].row_bytes * machine.share * link.s_per_byte,
        link.s_per_byte,
        link.latency_s,
    )


@kernel
def _add_layer(demand, first, size, layer, costs, machine, bound):
    """Add a layer's two weighings; return the experts held for it, in seconds of the level's price.

    One walk for all weights, in registers (7 ns an access; 13 in passes over arrays). So the GPU's weight is what the
    layer before found. Demand order has experts of as many rows side by side, at batch 1 all of them: what they have in
    common is computed once.
    """
    sums, gpu, home = bound.sums[0], costs.gpu, costs.home
    level, price_s, link_weight = sums.level, sums.fetch_s, sums.link_weight
    free_weight, gpu_weight, rest = sums.free_gpu, sums.linked_gpu, 1.0 - link_weight
    layer_gpu_s, seen = costs.gpu_layer_s / size, 0
    # Sums over all experts: on the GPU, at home, over the link, and the part of the link's that is held instead.
    gpu_s, home_s, link_s, held_s = 0.0, 0.0, 0.0, 0.0
    # Sums over experts where each weighs less, under three weighings: no weight for the link, some, and none for the
    # GPU.
    free_s, linked_s, idle_s, linked_held_s, idle_held_s = 0.0, 0.0, 0.0, 0.0, 0.0
    free_gpu_s, free_home_s, linked_gpu_s, linked_home_s = 0.0, 0.0, 0.0, 0.0
    i, stop = first, first + size
    while i < stop:
        alike, weight_bytes = demand.rows[i], machine.weight_bytes[layer, np.uint64(demand.expert[i])]
        rows = float(alike)
        on_gpu_s = _own_s(gpu, rows, weight_bytes) + layer_gpu_s
        at_home_s = _own_s(home, rows, weight_bytes)
        fetch_s = max(weight_bytes - DONE_BYTES, 0.0) * costs.fetch_s_per_byte
        linked_there_s, linked_here_s = gpu_weight * on_gpu_s, (rest - gpu_weight) * at_home_s
        idle_here_s = rest * at_home_s
        begin, linked = i, 0.0
        while i < stop and demand.rows[i] == alike:
            expert = np.uint64(demand.expert[i])
            if machine.even_bytes == 0.0 and machine.weight_bytes[layer, expert] != weight_bytes:
                break
            carry_s, own_held_s, is_new = _carry_or_hold(bound, layer, expert, level, price_s, fetch_s)
            seen += is_new
            link_s += carry_s
            held_s += own_held_s
            carried_s = link_weight * carry_s
            there_s = linked_there_s + carried_s
            there = less(there_s, linked_here_s)
            linked += there * 1.0
            linked_s += min(there_s, linked_here_s)
            linked_held_s += there * own_held_s
            idle_s += min(carried_s, idle_here_s)
            idle_held_s += less(carried_s, idle_here_s) * own_held_s
            i += 1
        count = float(i - begin)
        gpu_s += count * on_gpu_s
        home_s += count * at_home_s
        there_s, here_s = free_weight * on_gpu_s, (1.0 - free_weight) * at_home_s
        there = less(there_s, here_s)
        free_s += count * min(there_s, here_s)
        free_gpu_s += count * on_gpu_s if there else 0.0
        free_home_s += 0.0 if there else count * at_home_s
        linked_gpu_s += linked * on_gpu_s
        linked_home_s += (count - linked) * at_home_s
    sums.seen += seen
    least_rows = float(demand.rows[stop - 1])  # the last in demand order
    only_gpu_s = rest * gpu_s + link_weight * link_s
    if not costs.has_home:
        sums.free_s += gpu_s
        sums.linked_s += only_gpu_s
        return held_s
    around_s = 2.0 * (costs.act_s_per_row * least_rows + costs.latency_s) + costs.home_layer_s
    free_s += (1.0 - free_weight) * around_s
    linked_s += (rest - gpu_weight) * around_s
    idle_s += rest * around_s
    sums.free_s += min(free_s, gpu_s)
    sums.linked_s += min(max(linked_s, idle_s), only_gpu_s)
    free_more = less(around_s + free_home_s, free_gpu_s)
    _move_weights(sums, home_s / (gpu_s + home_s), free_more, less(around_s + linked_home_s, linked_gpu_s))
    return idle_held_s if less(linked_s, idle_s) else linked_held_s


@kernel
def _carry_or_hold(bound, layer, expert, level, price_s, fetch_s):
    """Return what an expert weighs on the link, the part of that for being held instead, and whether it is new.

    Comparisons are numbers here, as everywhere in the walk: branches could not be foretold and took twice the time.
    """
    before = bound.level[layer, expert]
    bound.level[layer, expert] = level
    hold_s = price_s * (level - before)
    carry_s = min(hold_s, fetch_s)
    return carry_s, (hold_s < fetch_s) * carry_s, before < 0.0


@kernel
def _move_weights(sums, balanced, free_more, linked_more):
    """Set the GPU's weights for the next layer; all experts cost the same on both sides at weight ``balanced``."""
    sums.free_share = _moved(sums.free_share, free_more, 1.0 / balanced)
    sums.linked_share = _moved(sums.linked_share, linked_more, 1.0 / balanced)
    sums.free_gpu, sums.linked_gpu = balanced * sums.free_share, (1.0 - sums.link_weight) * balanced * sums.linked_share


@kernel
def _own_s(rates, rows, weight_bytes):
    """Return how long an expert takes, with its own start."""
    compute_s, read_s = rows * rates.s_per_row, weight_bytes * rates.s_per_byte
    return (compute_s + read_s if rates.is_serial else max(compute_s, read_s)) + rates.start_s


@kernel
def _moved(share, more, most):
    """Return the GPU's share for the next layer: more of it, up to ``most``, or less."""
    return share + SHARE_STEP * max(most - share, 0.0) if more else share * (1.0 - SHARE_STEP)
