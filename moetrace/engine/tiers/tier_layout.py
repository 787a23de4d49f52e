"""Experts that move between layouts, whole on one unit or spread over all (TriMoE; prefetch `relayout`)."""

from typing import NamedTuple

import numpy as np

from moetrace.engine.cost import varied_s
from moetrace.engine.layer import less
from moetrace.engine.machine import FIRST_HOME, GPU_DEVICE, Machine
from moetrace.engine.prefetch import DONE_BYTES, join, score_to_beat
from moetrace.engine.tape import MOVE, NOBODY, last_slice, note
from moetrace.engine.tiers.tier_times import fetched_end_s
from moetrace.jit.compile import kernel

NOWHERE = -1  # of an expert that is not on its way
BY_GPU, BY_CPU, BY_UNIT, BY_NONE = 0, 1, 2, 3  # where an expert is expected to run


class Layout(NamedTuple):
    """The expected rows of experts, and the experts on their way to another layout. A key is ``layer*E + e``."""

    rows: np.ndarray  # float64 [L, E]: moving average of rows
    order: np.ndarray  # int64 [L, E]: the experts of a layer by descending average, then id
    target: np.ndarray  # int64 [L * E]: the device that an expert is on its way to
    left_bytes: np.ndarray  # float64 [L * E]
    queue: np.ndarray  # int64 [2 * L * E]: keys, first come first served; one that left stays and is skipped
    place: np.ndarray  # int64 [L * E]: where in the queue an expert stands
    ends: np.ndarray  # int64 [2]: first entry, one past the last
    by: np.ndarray  # uint8 [E]: scratch: who is expected to run it
    unit_s: np.ndarray  # float64 [units]: scratch: seconds expected of each unit
    moved: np.ndarray  # float64 [2]: bytes and seconds in all
    move_s_per_byte: float
    alpha: float


def new_layout(layers: int, experts: int, units: int, move_bytes_s: float, alpha: float) -> Layout:
    """Return the state before the first step, when nothing moves."""
    cells = layers * experts
    return Layout(
        rows=np.zeros((layers, experts)),
        order=np.tile(np.arange(experts), (layers, 1)),
        target=np.full(cells, NOWHERE),
        left_bytes=np.zeros(cells),
        queue=np.zeros(2 * cells, np.int64),
        place=np.full(cells, NOWHERE),
        ends=np.zeros(2, np.int64),
        by=np.zeros(experts, np.uint8),
        unit_s=np.zeros(units),
        moved=np.zeros(2),
        move_s_per_byte=1 / move_bytes_s,
        alpha=alpha,
    )


def movable_parts(layout: Layout | None, machine: Machine) -> list[np.ndarray]:
    """Return all that relayout has written but its books: where experts are, expectations and moves on their way."""
    if layout is None:
        return []
    known = layout.rows, layout.order, layout.target, layout.left_bytes, layout.queue, layout.place, layout.ends
    return [machine.home, *known]


@kernel
def flow_layout(tape, step, layout, tiers, machine, seconds):
    """Let moves flow for ``seconds`` from the begin of a layer on; those that arrive change the layout."""
    if layout is None:
        return
    experts, left_s, term = machine.weight_bytes.shape[1], seconds, tiers.term[0]
    every = FIRST_HOME + term.all_group
    for at in range(layout.ends[0], layout.ends[1]):
        key = layout.queue[at]
        if layout.place[key] != at:
            continue
        if left_s <= 0.0:
            break
        layer, expert = divmod(key, experts)
        outside = term.all_s_per_byte if machine.home[layer, expert] == every else term.one_s_per_byte
        s_per_byte = max(layout.move_s_per_byte, outside)
        step_bytes = min(left_s / s_per_byte, layout.left_bytes[key])
        if tape is not None:
            begin_s = tape.clock_s[0] + (seconds - left_s)
            note(tape, step, layer, MOVE, NOBODY, begin_s, step_bytes * s_per_byte, step_bytes)
            last_slice(tape).expert = expert
        layout.left_bytes[key] -= step_bytes
        left_s -= step_bytes * s_per_byte
        layout.moved[0] += step_bytes
        layout.moved[1] += step_bytes * s_per_byte
        if layout.left_bytes[key] <= DONE_BYTES:
            machine.home[layer, expert] = layout.target[key]
            _stay(layout, key)
    head = layout.ends[0]
    while head < layout.ends[1] and layout.place[layout.queue[head]] != head:
        head += 1
    layout.ends[0] = head


@kernel
def _stay(layout, key):
    """Let an expert be on its way no more."""
    layout.target[key] = NOWHERE
    layout.place[key] = NOWHERE


@kernel
def _go(layout, key, target, weight_bytes):
    """Send an expert on its way, behind all others."""
    if layout.ends[1] == layout.queue.size:
        tail = 0
        for at in range(layout.ends[0], layout.ends[1]):
            other = layout.queue[at]
            if layout.place[other] == at:
                layout.queue[tail] = other
                layout.place[other] = tail
                tail += 1
        layout.ends[0], layout.ends[1] = 0, tail
    layout.queue[layout.ends[1]] = key
    layout.place[key] = layout.ends[1]
    layout.ends[1] += 1
    layout.target[key] = target
    layout.left_bytes[key] = weight_bytes


@kernel
def lay_out(layout, tiers, machine, state, layer, size):
    """After a layer: learn its rows, and decide the target location of each of its experts."""
    if layout is None:
        return
    experts, rows = machine.weight_bytes.shape[1], layout.rows[layer]
    for e in range(experts):
        rows[e] *= 1.0 - layout.alpha
    for i in range(size):
        active = state.scratch.active[i]
        rows[active.expert] += layout.alpha * active.rows
    _sort(layout.order[layer], rows)
    for u in range(layout.unit_s.size):
        layout.unit_s[u] = 0.0
    for e in range(experts):
        layout.by[e] = _runs_on(layout, tiers, machine, state.cache, layer, e) if rows[e] > 0.0 else BY_NONE
        if layout.by[e] == BY_UNIT:
            unit = _unit_of(layout, tiers.term[0], machine, layer, e)
            if unit >= 0:
                layout.unit_s[unit] += _unit_seconds(layout, machine, layer, e)
    for j in range(experts):
        e = layout.order[layer, j]
        if layout.by[e] == BY_CPU:
            _send(layout, machine, layer, e, FIRST_HOME + tiers.term[0].all_group)
        elif layout.by[e] == BY_UNIT:
            unit = _unit_of(layout, tiers.term[0], machine, layer, e)
            if unit < 0:
                unit = _idlest(layout.unit_s)
                layout.unit_s[unit] += _unit_seconds(layout, machine, layer, e)
            _send(layout, machine, layer, e, FIRST_HOME + unit)
    _queue_hot(layout, state, layer)


@kernel
def _sort(order, rows):
    """Sort a layer's experts by descending rows, then id: by insertion, as they are nearly sorted already."""
    for i in range(1, order.size):
        e = order[i]
        j = i
        while j > 0 and (rows[order[j - 1]] < rows[e] or (rows[order[j - 1]] == rows[e] and order[j - 1] > e)):
            order[j] = order[j - 1]
            j -= 1
        order[j] = e


@kernel
def _runs_on(layout, tiers, machine, cache, layer, e):
    """Return where an expert's expected rows cost least: GPU, CPU as if spread, unit as if whole; ties in order."""
    term, gpu = tiers.term[0], machine.device[GPU_DEVICE]
    rows, weight_bytes = layout.rows[layer, e], machine.weight_bytes[layer, e]
    if cache.resident[layer * machine.weight_bytes.shape[1] + e]:
        best_s = varied_s(gpu, rows, weight_bytes, gpu.each_s)
    else:
        spread = machine.home[layer, e] == FIRST_HOME + term.all_group
        outside = term.all_s_per_byte if spread else term.one_s_per_byte
        fetch_s = weight_bytes * max(machine.link[0].s_per_byte, outside) + machine.link[0].latency_s
        best_s = fetched_end_s(term, 0.0, 0.0, fetch_s, varied_s(gpu, rows, weight_bytes, gpu.fetched_s))
    by = BY_GPU
    cpu = tiers.cpu[0]
    if cpu.s_per_byte > 0.0:
        outside = term.all_s_per_byte if term.units > 1 else term.one_s_per_byte
        read_bytes = weight_bytes * max(1.0, outside / cpu.s_per_byte)
        cpu_s = varied_s(cpu, rows, read_bytes, cpu.each_s)
        if less(cpu_s, best_s):
            best_s, by = cpu_s, BY_CPU
    return BY_UNIT if less(_unit_seconds(layout, machine, layer, e), best_s) else by


@kernel
def _unit_seconds(layout, machine, layer, e):
    """Return the seconds of an expert with its expected rows on one unit that holds all of it."""
    unit = machine.device[FIRST_HOME]
    return varied_s(unit, layout.rows[layer, e], machine.weight_bytes[layer, e], unit.each_s)


@kernel
def _unit_of(layout, term, machine, layer, e):
    """Return the unit that an expert is whole on, or is on its way to; -1 = none."""
    every, target = FIRST_HOME + term.all_group, layout.target[layer * machine.weight_bytes.shape[1] + e]
    if target != NOWHERE and target != every:
        return target - FIRST_HOME
    return machine.home[layer, e] - FIRST_HOME if machine.home[layer, e] != every else -1


@kernel
def _idlest(unit_s):
    """Return the first unit of least seconds."""
    best = 0
    for u in range(1, unit_s.size):
        if less(unit_s[u], unit_s[best]):
            best = u
    return best


@kernel
def _send(layout, machine, layer, e, device):
    """Let an expert be on its way to a device, unless it stands there. One unit has one layout only."""
    if layout.unit_s.size == 1:
        return
    key = layer * machine.weight_bytes.shape[1] + e
    if machine.home[layer, e] == device:
        _stay(layout, key)
    elif layout.target[key] != device:
        _go(layout, key, device, machine.weight_bytes[layer, e])


@kernel
def _queue_hot(layout, state, layer):
    """Queue experts expected to run on the GPU, by score, if above the least score of a resident of the layer."""
    cells, cache, queue = state.cells, state.cache, state.queue
    experts = cells.shape[1]
    first, floor = layer * experts, score_to_beat(cells, cache, layer)
    while True:
        best, score = -1, floor
        for e in range(experts):
            if layout.by[e] != BY_GPU or cache.resident[first + e] or queue.place[first + e] >= 0:
                continue
            if cells[layer, e].score > score:
                best, score = e, cells[layer, e].score
        if best < 0:
            return
        join(queue, first + best, 0)
