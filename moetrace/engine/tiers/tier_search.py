"""`optimal` on machines with more tiers: the best of all assignments to home, GPU and a CPU beside units."""

import numpy as np

from moetrace.engine.dispatch import OPTIMAL_UP_TO
from moetrace.engine.layer import less
from moetrace.engine.state import CPU, HOME, ON_GPU
from moetrace.engine.tiers.tier_moves import balance
from moetrace.engine.tiers.tier_times import (
    CpuWork,
    clear_work,
    cpu_end_s,
    give_home,
    home_end_s,
    home_work,
    moe_s,
    next_end_s,
    read_outside,
    term_of,
)
from moetrace.jit.compile import kernel

# With three devices: 3^12 assignments are fewer than the 2^20 of 20 experts and two devices, 3^13 are more.
OPTIMAL_OF_THREE_UP_TO = 12
_UNDECIDED = 255  # in the place of a device
# State before a decision, to undo it: three sums of the group, and the sums over all groups.
_BUSY_S, _ROWS, _OUTSIDE_S, _FREE_S, _ARRIVED_S, _CPU_S, _CPU_ROWS, _HOME_ROWS, _KEPT = range(9)


@kernel
def is_searched(view, size):
    """Return whether ``optimal_of`` tries all assignments of ``size`` active experts."""
    return size <= (OPTIMAL_OF_THREE_UP_TO if term_of(view).has_cpu else OPTIMAL_UP_TO)


@kernel
def optimal_of(view, size, plan):
    """Write the best of all assignments into ``plan``, that of `balance` if there are too many; return its seconds."""
    for i in range(size):
        plan[i] = HOME
    best_s = balance(view, size, plan)
    if is_searched(view, size):
        best_s = _search(view, size, plan, best_s)
    return best_s


@kernel
def _decide(term, view, j, device, kept):
    """Give the expert of depth ``j`` to a device; the earlier state is in ``kept[j]``."""
    expert = view.active[view.active[j].turn]
    group, now, after = view.groups[expert.group], kept[j], kept[j + 1]
    now[_BUSY_S], now[_ROWS], now[_OUTSIDE_S] = group.busy_s, group.rows, group.outside_s
    for each in range(_FREE_S, _KEPT):
        after[each] = now[each]
    if device == HOME:
        give_home(view, expert)
        after[_HOME_ROWS] += expert.rows
    elif device == CPU:
        read_outside(view, expert)
        after[_CPU_S] += expert.cpu_s
        after[_CPU_ROWS] += expert.rows
    else:
        if not expert.resident:
            read_outside(view, expert)
        after[_FREE_S], after[_ARRIVED_S] = next_end_s(term, view, expert, now[_FREE_S], now[_ARRIVED_S])


@kernel
def _undo(view, j, device, kept):
    """Take the expert of depth ``j`` from a device, to the last bit."""
    group = view.groups[view.active[view.active[j].turn].group]
    group.busy_s, group.rows, group.outside_s = kept[j, _BUSY_S], kept[j, _ROWS], kept[j, _OUTSIDE_S]
    group.count -= device == HOME


@kernel
def _moe_s(term, view, decided, on_cpu, plan):
    """Return the seconds of the decided experts: further work never ends a layer earlier.

    Above a disk home runs in demand order, which is not that of the decisions: then the whole time line is made.
    """
    if term.has_disk:
        return moe_s(term, view, plan.size, plan)
    home_s = home_end_s(term, view, home_work(term, view, decided[_HOME_ROWS]))
    cpu_s = cpu_end_s(term, view, CpuWork(decided[_CPU_S], decided[_CPU_ROWS], on_cpu))
    return max(decided[_FREE_S], home_s, cpu_s, term.remote_s)


@kernel(inline=False)
def _search(view, size, plan, best_s):
    """Improve ``plan``, which takes ``best_s``, by branch and bound; return the seconds of the best.

    Depth j decides the j-th expert in the order in which the GPU would run them: home, GPU, CPU. Among plans of equal
    time, the one with the fewest experts away from home is taken, then the one whose experts away from home are first
    in demand order, then the one that has the first of these on the GPU: masks have the most demanded in the highest
    bit.
    """
    term = term_of(view)
    devices = 3 if term.has_cpu else 2
    kept, choice = np.zeros((size + 1, _KEPT)), np.full(size + 1, -1)
    decided = np.full(size, np.uint8(_UNDECIDED))
    best_away, best_gpu, away, gpu, count, on_cpu, best_count = 0, 0, 0, 0, 0, 0, 0
    for i in range(size):
        best_gpu += np.int64(plan[i] == ON_GPU) << (size - 1 - i)
        best_count += plan[i] != HOME
    best_away = best_gpu  # `balance` knows no CPU
    clear_work(view)
    j = 0
    while j >= 0:
        if j == size:
            whole_s = _moe_s(term, view, kept[j], on_cpu, decided)
            ahead = away > best_away or (away == best_away and gpu > best_gpu)
            if less(whole_s, best_s) or count < best_count or (count == best_count and ahead):
                best_s, best_count, best_away, best_gpu = whole_s, count, away, gpu
            j -= 1
            continue
        bit = 1 << (size - 1 - view.active[j].turn)
        if choice[j] >= 0:
            _undo(view, j, choice[j], kept)
            count -= choice[j] != HOME
            on_cpu -= choice[j] == CPU
            away &= ~bit
            gpu &= ~bit
        choice[j] += 1
        if choice[j] == devices:
            choice[j] = -1
            decided[view.active[j].turn] = _UNDECIDED
            j -= 1
            continue
        decided[view.active[j].turn] = choice[j]
        _decide(term, view, j, choice[j], kept)
        if choice[j] != HOME:
            count += 1
            away |= bit
            on_cpu += choice[j] == CPU
            gpu |= bit if choice[j] == ON_GPU else 0
        bound_s = _moe_s(term, view, kept[j + 1], on_cpu, decided)
        if less(bound_s, best_s) or (not less(best_s, bound_s) and count <= best_count):
            j += 1
    for i in range(size):
        bit = 1 << (size - 1 - i)
        plan[i] = HOME if not best_away & bit else ON_GPU if best_gpu & bit else CPU
    return best_s
