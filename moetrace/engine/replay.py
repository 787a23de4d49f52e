"""The loop over steps and layers, in Numba; the state that it carries from block to block."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.by_worth import admit_by_worth, queue_best, touch_and_admit_by_worth
from moetrace.engine.cost import dense_s, head_s, order_on_gpu, price, price_varied, prices_of
from moetrace.engine.demand import Demand, see_gates
from moetrace.engine.dispatch import OPTIMAL_UP_TO
from moetrace.engine.foresight import foresee
from moetrace.engine.layer import shared_s, timeline
from moetrace.engine.machine import DEVICE, FIRST_HOME, LINK, WORK, Machine
from moetrace.engine.prefetch import (
    BY_WORTH,
    FROM_PROMPT,
    HEAD,
    ONLINE,
    ORACLE,
    TAIL,
    Queue,
    admit_complete,
    empty_queue,
    flow,
    join_ahead,
    join_by_score,
    leave,
    note_late,
    remaining_bytes,
)
from moetrace.engine.prompt import Prompts, count_prompts, forget_ended, make_wanted, prompts_of, queue_wanted
from moetrace.engine.residency import Cache, empty_cache, empty_cells, pool_of, touch_and_admit
from moetrace.engine.setting import new_setting
from moetrace.engine.sharing import run_whole, see_parts, share_out, shared_of
from moetrace.engine.state import (
    FIRST_GROUP,
    GPU,
    HOME,
    LINK_IN,
    LINK_OUT,
    SHARED,
    Log,
    hook_signature,
    new_log,
    records,
)
from moetrace.engine.tape import note_dense, note_head, note_layer_end, note_moe, note_wait
from moetrace.engine.view import LayerScratch, new_scratch, view_of
from moetrace.jit.compile import kernel
from moetrace.spec.choices import BY_TOUCH
from moetrace.trace.schema import DECODE


class Steps(NamedTuple):
    """Successive steps: who is in them."""

    first: int
    rows: np.ndarray  # int64 [steps]: T
    kv_tokens: np.ndarray  # int64 [steps]: C
    phase: np.ndarray  # int64 [steps]
    prompt_ends: np.ndarray  # uint8 [steps]


class Batch(NamedTuple):
    """A block of steps, ready for the kernels; ``experts`` and ``request`` are empty where no policy counts prompts."""

    steps: Steps
    demand: Demand
    offset: np.ndarray  # int64 [steps + 1 + ahead]
    experts: np.ndarray  # uint16 [rows, L, k]
    request: np.ndarray  # int64 [rows]
    row_phase: np.ndarray  # uint8 [rows]
    position: np.ndarray  # int64 [rows], in the request; empty where no policy cuts steps


class State(NamedTuple):
    """Everything that is carried from step to step, made once; and the scratch of one layer."""

    cells: Any  # CELL [L, E]
    cache: Cache
    queue: Queue
    prompts: Prompts
    scratch: LayerScratch


class Work(NamedTuple):
    """A block to replay, and all that it takes."""

    batch: Batch
    machine: Machine
    setting: Any  # SETTING [1]
    state: State
    log: Log


@kernel
def _see(at, layer, s, demand, machine, setting, state, log):
    """Fill the active experts of the layer and count hits, misses and late ones; return how many are active."""
    first = demand.start[at]
    size = demand.start[at + 1] - first
    hits, late = 0, 0
    base = layer * state.cells.shape[1]
    queued = state.queue.ends[TAIL] > state.queue.ends[HEAD]
    prices, looks_ahead = prices_of(machine), setting.looks_ahead
    for i in range(size):
        expert, rows = np.int64(demand.expert[first + i]), np.int64(demand.rows[first + i])
        key = base + expert
        resident = state.cache.resident[key]
        active = state.scratch.active[i]
        price(machine, prices, layer, expert, rows, resident, active)
        state.scratch.load[i] = rows
        state.scratch.plan[i] = 0
        if looks_ahead:
            next_step = demand.next_step[first + i]
            active.next_use = np.inf if next_step < 0 else next_step * state.cells.shape[0] + layer + 0.0
        hits += resident
        if queued:
            late += note_late(state.queue, key)
    if not machine.is_plain:
        price_varied(machine, state.scratch.active, size)
    order_on_gpu(state.scratch.active, size, hits)
    if setting.splits:
        see_parts(base, size, state)
    if setting.weighs:
        see_gates(demand, first, size, state.scratch.active)
    log.step[s].hits += hits
    log.step[s].misses += size - hits
    log.step[s].late += late
    log.layer[layer].hits += hits
    log.layer[layer].misses += size - hits
    return size


@kernel
def _carry_out(layer, size, state, log):
    """Note who ran what, and take what was fetched out of the prefetch queue; return how many were fetched."""
    experts, gpu = state.cells.shape[1], log.unit[GPU]
    # In registers: in memory each sum waits for the last one.
    gpu_rows, gpu_bytes, used, fetched, on_gpu = gpu.rows, gpu.bytes, 0, 0, 0
    for j in range(size):  # in turn: those on the GPU come together, and the processor guesses right
        i = state.scratch.active[j].turn
        if state.scratch.plan[i] == HOME:
            continue
        active = state.scratch.active[i]
        key = layer * experts + active.expert
        on_gpu += 1
        gpu_rows += active.rows
        gpu_bytes += active.weight_bytes
        if active.resident:
            used += state.cache.fresh[key]
            state.cache.fresh[key] = 0
        elif state.scratch.plan[i] != SHARED or run_whole(key, i, state):
            fetched += 1
            if state.queue.place[key] >= 0:
                log.tally[0].wasted += leave(state.queue, key)
    gpu.rows, gpu.bytes = gpu_rows, gpu_bytes
    gpu.experts, log.tally[0].used = gpu.experts + on_gpu, log.tally[0].used + used
    log.unit[LINK_IN].experts += fetched
    log.layer[layer].gpu_experts += on_gpu
    log.layer[layer].ndp_experts += size - on_gpu
    return fetched


@kernel
def _note_units(dense, line, moved_bytes, machine, state, log):
    """Add a layer's work to the books of the units; in the host's overhead the GPU is idle."""
    gpu, link_in, link_out = log.unit[GPU], log.unit[LINK_IN], log.unit[LINK_OUT]
    gpu.busy_s += dense - machine.work[0].overhead_s + line.gpu_s
    gpu.bytes += machine.work[0].dense_bytes
    link_in.busy_s += line.fetch_s + moved_bytes * machine.link[0].s_per_byte + line.act_s
    link_in.bytes += line.demand_bytes + moved_bytes + line.act_bytes
    link_out.busy_s += line.act_s
    link_out.bytes += line.act_bytes
    if line.busiest_s == 0.0:
        return
    for g in range(state.scratch.groups.size):
        group, unit = state.scratch.groups[g], log.unit[FIRST_GROUP + g]
        unit.busy_s += group.busy_s
        unit.rows += group.rows
        unit.bytes += group.weight_bytes
        unit.experts += group.count
    if not machine.is_plain:
        for g in range(state.scratch.groups.size):
            if state.scratch.groups[g].count > 0:
                log.unit[FIRST_GROUP + g].busy_s += machine.device[FIRST_HOME + g].layer_s


@kernel
def _replay_layer(layer, step, dense, work, dispatch, residency, foresight, tape):
    """Replay one layer; return its imbalance, -1 where that is undefined."""
    batch, machine, setting, state, log = work.batch, work.machine, work.setting[0], work.state, work.log
    queue, cells, tally = state.queue, state.cells, log.tally
    s = step - batch.steps.first
    at = s * cells.shape[0] + layer
    if foresight is None:
        admit_complete(queue, cells, state.cache, tally)
    else:
        admit_by_worth(foresight, queue, cells, state.cache, tally)
    if tape is not None:
        note_dense(tape, step, layer, dense, machine, state)
    moved_bytes = flow(queue, dense * machine.link[0].bytes_s)
    if setting.prefetch == ORACLE:
        now = step * cells.shape[0] + layer
        tally[0].wasted += join_ahead(queue, cells, state.cache, batch.demand, at, now, setting)
    size = _see(at, layer, s, batch.demand, machine, setting, state, log)
    pool = pool_of(state.cache, layer)
    of_pool = (state.cache.age[pool], np.int64(state.cache.residents[pool] >= state.cache.capacity[pool]))
    view = view_of(step, layer, batch.steps, machine, setting, state.scratch, of_pool)
    load, plan = state.scratch.load[:size], state.scratch.plan[:size]
    if size > 0:
        dispatch(cells, view, layer, load, plan)
    log.fallbacks[0] += setting.optimal and size > OPTIMAL_UP_TO
    shared = shared_of(setting.splits, size, plan)
    line = timeline(machine, view, size, plan, shared)
    fetched = _carry_out(layer, size, state, log)
    if shared >= 0:
        share_out(layer, shared, state, log)
    if foresight is not None:
        foresee(foresight, batch, s, layer, machine)
        if setting.prefetch == BY_WORTH:
            queue_best(foresight, queue, state.cache, layer, size, state.scratch, tally)
    if tape is not None:
        note_moe(tape, step, layer, dense, (view, size, shared), line, machine, state)
    beside_bytes = flow(queue, max(0.0, line.moe_s - line.fetch_s) * machine.link[0].bytes_s)
    moved_bytes += beside_bytes
    log.unit[LINK_IN].shared_s += shared_s(line, beside_bytes * machine.link[0].s_per_byte)
    if setting.learns:
        residency(cells, view, layer, load, plan)
    if foresight is None:
        touch_and_admit(cells, state.cache, layer, size, state.scratch, fetched, tally)
    else:
        touch_and_admit_by_worth(foresight, queue, cells, state.cache, layer, size, state.scratch, tally)
    if setting.prefetch == ONLINE:
        join_by_score(queue, cells, state.cache, layer, setting.depth)
    if tape is not None:
        note_layer_end(tape, step, dense + line.moe_s, state)
    _note_units(dense, line, moved_bytes, machine, state, log)
    row, totals = log.step[s], log.layer[layer]
    row.moe_s += line.moe_s
    row.demand_bytes += line.demand_bytes
    row.prefetch_bytes += moved_bytes
    totals.dense_s += dense
    totals.moe_s += line.moe_s
    totals.demand_bytes += line.demand_bytes
    if line.busiest_s == 0.0:
        return -1.0
    imbalance = line.busiest_s * (state.scratch.groups.size * machine.share) / line.busy_sum_s
    totals.imbalance_sum += imbalance
    totals.imbalance_count += 1
    return imbalance


@kernel(inline=False)
def _wait(machine, state, row, log):
    """Let the first decode step wait until the queue is empty; return the seconds."""
    moved_bytes = flow(state.queue, remaining_bytes(state.queue))
    row.prefetch_bytes += moved_bytes
    row.wait_s = moved_bytes * machine.link[0].s_per_byte
    log.unit[LINK_IN].busy_s += row.wait_s
    log.unit[LINK_IN].bytes += moved_bytes
    return row.wait_s


@kernel(inline=False)
def _end_step(step, batch, setting, state, log):
    """After the head: learn from the step's prompts, and forget the requests that it was the last of."""
    s = step - batch.steps.first
    count_prompts(state.prompts, batch, s, state.cells.shape[1])
    forget_ended(state.prompts, step, False)
    if batch.steps.prompt_ends[s]:
        make_wanted(state.cells, state.cache, state.prompts.total)
        if setting.prefetch == FROM_PROMPT:
            queue_wanted(state.queue, state.cells, state.cache, state.prompts, log.tally)
    forget_ended(state.prompts, step, True)


@kernel(signature=lambda: replay_signature(None, None))
def replay_batch(work, dispatch, residency, foresight, tape):
    """Replay a block of steps; what follows it finds its state in ``state``, and the figures in ``log``,
    whose ``step`` are those of the block.

    ``foresight`` and ``tape`` are None here; `variants.py` compiles these lines once more for a policy that foresees
    and for a tape that notes everything down. What is None costs nothing.
    """
    batch, machine, setting, state, log = work.batch, work.machine, work.setting[0], work.state, work.log
    layers = state.cells.shape[0]
    head = head_s(machine)
    for s in range(batch.steps.rows.size):
        step = batch.steps.first + s
        row = log.step[s]
        if setting.waits and batch.steps.phase[s] == DECODE and log.tally[0].waited == 0:
            log.tally[0].waited = 1
            if tape is not None:
                note_wait(tape, step, machine, state)
            _wait(machine, state, row, log)
        dense = dense_s(machine, batch.steps.rows[s], batch.steps.kv_tokens[s])
        imbalance_sum, imbalance_count = 0.0, 0
        for layer in range(layers):
            imbalance = _replay_layer(layer, step, dense, work, dispatch, residency, foresight, tape)
            if imbalance >= 0:
                imbalance_sum += imbalance
                imbalance_count += 1
        row.imbalance = imbalance_sum / imbalance_count if imbalance_count > 0 else np.nan
        row.dense_s = dense * layers
        row.head_s = head
        row.duration_s = row.dense_s + row.moe_s + head + row.wait_s
        log.unit[GPU].busy_s += head
        log.unit[GPU].bytes += machine.work[0].head_bytes
        if setting.counts_prompts:
            _end_step(step, batch, setting, state, log)
        if tape is not None:
            note_head(tape, step, machine, state)


def new_state(machine: Machine, prompts: Prompts, cache: Cache, admit: bool) -> State:
    """Return the state before the first step, with an empty cache; ``admit``: whether what arrives may be kept."""
    layers, experts = machine.weight_bytes.shape
    return State(
        cells=empty_cells(layers, experts, admit),
        cache=cache,
        queue=empty_queue(machine.weight_bytes),
        prompts=prompts,
        scratch=new_scratch(machine),
    )


@cache
def smallest_work() -> Work:
    """Return the smallest possible work, of which the types are read that kernels are compiled for."""
    one, none = np.zeros(1, np.int64), np.zeros(0, np.int64)
    bits = np.zeros(1, np.uint8)
    few = np.zeros(1, np.int32)
    demand = Demand(np.zeros(2, np.int64), few, few, few, np.zeros(1))
    batch = Batch(Steps(0, one, one, one, bits), demand, one, np.zeros((0, 1, 1), np.uint16), none, bits, none)
    nothing, ones = np.ones((1, 1)), np.ones((1, 1), np.int64)
    machine = Machine(records(2, DEVICE), records(1, LINK), records(1, WORK), 1, nothing, ones, 1)
    state = new_state(machine, prompts_of(none, none, none, 1), empty_cache(1, 1, 1, 0, BY_TOUCH), True)
    return Work(batch, machine, new_setting(), state, new_log(1, 1, 1))


def replay_signature(foresight: Any, tape: Any) -> Any:
    """Return the types that ``replay_batch`` is compiled for, with a foresight and a tape like these, or None."""
    from numba import typeof, types

    hook = types.FunctionType(hook_signature())
    return types.void(typeof(smallest_work()), hook, hook, typeof(foresight), typeof(tape))
