"""Splits of a layer's work on machines with more tiers: each decision compares the very seconds of the time line."""

import numpy as np

from moetrace.engine.layer import SAME, less
from moetrace.engine.state import CPU, HOME, ON_GPU
from moetrace.engine.tiers.tier_steps import balance_in_steps, hottest_in_steps
from moetrace.engine.tiers.tier_times import fetched_end_s, moe_s, term_of
from moetrace.jit.compile import kernel


@kernel
def balance(view, size, plan):
    """Move experts to the GPU one by one, in turn, while the layer gets faster; return the layer's seconds."""
    term = term_of(view)
    if not term.has_disk:
        return balance_in_steps(term, view, size, plan)
    best_s = moe_s(term, view, size, plan)
    for j in range(size):
        i = view.active[j].turn
        plan[i] = ON_GPU
        moved_s = moe_s(term, view, size, plan)
        if less(moved_s, best_s) or (view.active[i].resident and not less(best_s, moved_s)):
            best_s = moved_s
        else:
            plan[i] = HOME
    return best_s


@kernel
def hottest(view, size, plan):
    """Fetch the H most demanded, with the H of least time, the smallest on a tie."""
    term = term_of(view)
    if not term.has_disk:
        hottest_in_steps(term, view, size, plan)
        return
    best_s, best = moe_s(term, view, size, plan), 0
    for i in range(size):
        plan[i] = ON_GPU
        moved_s = moe_s(term, view, size, plan)
        if less(moved_s, best_s):
            best_s, best = moved_s, i + 1
    for i in range(size):
        plan[i] = ON_GPU if i < best else HOME


@kernel
def hottest_by_ratio(view, size, plan):
    """Fetch the H most demanded, by the ratio of the link's rate to that at which home reads, in closed form."""
    term = term_of(view)
    share = term.link_bytes_s / (term.link_bytes_s + term.home_bytes_s)
    most = int(np.ceil(SAME * size * share))
    for i in range(size):
        plan[i] = ON_GPU if i < most else HOME


@kernel
def own_gpu_s(term, expert):
    """Return what the GPU takes for an expert by itself, with its fetch."""
    if expert.resident:
        return expert.gpu_s
    return fetched_end_s(term, 0.0, 0.0, expert.fetch_s, expert.gpu_s)


@kernel
def cheapest_of(term, expert):
    """Return the device on which an expert by itself takes least, and these seconds; ties: GPU, CPU, home."""
    device, seconds = ON_GPU, own_gpu_s(term, expert)
    if less(expert.cpu_s, seconds):
        device, seconds = CPU, expert.cpu_s
    if less(expert.ndp_s, seconds):
        device, seconds = HOME, expert.ndp_s
    return device, seconds


@kernel
def cheapest(view, size, plan):
    """Give each expert to the device on which it takes least."""
    term = term_of(view)
    for i in range(size):
        plan[i] = cheapest_of(term, view.active[i])[0]


@kernel
def sooner_on_gpu(view, size, plan):
    """Run residents on the GPU, and fetch what takes less there, fetch included, than at home."""
    term = term_of(view)
    for i in range(size):
        expert = view.active[i]
        plan[i] = ON_GPU if expert.resident or less(own_gpu_s(term, expert), expert.ndp_s) else HOME


@kernel
def weightiest(view, size, plan):
    """Move experts to the GPU one by one, by gate mass, unless the layer gets slower; demand order on ties."""
    term = term_of(view)
    best_s, at = moe_s(term, view, size, plan), -1
    for _ in range(size):
        at = _next_lighter(view, size, at)
        plan[at] = ON_GPU
        moved_s = moe_s(term, view, size, plan)
        if less(best_s, moved_s):
            plan[at] = HOME
        else:
            best_s = moved_s


@kernel
def _next_lighter(view, size, last):
    """Return which expert comes after the last one by gate mass, in demand order on ties; last = -1: the first."""
    found = -1
    for i in range(size):
        mass = view.active[i].gate_mass
        if last >= 0:
            last_mass = view.active[last].gate_mass
            if mass > last_mass or (mass == last_mass and i <= last):
                continue
        if found < 0 or mass > view.active[found].gate_mass:
            found = i
    return found
