"""Yardsticks that no policy, or no residency, can do anything about (timing model, section 8)."""

from typing import Any

import numpy as np

from moetrace.engine.cost import dense_s, head_s, price, price_varied, prices_of
from moetrace.engine.demand import see_gates
from moetrace.engine.layer import timeline
from moetrace.engine.machine import FIRST_HOME
from moetrace.engine.replay import smallest_work
from moetrace.engine.sharing import shared_of
from moetrace.engine.state import hook_signature
from moetrace.engine.tiers.tier_books import call_remote
from moetrace.engine.tiers.tier_prices import price_tiers
from moetrace.engine.tiers.tier_records import Tiers
from moetrace.engine.tiers.tier_times import moe_s as tiers_moe_s
from moetrace.engine.view import view_of
from moetrace.jit.compile import kernel


def _work_bound_signature() -> Any:
    from numba import typeof, types

    work = smallest_work()
    arguments = map(typeof, (work.batch.steps, work.batch.demand, work.machine))
    return types.float64(*arguments, types.float64)


def clairvoyant_signature(tiers: Tiers | None) -> Any:
    """Return the types that ``clairvoyant_s`` is compiled for, with such tiers, or None."""
    from numba import typeof, types

    work, hook = smallest_work(), types.FunctionType(hook_signature())
    batch, own = work.batch, (work.state.cells, work.state.scratch)
    arguments = (batch.steps, batch.demand, work.machine, tiers, work.setting, own)
    return types.float64(*map(typeof, arguments), hook, types.float64)


@kernel(signature=_work_bound_signature)
def work_bound_s(steps, demand, machine, total_s):
    """Add to ``total_s`` the seconds of a block if all units shared all work perfectly: no schedule beats it.

    The sum is carried from block to block, so that its last bit does not depend on how a trace is cut.
    """
    layers, work = machine.weight_bytes.shape[0], machine.work[0]
    for s in range(steps.rows.size):
        dense = dense_s(machine, steps.rows[s], steps.kv_tokens[s])
        total_s += head_s(machine)
        for layer in range(layers):
            first, stop = demand.start[s * layers + layer], demand.start[s * layers + layer + 1]
            rows, weight_bytes = 0, (stop - first) * machine.even_bytes
            for i in range(first, stop):
                rows += demand.rows[i]
            if machine.even_bytes == 0.0:
                for i in range(first, stop):
                    weight_bytes += machine.weight_bytes[layer, demand.expert[i]]
            total_s += dense + max(weight_bytes / work.all_bytes_s, work.flop_per_row * rows / work.all_flop_s)
    return total_s


@kernel
def _is_as_before(machine, demand, layer, first, size, active):
    """Return whether a layer's active experts, from ``first`` on, have the rows, bytes and homes of the records."""
    if machine.even_bytes > 0.0 and machine.device.size == FIRST_HOME + 1:
        same = demand.rows[first] == active[0].rows  # the most rows
        for i in range(size if same else 0):
            same &= demand.rows[first + i] == active[i].rows
        return same
    for i in range(size):
        expert, before = np.int64(demand.expert[first + i]), active[i]
        if demand.rows[first + i] != before.rows or machine.weight_bytes[layer, expert] != before.weight_bytes:
            return False
        if machine.home[layer, expert] != before.group + FIRST_HOME:
            return False
    return True


@kernel(signature=lambda: clairvoyant_signature(None))
def clairvoyant_s(steps, demand, machine, tiers, settings, own, dispatch, total_s):
    """Add to ``total_s`` a block's seconds if the most demanded experts of a layer, up to the slots, were resident.

    ``own`` are cells and scratch of its own: the dispatch may write into them. Where there are ``tiers``, `variants.py`
    compiles it once more.
    """
    cells, scratch = own
    layers, prices, setting = machine.weight_bytes.shape[0], prices_of(machine), settings[0]
    last_size, last_rows, last_remote_s, moe_s = 0, 0, 0.0, 0.0
    for s in range(steps.rows.size):
        total_s += layers * dense_s(machine, steps.rows[s], steps.kv_tokens[s]) + head_s(machine)
        for layer in range(layers):
            first = demand.start[s * layers + layer]
            size = demand.start[s * layers + layer + 1] - first
            remote_s = 0.0
            if tiers is not None:
                remote_s = call_remote(tiers.remote, tiers.term, steps.first + s, layer)
            if size == 0:
                total_s += remote_s
                continue
            # As the layer before it, in all that a time depends on: so are most layers where a step has one row.
            alike = size == last_size and steps.rows[s] == last_rows and not (setting.own_dispatch or setting.weighs)
            alike = alike and remote_s == last_remote_s
            if alike and _is_as_before(machine, demand, layer, first, size, scratch.active):
                total_s += moe_s
                continue
            last_size, last_rows, last_remote_s = size, steps.rows[s], remote_s
            view = view_of(steps.first + s, layer, steps, machine, setting, scratch, (0.0, np.int64(1)))
            for i in range(size):
                expert, rows = np.int64(demand.expert[first + i]), np.int64(demand.rows[first + i])
                scratch.load[i] = rows
                scratch.plan[i] = 0
                price(machine, prices, layer, expert, rows, i < setting.slots, scratch.active[i])
                scratch.active[i].turn = i  # resident ones are the first already
                if setting.own_dispatch:
                    cells[layer, expert].resident = i < setting.slots
            if not machine.is_plain:
                price_varied(machine, scratch.active, size)
            if tiers is not None:
                price_tiers(tiers, machine, scratch.active, size)
            if setting.weighs:
                see_gates(demand, first, size, scratch.active)
            if setting.splits:
                for i in range(size):
                    scratch.active[i].here = scratch.active[i].resident
            plan = scratch.plan[:size]
            dispatch(cells, view, layer, scratch.load[:size], plan)
            if tiers is None:
                moe_s = timeline(machine, view, size, plan, shared_of(setting.splits, size, plan)).moe_s
            else:
                moe_s = tiers_moe_s(tiers.term[0], view, size, plan)
            total_s += moe_s
            if setting.own_dispatch:
                for i in range(size):
                    cells[layer, scratch.active[i].expert].resident = 0
    return total_s
