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
    """Run the H experts of most gate mass on the GPU, with the H of least time; smaller H and demand order on ties."""
    term = term_of(view)
    best_s, best = moe_s(term, view, size, plan), 0
    for h in range(size):
        plan[_weightiest_at_home(view, size, plan)] = ON_GPU
        moved_s = moe_s(term, view, size, plan)
        if less(moved_s, best_s):
            best_s, best = moved_s, h + 1
    for i in range(size):
        plan[i] = HOME
    for _ in range(best):
        plan[_weightiest_at_home(view, size, plan)] = ON_GPU


@kernel
def _weightiest_at_home(view, size, plan):
    """Return which expert at home has most gate mass, the first in demand order on a tie; one is there."""
    found = -1
    for i in range(size):
        if plan[i] == HOME and (found < 0 or view.active[i].gate_mass > view.active[found].gate_mass):
            found = i
    return found
