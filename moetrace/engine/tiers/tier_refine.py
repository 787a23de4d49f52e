"""`bottleneck` (TriMoE): what ends last gives up its costliest expert, as long as the layer gets faster.

A move changes one unit or group, and sums that are kept; the GPU's end depends on the few experts that it fetches, in
order. So a move costs what it changes, not a time line.
"""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.layer import less
from moetrace.engine.state import CPU, HOME, ON_GPU
from moetrace.engine.tiers.tier_moves import cheapest_of, own_gpu_s
from moetrace.engine.tiers.tier_records import NO_GROUP
from moetrace.engine.tiers.tier_steps import restore, work_of
from moetrace.engine.tiers.tier_times import (
    CpuWork,
    Ends,
    clear_work,
    cpu_end_s,
    ends_of,
    home_end_s,
    home_work,
    next_fetched_s,
    term_of,
)
from moetrace.jit.compile import kernel

# Who holds an expert: a group of units by its number, or one of these.
_GPU_HOLDS, _CPU_HOLDS = -2, -3  # NO_GROUP is another


class Sums(NamedTuple):
    """The work of each part; that of the units is in ``view.groups``."""

    resident_s: float  # on the GPU
    residents: int
    fetched: int
    cpu: CpuWork
    home_rows: float


class Held(NamedTuple):
    """Who has each active expert, and what the GPU fetches."""

    own_s: Any  # float64 [n]: what its part takes for it
    holder: Any  # int64 [n]
    fetched: Any  # int64 [n]: the experts that the GPU fetches, in demand order; those of ``Sums.fetched`` are valid
    free_s: Any  # float64 [n + 1]: when the GPU is free for each of them; then its end
    arrived_s: Any  # float64 [n + 1]: when the link is


@kernel
def _shifted(view, sums, expert, device, sign):
    """Return the sums with an expert more (1) or fewer (-1) on a device; its units' work follows."""
    cpu, group = sums.cpu, view.groups[expert.group]
    if device == HOME:
        group.count += sign
        group.busy_s = group.busy_s + sign * expert.ndp_s if group.count > 0 else 0.0
        group.rows += sign * expert.rows
        return Sums(sums.resident_s, sums.residents, sums.fetched, cpu, sums.home_rows + sign * expert.rows)
    if device == ON_GPU and expert.resident:
        residents = sums.residents + sign
        resident_s = sums.resident_s + sign * expert.gpu_s if residents > 0 else 0.0
        return Sums(resident_s, residents, sums.fetched, cpu, sums.home_rows)
    group.outside_s += sign * expert.outside_s
    if device == ON_GPU:
        return Sums(sums.resident_s, sums.residents, sums.fetched + sign, cpu, sums.home_rows)
    experts = cpu.experts + sign
    busy_s = cpu.busy_s + sign * expert.cpu_s if experts > 0 else 0.0
    cpu = CpuWork(busy_s, cpu.rows + sign * expert.rows, experts)
    return Sums(sums.resident_s, sums.residents, sums.fetched, cpu, sums.home_rows)


@kernel
def _free_s(view, sums):
    """Return when the GPU is free for what it fetches."""
    return sums.resident_s + view.gpu_start_s if sums.residents > 0 else 0.0


@kernel
def _runs_from(term, view, held, at, stop, when):
    """Return when the GPU has run those that it fetches from place ``at`` on; ``when`` GPU and link are free."""
    free_s, arrived_s = when
    for place in range(at, stop):
        free_s, arrived_s = next_fetched_s(term, view.active[held.fetched[place]], free_s, arrived_s)
    return free_s


@kernel
def _place_of(held, sums, i):
    """Return where expert ``i`` stands, or would stand, among those that the GPU fetches."""
    place = sums.fetched
    while place > 0 and held.fetched[place - 1] >= i:
        place -= 1
    return place


@kernel
def _gpu_end_s(term, view, held, sums, i, adds):
    """Return when the GPU would end with expert ``i`` in addition, or without it; ``sums`` are those of now."""
    expert = view.active[i]
    if expert.resident:
        residents = sums.residents + (1 if adds else -1)
        resident_s = sums.resident_s + (expert.gpu_s if adds else -expert.gpu_s)
        free_s = resident_s + view.gpu_start_s if residents > 0 else 0.0
        return _runs_from(term, view, held, 0, sums.fetched, (free_s, 0.0))
    place = _place_of(held, sums, i)
    free_s, from_s = held.free_s[place], held.arrived_s[place]
    if not adds:
        return _runs_from(term, view, held, place + 1, sums.fetched, (free_s, from_s))
    return _runs_from(term, view, held, place, sums.fetched, next_fetched_s(term, expert, free_s, from_s))


@kernel
def _note_gpu(term, view, held, sums, at):
    """Note when GPU and link are free for what the GPU fetches from place ``at`` on; return its end."""
    if at == 0:
        held.free_s[0], held.arrived_s[0] = _free_s(view, sums), 0.0
    for place in range(at, sums.fetched):
        expert = view.active[held.fetched[place]]
        ends = next_fetched_s(term, expert, held.free_s[place], held.arrived_s[place])
        held.free_s[place + 1], held.arrived_s[place + 1] = ends
    return held.free_s[sums.fetched]


@kernel
def _begin(term, view, size, plan, held):
    """Give each expert to its cheapest device; return the sums."""
    clear_work(view)
    sums = Sums(0.0, 0, 0, CpuWork(0.0, 0.0, 0), 0.0)
    for i in range(size):
        expert = view.active[i]
        device, held.own_s[i] = cheapest_of(term, expert)
        plan[i] = device
        held.holder[i] = _holder(expert, device)
        if device == ON_GPU and not expert.resident:
            held.fetched[sums.fetched] = i
        sums = _shifted(view, sums, expert, device, 1)
    return sums


@kernel
def _holder(expert, device):
    """Return who holds an expert on a device."""
    return expert.group if device == HOME else _GPU_HOLDS if device == ON_GPU else _CPU_HOLDS


@kernel
def _last(term, view, ends):
    """Return who ends last; ties: GPU, CPU, units by number."""
    last, end_s = _GPU_HOLDS, ends.gpu_s
    if less(end_s, ends.cpu_s):
        last, end_s = _CPU_HOLDS, ends.cpu_s
    if not less(end_s, ends.home_s):
        return last
    mixed = term.all_group != NO_GROUP
    busiest_s, every_s, every = 0.0, 0.0, 0
    if mixed:
        group = view.groups[term.all_group]
        every_s, every = group.busy_s + group.outside_s, group.count
    for g in range(term.all_group if mixed else view.groups.size):
        group = view.groups[g]
        busy_s = group.busy_s + group.outside_s + every_s + view.home_start_s
        if group.count + every > 0 and less(busiest_s, busy_s):
            busiest_s, last = busy_s, np.int64(g)
    return last


@kernel
def _costliest(term, held, size, last):
    """Return the costliest expert of the part that ends last, the most demanded on a tie; -1 if it runs no expert."""
    costliest, most_s = -1, 0.0
    shared = term.all_group if last >= 0 else last  # what all units run is every unit's
    for i in range(size):
        if (held.holder[i] == last or held.holder[i] == shared) and (costliest < 0 or less(most_s, held.own_s[i])):
            costliest, most_s = i, held.own_s[i]
    return costliest


@kernel
def _best_move(term, view, held, sums, ends, i, source):
    """Return the device on which expert ``i`` makes the layer fastest, and all ends then; the source if none does."""
    expert = view.active[i]
    group = view.groups[expert.group]
    before = work_of(group)
    without = _shifted(view, sums, expert, source, -1)
    left = work_of(group)
    best, best_ends, best_s = source, ends, max(ends.gpu_s, ends.home_s, ends.cpu_s, term.remote_s)
    gpu_s = _gpu_end_s(term, view, held, sums, i, False) if source == ON_GPU else ends.gpu_s
    off_cpu_s = cpu_end_s(term, view, without.cpu) if source == CPU else ends.cpu_s
    if less(max(gpu_s, off_cpu_s), best_s):
        for turn in range(3):
            device = (ON_GPU + turn) % 3
            if device == source or (device == CPU and not term.has_cpu):
                continue
            there = _shifted(view, without, expert, device, 1)
            cpu_s = cpu_end_s(term, view, there.cpu) if device == CPU else off_cpu_s
            # The GPU cannot end before the fetch does, and that is too late.
            late_s = held.arrived_s[sums.fetched] + expert.fetch_s if device == ON_GPU else cpu_s
            if less(late_s, best_s):
                home_s = ends.home_s
                if device == HOME or source == HOME or term.contends:
                    home_s = home_end_s(term, view, home_work(term, view, there.home_rows))
                end_s = _gpu_end_s(term, view, held, sums, i, True) if device == ON_GPU else gpu_s
                moe_s = max(end_s, home_s, cpu_s, term.remote_s)
                if less(moe_s, best_s):
                    best, best_ends, best_s = device, Ends(end_s, home_s, cpu_s), moe_s
            restore(group, left)
    restore(group, before)
    return best, best_ends


@kernel
def _move(term, view, held, sums, i, source, device):
    """Move expert ``i`` to a device; return the sums."""
    expert = view.active[i]
    place, last = _place_of(held, sums, i), sums.fetched
    without = _shifted(view, sums, expert, source, -1)
    after = _shifted(view, without, expert, device, 1)
    _hold(term, view, held, i, device)
    if source != ON_GPU and device != ON_GPU:
        return after
    if expert.resident:
        _note_gpu(term, view, held, after, 0)
        return after
    if device == ON_GPU:
        for at in range(last, place, -1):
            held.fetched[at] = held.fetched[at - 1]
        held.fetched[place] = i
    else:
        for at in range(place, last - 1):
            held.fetched[at] = held.fetched[at + 1]
    _note_gpu(term, view, held, after, place)
    return after


@kernel
def _refine_by_whole(term, view, size, plan, held):
    """Do as ``refine``, with a whole time line for each move; `_begin` has been."""
    ends = ends_of(term, view, size, plan)
    while True:
        i = _costliest(term, held, size, _last(term, view, ends))
        if i < 0:
            return
        source = np.int64(plan[i])
        best, best_s = source, max(ends.gpu_s, ends.home_s, ends.cpu_s, term.remote_s)
        for turn in range(3):
            plan[i] = (ON_GPU + turn) % 3
            if plan[i] != source and (plan[i] != CPU or term.has_cpu):
                moved = ends_of(term, view, size, plan)
                moved_s = max(moved.gpu_s, moved.home_s, moved.cpu_s, term.remote_s)
                if less(moved_s, best_s):
                    best, best_s = np.int64(plan[i]), moved_s
        plan[i] = best
        if best == source:
            return
        ends = ends_of(term, view, size, plan)  # and the units' work
        _hold(term, view, held, i, best)


@kernel
def _hold(term, view, held, i, device):
    """Note who has an expert, and what its part takes for it."""
    expert = view.active[i]
    held.holder[i] = _holder(expert, device)
    if device == HOME:
        held.own_s[i] = expert.ndp_s
    else:
        held.own_s[i] = own_gpu_s(term, expert) if device == ON_GPU else expert.cpu_s


@kernel(inline=False)
def refine(view, size, plan):
    """Begin with the cheapest device of each expert, then move one by one."""
    term = term_of(view)
    held = Held(
        np.empty(size),
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.empty(size + 1),
        np.empty(size + 1),
    )
    sums = _begin(term, view, size, plan, held)
    if term.has_disk:
        _refine_by_whole(term, view, size, plan, held)
        return
    gpu_s = _note_gpu(term, view, held, sums, 0)
    home_s = home_end_s(term, view, home_work(term, view, sums.home_rows))
    ends = Ends(gpu_s, home_s, cpu_end_s(term, view, sums.cpu))
    while True:
        i = _costliest(term, held, size, _last(term, view, ends))
        if i < 0:
            return
        source = np.int64(plan[i])
        device, ends = _best_move(term, view, held, sums, ends, i, source)
        if device == source:
            return
        sums = _move(term, view, held, sums, i, source, device)
        plan[i] = device
