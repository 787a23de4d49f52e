"""The slices of a tape on a machine with more tiers; `engine/tape.py` writes those of others.

Order that the timing model leaves open is drawn as demand order. Kernels take a tape or None first.
"""

import numpy as np

from moetrace.engine.machine import FIRST_HOME, GPU_DEVICE
from moetrace.engine.prefetch import HEAD, TAIL
from moetrace.engine.state import CPU, FIRST_GROUP, GPU, HOME, LINK_IN, LINK_OUT, ON_GPU
from moetrace.engine.tape import (
    ACTIVATIONS,
    ACTIVATIONS_CPU,
    DENSE,
    EVICT,
    FETCH,
    LAYER,
    NOBODY,
    OUTSIDE,
    PREFETCH,
    READ,
    READ_AHEAD,
    REMOTE,
    WAIT,
    last_slice,
    note,
    note_count,
    note_dense,
    note_expert,
    note_moe,
    note_wait,
)
from moetrace.engine.tiers.tier_flows import piece_of
from moetrace.engine.tiers.tier_host import disk_spare_s, read_end_s
from moetrace.engine.tiers.tier_link import resent_bytes, set_resent_bytes, weights_s
from moetrace.engine.tiers.tier_records import CPU_ROW, DISK_ROW, NO_GROUP, REMOTE_ROW
from moetrace.engine.tiers.tier_times import fetched_end_s, outside_s_per_byte
from moetrace.jit.compile import kernel


@kernel
def tape_wait(tape, tiers, step, machine, state):
    """Before it: write the wait for the queue, with which the step begins."""
    if tape is None:
        return
    if tiers is None:
        note_wait(tape, step, machine, state)
    else:
        start_s = tape.clock_s[0]
        note_count(tape, step, start_s, state)
        seconds = _note_flow(tape, tiers, step, (0.0, np.inf, 0.0), machine, state)
        if seconds > 0.0:
            note(tape, step, -1, WAIT, NOBODY, start_s, seconds, 0.0)
            tape.clock_s[0] = start_s + seconds


@kernel
def tape_dense(tape, tiers, step, layer, dense, machine, state):
    """Before the queue flows beside it: write a layer's dense work, and that flow; ``dense`` with evictions."""
    if tape is None:
        return
    if tiers is None:
        note_dense(tape, step, layer, dense, machine, state)
    else:
        start_s, evict_s = tape.clock_s[0], tiers.beside[0].evict_s
        note_count(tape, step, start_s, state)
        dense_s = dense - machine.work[0].overhead_s - evict_s
        note(tape, step, layer, DENSE, GPU, start_s, dense_s, machine.work[0].dense_bytes)
        if evict_s > 0.0:
            note(tape, step, layer, EVICT, NOBODY, start_s + (dense - evict_s), evict_s, 0.0)
        _note_flow(tape, tiers, step, (0.0, dense, 0.0), machine, state)


@kernel
def tape_moe(tape, tiers, begun, seen, line, machine, state):
    """Before the queue flows beside it: write who runs the layer's experts and what moves for it, and that flow.

    ``begun``: step, layer and the seconds up to the router's word; ``seen`` as in `tape.note_moe`.
    """
    if tape is None:
        return
    step, layer, dense = begun
    if tiers is None:
        note_moe(tape, step, layer, dense, seen, line, machine, state)
    else:
        at = (step, layer, tape.clock_s[0] + dense)
        note_count(tape, step, at[2], state)
        _note_moe(tape, tiers, at, seen[1], line, machine, state)
        free_s = dense + line.fetch_s
        flows = (free_s, max(0.0, line.moe_s - line.fetch_s), dense + read_end_s(tiers.host))
        _note_flow(tape, tiers, step, flows, machine, state)
        note(tape, step, layer, LAYER, NOBODY, tape.clock_s[0], dense + line.moe_s, line.demand_bytes)


@kernel
def _note_flow(tape, tiers, step, times, machine, state):
    """Write what `flow_tiers` is about to let arrive; return the seconds that it takes.

    ``times``: when it begins, since the layer did; for how long; and when the disk has read the demanded experts.
    """
    queue, experts = state.queue, state.cells.shape[1]
    (start_s, left_s, disk_free_s), used_s, spare_s = times, 0.0, disk_spare_s(tiers.host)
    layer_s, begin_s = tape.clock_s[0], tiers.tally[0].now_s + start_s
    for at in range(queue.ends[HEAD], queue.ends[TAIL]):
        if left_s <= 0:
            break
        key = np.int64(queue.key[at])
        if queue.place[key] != at:
            continue
        step_bytes, step_s, is_read = piece_of(tiers, queue, key, begin_s + used_s, (left_s, spare_s), machine)
        if step_bytes <= 0.0:
            continue
        layer, expert = divmod(key, experts)
        note(tape, step, layer, PREFETCH, LINK_IN, layer_s + start_s + used_s, step_s, step_bytes)
        last_slice(tape).expert = expert
        if is_read:
            disk_free_s = max(disk_free_s, start_s + used_s)
            unit = FIRST_GROUP + state.scratch.groups.size + DISK_ROW
            note(tape, step, layer, READ_AHEAD, unit, layer_s + disk_free_s, step_s, step_bytes)
            last_slice(tape).expert = expert
            disk_free_s += step_s
            spare_s -= step_s
        left_s -= step_s
        used_s += step_s
    return used_s


@kernel
def _note_moe(tape, tiers, at, size, line, machine, state):
    """Write a layer's slices after the router's word; ``at``: step, layer, and when that comes."""
    (step, layer, start_s), beside, scratch = at, tiers.beside[0], state.scratch
    _note_reads(tape, tiers.host, at, size, scratch)
    _note_gpu(tape, tiers, at, size, machine, scratch)
    remote_s = tiers.term[0].remote_s
    if remote_s > 0.0:
        note(tape, step, layer, REMOTE, FIRST_GROUP + scratch.groups.size + REMOTE_ROW, start_s, remote_s, 0.0)
    if beside.home_end_s > 0.0:
        _note_units(tape, tiers.term[0], at, beside.home_begin_s, size, machine, scratch)
        note(tape, step, layer, ACTIVATIONS, LINK_OUT, start_s, line.act_s, line.act_bytes)
        back_s = start_s + (beside.home_end_s - beside.home_back_s)
        note(tape, step, layer, ACTIVATIONS, LINK_IN, back_s, beside.home_back_s, line.act_bytes)
    if beside.cpu_end_s > 0.0:
        _note_cpu(tape, tiers.term[0], at, beside.cpu_begin_s, size, scratch)
        note(tape, step, layer, ACTIVATIONS_CPU, LINK_OUT, start_s, beside.cpu_act_s, beside.cpu_act_bytes)
        back_s = start_s + (beside.cpu_end_s - beside.cpu_back_s)
        note(tape, step, layer, ACTIVATIONS_CPU, LINK_IN, back_s, beside.cpu_back_s, beside.cpu_act_bytes)


@kernel
def _note_reads(tape, host, at, size, scratch):
    """Write what the disk reads for the layer."""
    if host is None:
        return
    step, layer, start_s = at
    unit = FIRST_GROUP + scratch.groups.size + DISK_ROW
    for i in range(size):
        expert = scratch.active[i]
        if not expert.resident and expert.ready_s > 0.0:
            seconds = expert.weight_bytes * host.disk[0].s_per_byte + host.disk[0].latency_s
            note(tape, step, layer, READ, unit, start_s + (expert.ready_s - seconds), seconds, expert.weight_bytes)
            last_slice(tape).expert = expert.expert


@kernel
def _note_gpu(tape, tiers, at, size, machine, scratch):
    """Write the GPU's experts and their fetches, as `tier_line` has them.

    The slice of an expert that arrives in parts is as long as its work: the waits for parts come before it.
    """
    (step, layer, start_s), free_s, fetched_s, layer_s = at, 0.0, 0.0, machine.device[GPU_DEVICE].layer_s
    for j in range(size):
        i = scratch.active[j].turn
        if scratch.plan[i] != ON_GPU:
            continue
        expert = scratch.active[i]
        if expert.resident:
            note_expert(tape, step, layer, GPU, start_s + free_s, expert.gpu_s + layer_s, expert)
            free_s += layer_s + expert.gpu_s
            layer_s = 0.0
            continue
        from_s = max(fetched_s, expert.ready_s)
        seconds = _weights_again_s(tiers, expert, from_s, machine)
        note(tape, step, layer, FETCH, LINK_IN, start_s + from_s, seconds, expert.weight_bytes)
        last_slice(tape).expert = expert.expert
        fetched_s = from_s + seconds
        free_s = fetched_end_s(tiers.term[0], free_s, from_s, fetched_s, expert.gpu_s)
        note_expert(tape, step, layer, GPU, start_s + (free_s - expert.gpu_s), expert.gpu_s, expert)


@kernel
def _weights_again_s(tiers, expert, from_s, machine):
    """Return the seconds that a demand fetch has taken, by the same draw, and note nothing."""
    resent = resent_bytes(tiers.transfers)
    cap_s = outside_s_per_byte(tiers.term[0], machine.share, expert.group)
    seconds = weights_s(tiers.transfers, expert, from_s, cap_s)
    set_resent_bytes(tiers.transfers, resent)
    return seconds


@kernel
def _note_units(tape, term, at, begin_s, size, machine, scratch):
    """Write the experts of each group of units; where the last group is all units together, those of each unit."""
    every, groups = term.all_group, scratch.groups
    own = groups.size if every == NO_GROUP else every
    for g in range(own):
        count = groups[g].count if every == NO_GROUP else groups[g].count + groups[every].count
        if count > 0:
            _note_unit(tape, at, (g, every, own), (begin_s, machine.device[FIRST_HOME].layer_s), size, scratch)


@kernel
def _note_unit(tape, at, where, times, size, scratch):
    """Write what a group runs, one expert after another, and what others read of it, which keeps it busy.

    ``where``: the group, that of all units, and how many they are; ``times``: when the work begins, and the start of
    it, which is a part of the first expert's slice.
    """
    (step, layer, start_s), (g, every, units), (free_s, layer_s) = at, where, times
    for i in range(size):
        expert = scratch.active[i]
        if expert.group != g and expert.group != every:
            continue
        if scratch.plan[i] == HOME:
            begin_s = max(free_s, expert.ready_s - layer_s)
            note_expert(tape, step, layer, FIRST_GROUP + g, start_s + begin_s, expert.ndp_s + layer_s, expert)
            if expert.group == every:
                entry = last_slice(tape)
                entry.rows, entry.bytes = expert.rows / units, expert.weight_bytes / units
            free_s = begin_s + expert.ndp_s + layer_s
            layer_s = 0.0
        elif expert.outside_s > 0.0 and (scratch.plan[i] == CPU or not expert.resident):
            note(tape, step, layer, OUTSIDE, FIRST_GROUP + g, start_s + free_s, expert.outside_s, 0.0)
            last_slice(tape).expert = expert.expert
            free_s += expert.outside_s


@kernel
def _note_cpu(tape, term, at, begin_s, size, scratch):
    """Write the experts of a CPU beside units, one after another; its start is a part of the first one's slice."""
    (step, layer, start_s), free_s, layer_s = at, begin_s, term.cpu_layer_s
    unit = FIRST_GROUP + scratch.groups.size + CPU_ROW
    for i in range(size):
        if scratch.plan[i] == CPU:
            expert = scratch.active[i]
            note_expert(tape, step, layer, unit, start_s + free_s, expert.cpu_s + layer_s, expert)
            free_s += expert.cpu_s + layer_s
            layer_s = 0.0
