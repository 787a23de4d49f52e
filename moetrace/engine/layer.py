"""One layer's time line: who ends when, once it is known who runs what (timing model, section 3)."""

from typing import NamedTuple

from moetrace.engine.sharing import give_shared_rest, missing_share, share_fetch_s, share_gpu_s
from moetrace.engine.state import HOME, ON_GPU
from moetrace.jit.compile import kernel

# Two times closer than this are equal: an incremental sum and a recomputed one may differ in the last bit.
SAME = 1 - 1e-12


class Timeline(NamedTuple):
    """Seconds from the router's word on; ``in_bytes`` is what demand fetches bring."""

    moe_s: float
    act_s: float  # activations, one way
    fetch_s: float  # demand fetches, with their latency
    gpu_s: float  # busy
    act_bytes: float  # activations, one way
    demand_bytes: float
    busiest_s: float  # busy seconds of the busiest unit
    busy_sum_s: float  # of all units


@kernel
def less(a, b):
    """Return whether time ``a`` is smaller than ``b`` beyond rounding."""
    return a < b * SAME


@kernel
def give_to_group(groups, expert):
    """Add an active expert (a record of ``ACTIVE``) to the work of the units that hold it."""
    group = groups[expert.group]
    group.busy_s += expert.ndp_s
    group.rows += expert.rows
    group.weight_bytes += expert.weight_bytes
    group.count += 1


@kernel
def take_from_group(groups, expert):
    """Undo ``give_to_group``; a group that is left without work is exactly idle."""
    group = groups[expert.group]
    group.count -= 1
    group.busy_s = group.busy_s - expert.ndp_s if group.count > 0 else 0.0
    group.rows -= expert.rows
    group.weight_bytes -= expert.weight_bytes


@kernel
def clear_groups(groups):
    """Take all work from the units."""
    for g in range(groups.size):
        groups[g].busy_s = 0.0
        groups[g].rows = 0.0
        groups[g].weight_bytes = 0.0
        groups[g].count = 0


@kernel
def give_rest(view, size, plan):
    """Give the units what the plan does not send to the GPU, and nothing else."""
    clear_groups(view.groups)
    if view.groups.size > 1:
        for i in range(size):
            if plan[i] == HOME:
                give_to_group(view.groups, view.active[i])
        return
    # All units share every expert: the sums stay in registers. Through memory each addition waits for the last one.
    busy_s, rows, weight_bytes, count = 0.0, 0.0, 0.0, 0
    for i in range(size):
        expert = view.active[i]
        given = plan[i] == HOME
        busy_s += expert.ndp_s if given else 0.0
        rows += expert.rows if given else 0.0
        weight_bytes += expert.weight_bytes if given else 0.0
        count += given
    group = view.groups[0]
    group.busy_s, group.rows, group.weight_bytes, group.count = busy_s, rows, weight_bytes, count


@kernel
def ndp_end_s(view):
    """Return ``T_ndp``: when the last results are back from where experts live, 0 if nothing runs there."""
    row_shards, busiest_s, count = 0.0, 0.0, 0
    for g in range(view.groups.size):
        group = view.groups[g]
        row_shards += min(float(view.rows), group.rows)
        busiest_s = max(busiest_s, group.busy_s)
        count += group.count
    return home_end_s(view, row_shards, busiest_s, count)


@kernel
def home_end_s(view, row_shards, busiest_s, count):
    """Return ``T_ndp`` of units that run ``count`` experts: ``row_shards`` are the rows that go out, of all groups."""
    if count == 0:
        return 0.0
    act_s = row_shards * view.share * view.out_s_per_row + view.link_latency_s
    return act_s + (max(busiest_s, 0.0) + view.home_start_s) + act_s


@kernel
def gpu_end_s(view, free_s, arrived_s, expert):
    """Return when the GPU is done with one more expert: it is free at ``free_s``, the weights are there at the other.

    Residents come first; where one kernel runs them all, the first waits for its start. (A branch that is always
    guessed right: a choice by ``resident`` took 1 ns an expert.)
    """
    if view.gpu_start_s > 0.0 and expert.resident:
        free_s = max(free_s, view.gpu_start_s)
    return max(free_s, arrived_s) + expert.gpu_s


@kernel
def gpu_start_s(view, size, plan):
    """Return what the GPU's kernel for residents takes to start: 0 if each starts itself, or the GPU runs none."""
    if view.gpu_start_s > 0.0:
        for i in range(size):
            if plan[i] != HOME and view.active[i].resident:
                return view.gpu_start_s
    return 0.0


@kernel
def shared_s(line, prefetch_s):
    """Return the seconds in which activations come back beside weights: fetches, then ``prefetch_s`` of prefetches."""
    back_s = line.act_s + line.busiest_s
    return max(0.0, min(line.act_s, line.fetch_s + prefetch_s - back_s))


@kernel
def timeline(machine, view, size, plan, shared):
    """Return the time line of a layer of ``size`` active experts under ``plan``, computed from scratch.

    ``shared`` is the expert that the GPU, which runs it last, and home share; -1 = none. Leaves the work of each group
    of units in ``view.groups``.
    """
    give_rest(view, size, plan)
    arrival_s, demand_bytes = 0.0, 0.0
    gpu_free_s = gpu_start_s(view, size, plan)
    gpu_busy_s = gpu_free_s
    for j in range(size):
        i = view.active[j].turn
        expert = view.active[i]
        if plan[i] != ON_GPU:
            continue
        arrival_s += expert.fetch_s
        demand_bytes += 0.0 if expert.resident else expert.weight_bytes
        gpu_busy_s += expert.gpu_s
        gpu_free_s = max(gpu_free_s, arrival_s) + expert.gpu_s
    if shared >= 0:
        expert = view.active[shared]
        give_shared_rest(view, expert)
        fetch_s = share_fetch_s(view, expert)
        arrival_s += fetch_s
        demand_bytes += missing_share(expert) * expert.weight_bytes
        gpu_free_s = max(gpu_free_s, arrival_s) if fetch_s > 0.0 else gpu_free_s
        gpu_free_s += share_gpu_s(view, expert)
        gpu_busy_s += share_gpu_s(view, expert)
    row_shards, busiest_s, busy_sum_s, count = 0.0, 0.0, 0.0, 0
    for g in range(view.groups.size):
        group = view.groups[g]
        row_shards += min(float(view.rows), group.rows)
        busiest_s = max(busiest_s, group.busy_s)
        busy_sum_s += group.busy_s * view.share
        count += group.count
    if view.home_start_s > 0.0 and count > 0:
        busiest_s += view.home_start_s
        for g in range(view.groups.size):
            busy_sum_s += view.home_start_s * view.share if view.groups[g].count > 0 else 0.0
    act_bytes, act_s, ndp_s = 0.0, 0.0, 0.0
    if count > 0:
        act_bytes = machine.work[0].row_bytes * (row_shards * view.share)
        act_s = act_bytes * machine.link[0].s_per_byte + machine.link[0].latency_s
        ndp_s = act_s + busiest_s + act_s
    return Timeline(
        max(gpu_free_s, ndp_s), act_s, arrival_s, gpu_busy_s, act_bytes, demand_bytes, busiest_s, busy_sum_s
    )
