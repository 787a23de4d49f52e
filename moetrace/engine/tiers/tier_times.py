"""When GPU, home and CPU end a layer, as decisions see it: without draws, and at the link's rate of the moment."""

from typing import NamedTuple

from moetrace.engine.layer import less
from moetrace.engine.state import CPU, HOME, ON_GPU, OWN
from moetrace.engine.tiers.tier_records import AUTO, MOST_CHUNKS, NO_GROUP, NO_LIMIT, TERM
from moetrace.jit.addresses import record_at
from moetrace.jit.compile import kernel


class Ends(NamedTuple):
    """Seconds after the router's word; 0 of what runs nothing."""

    gpu_s: float
    home_s: float
    cpu_s: float


class HomeWork(NamedTuple):
    """The work of all units together."""

    row_shards: float  # rows that go out, of all units
    busiest_s: float
    busy_sum_s: float
    experts: int


class CpuWork(NamedTuple):
    """The work of a CPU beside the units."""

    busy_s: float
    rows: float
    experts: int


@kernel
def term_of(view):
    """Return the machine's record of TERM, for a dispatch."""
    return record_at(record_at(view.own, OWN).term_at, TERM)


@kernel
def outside_s_per_byte(term, share, group):
    """Return what a byte takes at least that is read from outside, of an expert of a group of ``share`` units."""
    return term.all_s_per_byte if share > 1 or group == term.all_group else term.one_s_per_byte


@kernel
def fetched_end_s(term, free_s, from_s, to_s, gpu_s):
    """Return when the GPU has run an expert that arrives from ``from_s`` to ``to_s``, being free at ``free_s``."""
    if term.stream == 1:
        return max(free_s, to_s) + gpu_s
    if term.stream == NO_LIMIT:
        return max(max(free_s, from_s) + gpu_s, to_s)
    part = 1.0 / term.stream
    return max(max(free_s, from_s + (to_s - from_s) * part) + gpu_s, to_s + gpu_s * part)


@kernel
def next_fetched_s(term, expert, free_s, from_s):
    """Return when the GPU ends with one more expert, whose fetch begins at ``from_s``, and when the fetch does."""
    arrived_s = from_s + expert.fetch_s
    return fetched_end_s(term, free_s, from_s, arrived_s, expert.gpu_s), arrived_s


@kernel
def next_end_s(term, view, expert, free_s, from_s):
    """Return both for any expert; residents come first, and the first of them waits for their start."""
    if expert.resident:
        return free_s + expert.gpu_s + (view.gpu_start_s if free_s == 0.0 else 0.0), from_s
    return next_fetched_s(term, expert, free_s, from_s)


@kernel
def exchange_s(out_s, work_s, latency_s, chunks, command_s):
    """Return the seconds in which rows go out, are worked on, and come back, in equal chunks that overlap.

    ``out_s`` is one way without its latency.
    """
    parts = best_chunks(out_s, work_s, latency_s, command_s) if chunks == AUTO else chunks
    return exchange_s_of((out_s, work_s, out_s), latency_s, parts, command_s)


@kernel
def best_chunks(out_s, work_s, latency_s, command_s):
    """Return the number of chunks, a power of two, that takes least; the smallest on a tie."""
    best, best_s, parts = 1, exchange_s_of((out_s, work_s, out_s), latency_s, 1, command_s), 2
    while parts <= MOST_CHUNKS:
        seconds = exchange_s_of((out_s, work_s, out_s), latency_s, parts, command_s)
        if less(seconds, best_s):
            best, best_s = parts, seconds
        parts *= 2
    return best


@kernel
def exchange_s_of(seconds, latency_s, chunks, command_s):
    """Return the same for a number of chunks; ``seconds``: out, work and back, without latencies."""
    out_s, work_s, back_s = seconds
    if chunks == 1:
        return out_s + latency_s + work_s + (back_s + latency_s)
    out_s, back_s, chunk_s = out_s / chunks + latency_s, back_s / chunks + latency_s, work_s / chunks + command_s
    return out_s + chunk_s + back_s + (chunks - 1) * max(out_s, back_s, chunk_s)


@kernel
def clear_work(view):
    """Take all work from the units, and all reads from outside."""
    for g in range(view.groups.size):
        group = view.groups[g]
        group.busy_s = group.rows = group.weight_bytes = group.outside_s = 0.0
        group.count = 0


@kernel
def give_home(view, expert):
    """Add an expert to the work of the units that hold it."""
    group = view.groups[expert.group]
    group.busy_s += expert.ndp_s
    group.rows += expert.rows
    group.weight_bytes += expert.weight_bytes
    group.count += 1


@kernel
def read_outside(view, expert):
    """Let an expert be read from outside."""
    view.groups[expert.group].outside_s += expert.outside_s


@kernel
def share_out_work(view, size, plan):
    """Give units and CPU what a plan says; return the CPU's part, and the rows that home runs in all."""
    clear_work(view)
    cpu_s, cpu_rows, cpu_count, home_rows = 0.0, 0.0, 0, 0.0
    for i in range(size):
        expert = view.active[i]
        if plan[i] == HOME:
            give_home(view, expert)
            home_rows += expert.rows
        elif plan[i] == CPU:
            cpu_s += expert.cpu_s
            cpu_rows += expert.rows
            cpu_count += 1
            read_outside(view, expert)
        elif not expert.resident:
            read_outside(view, expert)
    return CpuWork(cpu_s, cpu_rows, cpu_count), home_rows


@kernel
def home_work(term, view, home_rows):
    """Return the sums over units of what ``view.groups`` say."""
    if term.all_group != NO_GROUP:
        return _mixed_work(term, view, home_rows)
    row_shards, busiest_s, busy_sum_s, count = 0.0, 0.0, 0.0, 0
    for g in range(view.groups.size):
        group = view.groups[g]
        if group.count > 0:
            busy_s = group.busy_s + view.home_start_s + group.outside_s
            row_shards += min(float(view.rows), group.rows)
            busiest_s = max(busiest_s, busy_s)
            busy_sum_s += busy_s * view.share
            count += group.count
    row_shards *= view.share
    return HomeWork(_sent(term, view, row_shards, home_rows), busiest_s, busy_sum_s, count)


@kernel
def _mixed_work(term, view, home_rows):
    """Return them where the last group is all units together."""
    every = view.groups[term.all_group]
    row_shards, busiest_s, busy_sum_s, count = 0.0, 0.0, 0.0, every.count
    for g in range(term.all_group):
        group = view.groups[g]
        if group.count + every.count > 0:
            busy_s = group.busy_s + every.busy_s + view.home_start_s + group.outside_s + every.outside_s
            row_shards += min(float(view.rows), group.rows + every.rows)
            busiest_s = max(busiest_s, busy_s)
            busy_sum_s += busy_s
            count += group.count
    return HomeWork(_sent(term, view, row_shards, home_rows), busiest_s, busy_sum_s, count)


@kernel
def _sent(term, view, row_shards, home_rows):
    """Return how many rows go out to the units."""
    return min(float(view.rows), home_rows) if term.sends_once else row_shards


@kernel
def home_end_s(term, view, work):
    """Return when the last results are back from home, 0 if nothing runs there."""
    if work.experts == 0:
        return 0.0
    out_s = work.row_shards * view.out_s_per_row
    return exchange_s(out_s, work.busiest_s, view.link_latency_s, term.home_chunks, term.home_command_s)


@kernel
def home_done_s(term, view, size, plan, work):
    """Return the same on any machine: above a disk, home runs each expert when it has been read."""
    if not term.has_disk or work.experts == 0:
        return home_end_s(term, view, work)
    act_s = work.row_shards * view.out_s_per_row + view.link_latency_s
    return act_s + home_span_s(term, view, size, plan, act_s, work.busiest_s) + act_s


@kernel
def home_span_s(term, view, size, plan, act_s, busiest_s):
    """Return how long home works from ``act_s`` on; above a disk it waits for the experts that have yet to be read."""
    if not term.has_disk:
        return busiest_s
    free_s = act_s + view.home_start_s
    for i in range(size):
        if plan[i] == HOME:
            free_s = max(free_s, view.active[i].ready_s) + view.active[i].ndp_s
    return free_s - act_s


@kernel
def cpu_end_s(term, view, work):
    """Return when the CPU's results are back, 0 if it runs nothing."""
    if work.experts == 0:
        return 0.0
    out_s = min(float(view.rows), work.rows) * view.out_s_per_row
    work_s = work.busy_s + term.cpu_layer_s
    return exchange_s(out_s, work_s, view.link_latency_s, term.cpu_chunks, term.cpu_command_s)


@kernel
def gpu_end_s(term, view, size, plan):
    """Return when the GPU has run its part, fetching the missing experts."""
    free_s, arrived_s = 0.0, 0.0
    for j in range(size):
        i = view.active[j].turn
        if plan[i] == ON_GPU:
            expert = view.active[i]
            free_s, arrived_s = next_end_s(term, view, expert, free_s, max(arrived_s, expert.ready_s))
    return free_s


@kernel
def ends_of(term, view, size, plan):
    """Return when each part ends under a plan; leaves the units' work in ``view.groups``."""
    cpu, home_rows = share_out_work(view, size, plan)
    home = home_work(term, view, home_rows)
    home_s = home_done_s(term, view, size, plan, home)
    return Ends(gpu_end_s(term, view, size, plan), home_s, cpu_end_s(term, view, cpu))


@kernel
def moe_s(term, view, size, plan):
    """Return the seconds of a layer's experts under a plan."""
    ends = ends_of(term, view, size, plan)
    return max(ends.gpu_s, ends.home_s, ends.cpu_s, term.remote_s)
