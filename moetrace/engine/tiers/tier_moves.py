"""Splits of a layer's work on machines with more tiers: each decision compares the very seconds of the time line."""

from moetrace.engine.layer import less
from moetrace.engine.state import HOME, ON_GPU
from moetrace.engine.tiers.tier_times import moe_s, term_of
from moetrace.jit.compile import kernel


@kernel
def balance(view, size, plan):
    """Move experts to the GPU one by one, in turn, while the layer gets faster; return the layer's seconds."""
    term = term_of(view)
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
    best_s, best = moe_s(term, view, size, plan), 0
    for i in range(size):
        plan[i] = ON_GPU
        moved_s = moe_s(term, view, size, plan)
        if less(moved_s, best_s):
            best_s, best = moved_s, i + 1
    for i in range(size):
        plan[i] = ON_GPU if i < best else HOME


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
