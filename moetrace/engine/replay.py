"""The loop over steps and layers, in Numba; the state that it carries from block to block."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.against_optimal import compare_with_optimal
from moetrace.engine.books import carry_out, note_units
from moetrace.engine.by_worth import admit_by_worth, queue_best, touch_and_admit_by_worth
from moetrace.engine.cost import dense_s, head_s, order_on_gpu, price, price_varied, prices_of
from moetrace.engine.demand import Demand, see_gates
from moetrace.engine.dispatch import OPTIMAL_UP_TO
from moetrace.engine.foresight import foresee
from moetrace.engine.layer import shared_s, timeline
from moetrace.engine.levels import choose_level, time_levels
from moetrace.engine.machine import DEVICE, LINK, WORK, Machine
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
    note_late,
    remaining_bytes,
)
from moetrace.engine.prompt import Prompts, count_prompts, forget_ended, make_wanted, prompts_of, queue_wanted
from moetrace.engine.residency import Cache, empty_cache, empty_cells, pool_of, touch_and_admit
from moetrace.engine.setting import new_setting
from moetrace.engine.sharing import see_parts, share_out, shared_of
from moetrace.engine.state import (
    GPU,
    LINK_IN,
    Log,
    hook_signature,
    new_log,
    records,
)
from moetrace.engine.tape import note_head, note_layer_end
from moetrace.engine.tiers.tier_books import (
    begin_layer,
    call_remote,
    end_layer,
    end_step,
    note_cpu,
    note_tiers,
    start_cold,
    units_of,
)
from moetrace.engine.tiers.tier_flows import flow_tiers
from moetrace.engine.tiers.tier_host import keep_in_host, read_from_disk
from moetrace.engine.tiers.tier_layout import flow_layout, lay_out
from moetrace.engine.tiers.tier_line import shared_tiers_s, tier_line
from moetrace.engine.tiers.tier_link import begin_transfers
from moetrace.engine.tiers.tier_prices import price_tiers
from moetrace.engine.tiers.tier_records import Tiers
from moetrace.engine.tiers.tier_rows import lose_rows
from moetrace.engine.tiers.tier_tape import tape_dense, tape_moe, tape_wait
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
    """A block of steps, ready for the kernels; ``experts`` and ``request`` are empty where nobody asks for them."""

    steps: Steps
    demand: Demand
    offset: np.ndarray  # int64 [steps + 1 + ahead]
    experts: np.ndarray  # uint16 [rows, L, k]
    request: np.ndarray  # int64 [rows]
    row_phase: np.ndarray  # uint8 [rows]
    gates: np.ndarray  # float32 [rows, L, k]; or [0, L, k] where the trace lacks them, or nobody asks for them
    position: np.ndarray  # int64 [rows], in the request; empty where no policy cuts steps


class State(NamedTuple):
    """Everything that is carried from step to step, made once; and the scratch of one layer."""

    # First: hooks get these arrays on the stack. After `prompts` they lay 4096 bytes above the place for that, so that
    # each load waited for the store before it: a quarter of a replay's time at batch 1 on a Zen 5.
    scratch: LayerScratch
    cells: Any  # CELL [L, E]
    cache: Cache
    queue: Queue
    prompts: Prompts


class Aside(NamedTuple):
    """The parts that only some replays have. A part that is None is not compiled."""

    foresight: Any = None  # of a policy that foresees
    tape: Any = None  # on which everything that is done is noted
    regret: Any = None  # of decisions beside those of `optimal`
    levels: Any = None  # of frequency, which steps under a deadline choose from


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
def _admit(foresight, queue, cells, cache, tally):
    """Keep or drop the arrived experts, by the rules of the residency."""
    if foresight is None:
        admit_complete(queue, cells, cache, tally)
    else:
        admit_by_worth(foresight, queue, cells, cache, tally)


@kernel
def _foresee(foresight, batch, s, layer, size, work):
    """Learn from the choices of the layer's rows, and queue experts of the greatest worth, if the policy foresees."""
    if foresight is not None:
        state = work.state
        foresee(foresight, batch, s, layer, work.machine)
        if work.setting[0].prefetch == BY_WORTH:
            queue_best(foresight, state.queue, state.cache, layer, size, state.scratch, work.log.tally)


@kernel
def _offer(foresight, layer, size, fetched, work):
    """Touch the resident experts and offer the fetched ones to the residency."""
    state, tally = work.state, work.log.tally
    if foresight is None:
        touch_and_admit(state.cells, state.cache, layer, size, state.scratch, fetched, tally)
    else:
        touch_and_admit_by_worth(foresight, state.queue, state.cells, state.cache, layer, size, state.scratch, tally)


@kernel
def _imbalance(line, units, totals):
    """Return the busiest unit's seconds over the mean, which is added to a layer's totals; -1 where it is undefined."""
    if line.busiest_s == 0.0:
        return -1.0
    imbalance = line.busiest_s * units / line.busy_sum_s
    totals.imbalance_sum += imbalance
    totals.imbalance_count += 1
    return imbalance


@kernel
def _flow(tiers, queue, start_s, seconds, machine):
    """Let prefetches flow from ``start_s`` after the layer's begin on; return bytes and seconds."""
    if tiers is None:
        moved_bytes = flow(queue, seconds * machine.link[0].bytes_s)
        return moved_bytes, moved_bytes * machine.link[0].s_per_byte
    return flow_tiers(tiers, queue, start_s, seconds, machine)


@kernel
def _decided(tiers, aside, view, layer, size, plan, work):
    """Note the decisions, before they are carried out."""
    work.log.fallbacks[0] += work.setting[0].optimal and size > OPTIMAL_UP_TO
    compare_with_optimal(aside.regret, tiers, work.machine, view, layer, size, plan)


@kernel
def _replay_layer(layer, step, dense, work, dispatch, residency, tiers, aside):
    """Replay one layer; return its imbalance, -1 where that is undefined."""
    batch, machine, setting, state, log = work.batch, work.machine, work.setting[0], work.state, work.log
    queue, cells, tally = state.queue, state.cells, log.tally
    s = step - batch.steps.first
    at = s * cells.shape[0] + layer
    _admit(aside.foresight, queue, cells, state.cache, tally)
    if tiers is not None:
        dense += begin_layer(tiers, tally, log.step[s])
    tape_dense(aside.tape, tiers, step, layer, dense, machine, state)
    moved = _flow(tiers, queue, 0.0, dense, machine)
    if setting.prefetch == ORACLE:
        now = step * cells.shape[0] + layer
        tally[0].wasted += join_ahead(queue, cells, state.cache, batch.demand, at, now, setting)
    if tiers is not None:
        # Moves arrive after the prefetches of the same seconds, which read from the old places.
        flow_layout(aside.tape, step, tiers.layout, tiers, machine, dense)
        begin_transfers(tiers.transfers, tiers, machine, step, layer, dense)
    size = _see(at, layer, s, batch.demand, machine, setting, state, log)
    if tiers is not None:
        price_tiers(tiers, machine, state.scratch.active, size)
        call_remote(tiers.remote, tiers.term, step, layer)
        read_from_disk(tiers.host, layer, size, state.scratch.active)
    pool = pool_of(state.cache, layer)
    of_pool = (state.cache.age[pool], np.int64(state.cache.residents[pool] >= state.cache.capacity[pool]))
    view = view_of(step, layer, batch.steps, machine, setting, state.scratch, of_pool)
    load, plan = state.scratch.load[:size], state.scratch.plan[:size]
    if size > 0:
        dispatch(cells, view, layer, load, plan)
    _decided(tiers, aside, view, layer, size, plan, work)
    if tiers is None:
        shared = shared_of(setting.splits, size, plan)
        line = timeline(machine, view, size, plan, shared)
    else:
        shared = -1
        line = tier_line(tiers, machine, view, size, plan)
    time_levels(aside.levels, layer, plan, shared, line, view, tiers, machine)
    fetched = carry_out(layer, size, state, log)
    if tiers is not None:
        note_cpu(layer, size, state.scratch, log)
        lose_rows(tiers.transfers, batch, s, size, state.scratch, tiers.term[0], machine.share)
    elif shared >= 0:
        share_out(layer, shared, state, log)
    _foresee(aside.foresight, batch, s, layer, size, work)
    tape_moe(aside.tape, tiers, (step, layer, dense), (view, size, shared), line, machine, state)
    beside = _flow(tiers, queue, dense + line.fetch_s, max(0.0, line.moe_s - line.fetch_s), machine)
    moved = moved[0] + beside[0], moved[1] + beside[1]
    if setting.learns:
        residency(cells, view, layer, load, plan)
    _offer(aside.foresight, layer, size, fetched, work)
    if setting.prefetch == ONLINE:
        join_by_score(queue, cells, state.cache, layer, setting.depth)
    if tiers is not None:
        lay_out(tiers.layout, tiers, machine, state, layer, size)
    note_layer_end(aside.tape, step, dense + line.moe_s, state)
    if tiers is None:
        log.unit[LINK_IN].shared_s += shared_s(line, beside[1])
        note_units(dense, line, moved[0], machine, state, log)
    else:
        log.unit[LINK_IN].shared_s += shared_tiers_s(line, beside[1], tiers.beside[0])
        note_tiers(dense, line, moved, machine, tiers, state.scratch, log)
        keep_in_host(tiers.host, step, layer, size, work)
        end_layer(tiers, dense + line.moe_s)
    row, totals = log.step[s], log.layer[layer]
    row.moe_s += line.moe_s
    row.demand_bytes += line.demand_bytes
    row.prefetch_bytes += moved[0]
    totals.dense_s += dense
    totals.moe_s += line.moe_s
    totals.demand_bytes += line.demand_bytes
    return _imbalance(line, units_of(tiers, machine, state.scratch), totals)


@kernel(inline=False)
def _wait(tiers, machine, state, row, log):
    """Let the first decode step wait until the queue is empty; return the seconds."""
    if tiers is None:
        moved_bytes = flow(state.queue, remaining_bytes(state.queue))
        row.wait_s = moved_bytes * machine.link[0].s_per_byte
    else:
        moved_bytes, row.wait_s = flow_tiers(tiers, state.queue, 0.0, np.inf, machine)
        end_layer(tiers, row.wait_s)
    row.prefetch_bytes += moved_bytes
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


@kernel(signature=lambda: replay_signature(None, Aside()))
def replay_batch(work, dispatch, residency, tiers, aside):
    """Replay a block of steps; what follows it finds its state in ``state``, and the figures in ``log``,
    whose ``step`` are those of the block.

    ``tiers`` and all of ``aside`` are None here; `variants.py` compiles these lines once more for machines with more
    tiers, for a policy that foresees, and so on. Parts that are None cost nothing.
    """
    batch, machine, setting, state, log = work.batch, work.machine, work.setting[0], work.state, work.log
    layers = state.cells.shape[0]
    head = head_s(machine)
    for s in range(batch.steps.rows.size):
        step = batch.steps.first + s
        row, cold_s = log.step[s], 0.0
        if tiers is not None:
            cold_s = start_cold(tiers.remote, step, aside.tape)
        if setting.waits and batch.steps.phase[s] == DECODE and log.tally[0].waited == 0:
            log.tally[0].waited = 1
            tape_wait(aside.tape, tiers, step, machine, state)
            _wait(tiers, machine, state, row, log)
        dense = dense_s(machine, batch.steps.rows[s], batch.steps.kv_tokens[s])
        imbalance_sum, imbalance_count = 0.0, 0
        for layer in range(layers):
            imbalance = _replay_layer(layer, step, dense, work, dispatch, residency, tiers, aside)
            if imbalance >= 0:
                imbalance_sum += imbalance
                imbalance_count += 1
        row.imbalance = imbalance_sum / imbalance_count if imbalance_count > 0 else np.nan
        row.dense_s += dense * layers
        row.head_s = head
        row.duration_s = row.dense_s + row.moe_s + head + row.wait_s
        log.unit[GPU].busy_s += head
        log.unit[GPU].bytes += machine.work[0].head_bytes
        if setting.counts_prompts:
            _end_step(step, batch, setting, state, log)
        note_head(aside.tape, step, machine, state)
        if tiers is not None:
            row.duration_s += cold_s
            end_step(tiers, head)
        choose_level(aside.levels, s, dense, cold_s, work)


def new_state(machine: Machine, prompts: Prompts, cache: Cache, admit: bool, tiers: Tiers | None = None) -> State:
    """Return the state before the first step, with an empty cache; ``admit``: whether what arrives may be kept."""
    layers, experts = machine.weight_bytes.shape
    return State(
        cells=empty_cells(layers, experts, admit),
        cache=cache,
        queue=empty_queue(machine.weight_bytes),
        prompts=prompts,
        scratch=new_scratch(machine, tiers),
    )


@cache
def smallest_work() -> Work:
    """Return the smallest possible work, of which the types are read that kernels are compiled for."""
    one, none = np.zeros(1, np.int64), np.zeros(0, np.int64)
    bits = np.zeros(1, np.uint8)
    few, no_gates = np.zeros(1, np.int32), np.zeros((0, 1, 1), np.float32)
    demand = Demand(np.zeros(2, np.int64), few, few, few, np.zeros(1))
    arrays = np.zeros((0, 1, 1), np.uint16), none, bits, no_gates, none
    batch = Batch(Steps(0, one, one, one, bits), demand, one, *arrays)
    nothing, ones = np.ones((1, 1)), np.ones((1, 1), np.int64)
    machine = Machine(records(2, DEVICE), records(1, LINK), records(1, WORK), 1, nothing, ones, 1.0, 1)
    state = new_state(machine, prompts_of(none, none, none, 1), empty_cache(1, 1, 1, 0, BY_TOUCH), True)
    return Work(batch, machine, new_setting(), state, new_log(1, 1, 1))


def replay_signature(tiers: Any, aside: Aside) -> Any:
    """Return the types that ``replay_batch`` is compiled for, with such tiers, or None, and what else is there."""
    from numba import typeof, types

    hook = types.FunctionType(hook_signature())
    return types.void(typeof(smallest_work()), hook, hook, typeof(tiers), typeof(aside))
