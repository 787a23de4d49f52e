"""One layer's time line on a machine with more tiers, once it is known who runs what."""

from moetrace.engine.layer import Timeline
from moetrace.engine.state import ON_GPU
from moetrace.engine.tiers.tier_times import (
    cpu_end_s,
    fetched_end_s,
    home_end_s,
    home_work,
    share_out_work,
)
from moetrace.jit.compile import kernel


@kernel
def tier_line(tiers, machine, view, size, plan):
    """Return the time line of a layer's ``size`` active experts; the units' work is left in ``view.groups``."""
    term = tiers.term[0]
    cpu, home_rows = share_out_work(view, size, plan)
    home = home_work(term, view, home_rows)
    free_s, fetched_s, fetch_s, busy_s, demand_bytes, start_s = 0.0, 0.0, 0.0, 0.0, 0.0, view.gpu_start_s
    for j in range(size):
        i = view.active[j].turn
        if plan[i] != ON_GPU:
            continue
        expert = view.active[i]
        busy_s += expert.gpu_s
        if expert.resident:
            free_s += start_s + expert.gpu_s
            busy_s += start_s
            start_s = 0.0
            continue
        from_s = fetched_s
        fetched_s = from_s + expert.fetch_s
        fetch_s += expert.fetch_s
        demand_bytes += expert.weight_bytes
        free_s = fetched_end_s(term, free_s, from_s, fetched_s, expert.gpu_s)
    home_s, cpu_s = home_end_s(term, view, home), cpu_end_s(term, view, cpu)
    act_bytes, act_s, beside = 0.0, 0.0, tiers.beside[0]
    beside.cpu_s = beside.cpu_act_s = beside.cpu_act_bytes = 0.0
    beside.home_end_s, beside.cpu_end_s = home_s, cpu_s
    if home.experts > 0:
        act_bytes, act_s = _sent(machine, view, home.row_shards, term.home_chunks)
    if cpu.experts > 0:
        beside.cpu_act_bytes, beside.cpu_act_s = _sent(machine, view, min(float(view.rows), cpu.rows), term.cpu_chunks)
        beside.cpu_s = cpu.busy_s + term.cpu_layer_s
    moe_s = max(free_s, home_s, cpu_s, term.remote_s)
    return Timeline(moe_s, act_s, fetch_s, busy_s, act_bytes, demand_bytes, home.busiest_s, home.busy_sum_s)


@kernel
def _sent(machine, view, rows, chunks):
    """Return the bytes of activations that rows take one way, and their seconds."""
    return machine.work[0].row_bytes * rows, rows * view.out_s_per_row + view.link_latency_s * max(chunks, 1)


@kernel
def shared_tiers_s(line, prefetch_s, beside):
    """Return the seconds that transfers towards the GPU have in common: weights from 0 on, and what comes back."""
    first_s, first_end_s = beside.home_end_s - line.act_s, beside.home_end_s
    second_s, second_end_s = beside.cpu_end_s - beside.cpu_act_s, beside.cpu_end_s
    if second_s < first_s:
        first_s, first_end_s, second_s, second_end_s = second_s, second_end_s, first_s, first_end_s
    end_s = line.fetch_s + prefetch_s
    shared_s = max(0.0, min(first_end_s, end_s) - first_s)
    end_s = max(end_s, first_end_s)
    return shared_s + max(0.0, min(second_end_s, end_s) - second_s)
