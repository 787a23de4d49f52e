"""The work of each part of the machine in a layer."""

from moetrace.engine.machine import FIRST_HOME
from moetrace.engine.prefetch import leave
from moetrace.engine.sharing import run_whole
from moetrace.engine.state import FIRST_GROUP, GPU, LINK_IN, LINK_OUT, SHARED
from moetrace.jit.compile import kernel


@kernel
def carry_out(layer, size, state, log):
    """Record where each expert ran, and take fetched ones out of the prefetch queue; return how many were fetched."""
    experts, gpu = state.cells.shape[1], log.unit[GPU]
    # In registers: in memory each sum waits for the last one.
    gpu_rows, gpu_bytes, used, fetched, on_gpu = gpu.rows, gpu.bytes, 0, 0, 0
    for j in range(size):  # in turn: those on the GPU come together, and the processor guesses right
        i = state.scratch.active[j].turn
        if state.scratch.plan[i] & 1 == 0:  # at home, or on a CPU beside it
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
def note_units(dense, line, moved_bytes, machine, state, log):
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
