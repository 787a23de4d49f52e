"""One layer's time line on a machine with more tiers, once it is known who runs what."""

from typing import NamedTuple

from moetrace.engine.layer import Timeline
from moetrace.engine.state import ON_GPU
from moetrace.engine.tiers.tier_host import spare_disk
from moetrace.engine.tiers.tier_link import (
    IN,
    OUT,
    TO_CPU,
    TO_HOME,
    activations_s,
    resent_bytes,
    set_resent_bytes,
    weights_s,
)
from moetrace.engine.tiers.tier_records import AUTO
from moetrace.engine.tiers.tier_times import (
    best_chunks,
    exchange_s_of,
    fetched_end_s,
    home_span_s,
    home_work,
    outside_s_per_byte,
    share_out_work,
    term_of,
)
from moetrace.jit.compile import kernel


class Exchange(NamedTuple):
    """Rows that went out, and their results that came back: seconds with all latencies, and bytes of one way."""

    begin_s: float  # of the work
    end_s: float
    out_s: float
    back_s: float
    byte_count: float


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
        from_s = max(fetched_s, expert.ready_s)
        seconds = weights_s(tiers.transfers, expert, from_s, outside_s_per_byte(term, view.share, expert.group))
        fetched_s = from_s + seconds
        fetch_s += seconds
        demand_bytes += expert.weight_bytes
        free_s = fetched_end_s(term, free_s, from_s, fetched_s, expert.gpu_s)
    nothing, beside = Exchange(0.0, 0.0, 0.0, 0.0, 0.0), tiers.beside[0]
    sent, sent_cpu = nothing, nothing
    beside.cpu_s = 0.0
    if home.experts > 0:
        parts = (home.row_shards, home.busiest_s, term.home_command_s)
        sent = _exchanged(tiers.transfers, machine, view, parts, TO_HOME, (term.home_chunks, size), plan)
    if cpu.experts > 0:
        beside.cpu_s = cpu.busy_s + term.cpu_layer_s
        parts = (min(float(view.rows), cpu.rows), beside.cpu_s, term.cpu_command_s)
        sent_cpu = _exchanged(tiers.transfers, machine, view, parts, TO_CPU, (term.cpu_chunks, size), plan)
    beside.home_begin_s, beside.home_end_s, beside.home_back_s = sent.begin_s, sent.end_s, sent.back_s
    beside.cpu_begin_s, beside.cpu_end_s, beside.cpu_back_s = sent_cpu.begin_s, sent_cpu.end_s, sent_cpu.back_s
    beside.cpu_act_s, beside.cpu_act_bytes = sent_cpu.out_s, sent_cpu.byte_count
    moe_s = max(free_s, sent.end_s, sent_cpu.end_s, term.remote_s)
    spare_disk(tiers.host, moe_s)
    return Timeline(moe_s, sent.out_s, fetch_s, busy_s, sent.byte_count, demand_bytes, home.busiest_s, home.busy_sum_s)


@kernel
def tiers_line_again(tiers, machine, view, size, plan):
    """Return the time line once more, with other prices on the GPU, and note nothing."""
    resent = resent_bytes(tiers.transfers)
    line = tier_line(tiers, machine, view, size, plan)
    set_resent_bytes(tiers.transfers, resent)
    return line


@kernel
def _exchanged(transfers, machine, view, parts, device, sizes, plan):
    """Return the exchange with a device: ``parts`` are rows one way, seconds of work, and what a further chunk costs.

    ``sizes``: chunks, and active experts. How many chunks there are was decided before anything was drawn.
    """
    (rows, work_s, command_s), (chunks, size) = parts, sizes
    latency_s, plain_s, byte_count = view.link_latency_s, rows * view.out_s_per_row, machine.work[0].row_bytes * rows
    count = best_chunks(plain_s, work_s, latency_s, command_s) if chunks == AUTO else chunks
    out_s = activations_s(transfers, byte_count, 0.0, plain_s, device, OUT)
    if device == TO_HOME:
        work_s = home_span_s(term_of(view), view, size, plan, out_s + latency_s, work_s)
    back_s = activations_s(transfers, byte_count, out_s + latency_s + work_s, plain_s, device, IN)
    end_s = exchange_s_of((out_s, work_s, back_s), latency_s, count, command_s)
    begin_s = out_s / count + latency_s
    return Exchange(begin_s, end_s, out_s + latency_s * count, back_s + latency_s * count, byte_count)


@kernel
def shared_tiers_s(line, prefetch_s, beside):
    """Return the seconds that transfers towards the GPU share: weights from 0 on, and returning activations."""
    first_s, first_end_s = beside.home_end_s - beside.home_back_s, beside.home_end_s
    second_s, second_end_s = beside.cpu_end_s - beside.cpu_back_s, beside.cpu_end_s
    if second_s < first_s:
        first_s, first_end_s, second_s, second_end_s = second_s, second_end_s, first_s, first_end_s
    end_s = line.fetch_s + prefetch_s
    shared_s = max(0.0, min(first_end_s, end_s) - first_s)
    end_s = max(end_s, first_end_s)
    return shared_s + max(0.0, min(second_end_s, end_s) - second_s)
