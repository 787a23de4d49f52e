"""One layer's time line: who ends when, once it is known who runs what (timing model, section 3)."""

from typing import NamedTuple

from moetrace.engine.state import HOME
from moetrace.jit.compile import kernel

# Two times closer than this are equal: a sum kept incrementally and one made anew may differ in the last bit.
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
    if count == 0:
        return 0.0
    act_s = row_shards * view.share * view.out_s_per_row + view.link_latency_s
    return act_s + (busiest_s + view.home_start_s) + act_s


@kernel
def gpu_end_s(view, free_s, arrived_s, expert):
    """Return when the GPU is done with one more expert: it is free at ``free_s``, the weights are there at the other.

    Residents come first and fetch nothing: what they wait for is the start of the layer's kernel, if that is one.
    """
    ready_s = view.gpu_start_s if expert.resident else arrived_s
    return max(free_s, ready_s) + expert.gpu_s


@kernel
def timeline(machine, view, size, plan):
    """Return the time line of a layer of ``size`` active experts under ``plan`` (1 = GPU), made anew.

    Leaves the work of each group of units in ``view.groups``.
    """
    give_rest(view, size, plan)
    gpu_free_s, gpu_busy_s, arrival_s, demand_bytes, gpu_start_s = 0.0, 0.0, 0.0, 0.0, 0.0
    for j in range(size):
        i = view.active[j].turn
        expert = view.active[i]
        if plan[i] == HOME:
            continue
        arrival_s += expert.fetch_s
        demand_bytes += 0.0 if expert.resident else expert.weight_bytes
        gpu_busy_s += expert.gpu_s
        gpu_free_s = gpu_end_s(view, gpu_free_s, arrival_s, expert)
        gpu_start_s = view.gpu_start_s if expert.resident else gpu_start_s
    gpu_busy_s += gpu_start_s
    row_shards, busiest_s, busy_sum_s, count = 0.0, 0.0, 0.0, 0
    for g in range(view.groups.size):
        group = view.groups[g]
        row_shards += min(float(view.rows), group.rows)
        busy_s = group.busy_s + (view.home_start_s if group.count > 0 else 0.0)
        busiest_s = max(busiest_s, busy_s)
        busy_sum_s += busy_s * view.share
        count += group.count
    act_bytes, act_s, ndp_s = 0.0, 0.0, 0.0
    if count > 0:
        act_bytes = machine.work[0].row_bytes * (row_shards * view.share)
        act_s = act_bytes * machine.link[0].s_per_byte + machine.link[0].latency_s
        ndp_s = act_s + busiest_s + act_s
    return Timeline(
        max(gpu_free_s, ndp_s), act_s, arrival_s, gpu_busy_s, act_bytes, demand_bytes, busiest_s, busy_sum_s
    )
