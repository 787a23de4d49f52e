"""The work of each part of a machine with more tiers in a layer."""

from moetrace.engine.machine import FIRST_HOME
from moetrace.engine.state import CPU, FIRST_GROUP, GPU, LINK_IN, LINK_OUT
from moetrace.engine.tape import note_cold
from moetrace.engine.tiers.tier_records import CPU_ROW, NO_GROUP
from moetrace.jit.compile import kernel


@kernel
def begin_layer(tiers, tally, row):
    """Return the seconds that a layer begins with, those of evictions since the last one; ``row``: its step's."""
    tiers_tally = tiers.tally[0]
    seconds = (tally[0].evictions - tiers_tally.evictions_paid) * tiers.term[0].evict_s
    tiers_tally.evictions_paid = tally[0].evictions
    tiers.beside[0].evict_s = seconds
    tiers_tally.evict_s += seconds
    row.dense_s += seconds
    return seconds


@kernel
def call_remote(remote, term, step, layer):
    """Let the decisions of a layer see what it waits for remote functions; return these seconds."""
    if remote is None:
        return 0.0
    seconds = remote.seconds[step - remote.first_step, layer]
    term[0].remote_s = seconds
    return seconds


@kernel
def start_cold(remote, step, tape):
    """Return the seconds of the cold start, if this is the first step and functions start."""
    if remote is None:
        return 0.0
    if step > 0:
        return 0.0
    note_cold(tape, step, remote.cold_s)
    return remote.cold_s


@kernel
def end_layer(tiers, seconds):
    """Let ``seconds`` pass."""
    tiers.tally[0].now_s += seconds


@kernel
def end_step(tiers, head_s):
    """Let the head pass."""
    tiers.tally[0].now_s += head_s


@kernel
def units_of(tiers, machine, scratch):
    """Return over how many units work is spread."""
    if tiers is None:
        return scratch.groups.size * machine.share
    return tiers.term[0].units


@kernel
def note_cpu(layer, size, scratch, log):
    """Note what a CPU beside units runs; `replay` has counted it as home's."""
    part = log.unit[FIRST_GROUP + scratch.groups.size + CPU_ROW]
    for i in range(size):
        if scratch.plan[i] == CPU:
            expert = scratch.active[i]
            part.rows += expert.rows
            part.bytes += expert.weight_bytes
            part.experts += 1
            log.layer[layer].ndp_experts -= 1
            log.layer[layer].cpu_experts += 1


@kernel
def note_tiers(dense, line, moved, machine, tiers, scratch, log):
    """Add a layer's work to the books of all parts; ``moved``: bytes and seconds of prefetches."""
    gpu, link_in, link_out = log.unit[GPU], log.unit[LINK_IN], log.unit[LINK_OUT]
    beside = tiers.beside[0]
    out_s, back_s = line.act_s + beside.cpu_act_s, beside.home_back_s + beside.cpu_back_s
    act_bytes = line.act_bytes + beside.cpu_act_bytes
    gpu.busy_s += dense - machine.work[0].overhead_s - beside.evict_s + line.gpu_s
    gpu.bytes += machine.work[0].dense_bytes
    link_in.busy_s += line.fetch_s + moved[1] + back_s
    link_in.bytes += line.demand_bytes + moved[0] + act_bytes
    link_out.busy_s += out_s
    link_out.shared_s += min(line.act_s, beside.cpu_act_s)  # both leave at the router's word
    link_out.bytes += act_bytes
    log.unit[FIRST_GROUP + scratch.groups.size + CPU_ROW].busy_s += beside.cpu_s
    if line.busiest_s > 0.0:
        _note_groups(tiers.term[0], machine, scratch.groups, log)


@kernel
def _note_groups(term, machine, groups, log):
    """Add the units' work; where the last group is all units together, it is work of each of them."""
    own, start_s = groups.size if term.all_group == NO_GROUP else term.all_group, machine.device[FIRST_HOME].layer_s
    for g in range(own):
        group, part = groups[g], log.unit[FIRST_GROUP + g]
        count, busy_s, outside_s = group.count, group.busy_s, group.outside_s
        part.rows += group.rows
        part.bytes += group.weight_bytes
        if term.all_group != NO_GROUP:
            every = groups[term.all_group]
            count, busy_s, outside_s = count + every.count, busy_s + every.busy_s, outside_s + every.outside_s
            part.rows += every.rows / own
            part.bytes += every.weight_bytes / own
        part.experts += count
        part.busy_s += busy_s + outside_s + start_s if count > 0 else 0.0
