"""Yardsticks that no policy, or no residency, can do anything about (timing model, section 8)."""

from typing import Any

import numpy as np

from moetrace.engine.cost import dense_s, head_s, price
from moetrace.engine.layer import timeline
from moetrace.engine.replay import view_of, work_type
from moetrace.engine.state import hook_signature
from moetrace.jit.compile import kernel


@kernel(signature=lambda: _sum_signature(work_type()))
def work_bound_s(work, total_s):
    """Add to ``total_s`` the seconds of a block if all units shared all work perfectly: no schedule beats it.

    The sum is carried from block to block, so that its last bit does not depend on how a trace is cut.
    """
    batch, machine = work.batch, work.machine
    layers = machine.weight_bytes.shape[0]
    for s in range(batch.rows.size):
        dense = dense_s(machine, batch.rows[s], batch.kv_tokens[s])
        total_s += head_s(machine)
        for layer in range(layers):
            weight_bytes, rows = 0.0, 0.0
            for i in range(batch.demand.start[s * layers + layer], batch.demand.start[s * layers + layer + 1]):
                weight_bytes += machine.weight_bytes[layer, batch.demand.expert[i]]
                rows += batch.demand.rows[i]
            work_s = max(weight_bytes / machine.all_bytes_s, machine.flop_per_row * rows / machine.all_flop_s)
            total_s += dense + work_s
    return total_s


@kernel(signature=lambda: _sum_signature(work_type(), _hook_type()))
def clairvoyant_batch(work, dispatch, total_s):
    """Add to ``total_s`` a block's seconds if the most demanded experts of a layer, up to the slots, were resident.

    The state is one of its own: the dispatch may write into its cells.
    """
    batch, machine, setting, state, _ = work
    layers = machine.weight_bytes.shape[0]
    for s in range(batch.rows.size):
        total_s += layers * dense_s(machine, batch.rows[s], batch.kv_tokens[s]) + head_s(machine)
        view = view_of(batch.first_step + s, batch, machine, setting, state)
        for layer in range(layers):
            first = batch.demand.start[s * layers + layer]
            size = batch.demand.start[s * layers + layer + 1] - first
            if size == 0:
                continue
            for i in range(size):
                expert, rows = np.int64(batch.demand.expert[first + i]), np.int64(batch.demand.rows[first + i])
                state.load[i] = rows
                state.plan[i] = 0
                price(machine, layer, expert, rows, i < setting.slots, state.active[i])
                state.active[i].turn = i  # resident ones are the first already
                if setting.own_dispatch:
                    state.cells[layer, expert].resident = i < setting.slots
            plan = state.plan[:size]
            dispatch(state.cells, view, layer, state.load[:size], plan)
            total_s += timeline(machine, view, size, plan).moe_s
            if setting.own_dispatch:
                for i in range(size):
                    state.cells[layer, state.active[i].expert].resident = 0
    return total_s


def _sum_signature(*arguments: Any) -> Any:
    from numba import types

    return types.float64(*arguments, types.float64)


def _hook_type() -> Any:
    from numba import types

    return types.FunctionType(hook_signature())
