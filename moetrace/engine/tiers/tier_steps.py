"""`balance` and `hot` on machines with more tiers, one expert after another: each changes one group, and sums.

Not for a disk below host memory, where what one expert waits for depends on all others.
"""

from moetrace.engine.layer import less
from moetrace.engine.state import HOME, ON_GPU
from moetrace.engine.tiers.tier_times import clear_work, give_home, home_end_s, home_work, next_end_s, read_outside
from moetrace.jit.compile import kernel


@kernel
def give_all_home(term, view, size):
    """Leave every expert at home; return the layer's seconds, and the rows that home then runs."""
    clear_work(view)
    home_rows = 0.0
    for i in range(size):
        give_home(view, view.active[i])
        home_rows += view.active[i].rows
    return max(home_end_s(term, view, home_work(term, view, home_rows)), term.remote_s), home_rows


@kernel
def without_s(term, view, expert, home_rows):
    """Take an expert from home, and let it be fetched if it is missing; return when home ends, and its rows."""
    group = view.groups[expert.group]
    group.count -= 1
    group.busy_s = group.busy_s - expert.ndp_s if group.count > 0 else 0.0
    group.rows -= expert.rows
    if not expert.resident:
        read_outside(view, expert)
    return home_end_s(term, view, home_work(term, view, home_rows - expert.rows)), home_rows - expert.rows


@kernel
def work_of(group):
    """Return a group's work, to restore it to the last bit."""
    return group.busy_s, group.rows, group.outside_s, group.count


@kernel
def restore(group, work):
    """Give a group the work that it had."""
    group.busy_s, group.rows, group.outside_s, group.count = work


@kernel
def balance_in_steps(term, view, size, plan):
    """Move experts to the GPU one by one, in turn, while the layer gets faster; return the layer's seconds."""
    best_s, home_rows = give_all_home(term, view, size)
    free_s, arrived_s = 0.0, 0.0
    for j in range(size):
        i = view.active[j].turn
        expert = view.active[i]
        ends_s, arrives_s = next_end_s(term, view, expert, free_s, arrived_s)
        if less(best_s, ends_s):
            continue
        group = view.groups[expert.group]
        work = work_of(group)
        home_s, left_rows = without_s(term, view, expert, home_rows)
        moved_s = max(ends_s, home_s, term.remote_s)
        if less(moved_s, best_s) or (expert.resident and not less(best_s, moved_s)):
            plan[i] = ON_GPU
            best_s, free_s, arrived_s, home_rows = moved_s, ends_s, arrives_s, left_rows
        else:
            restore(group, work)
    return best_s


@kernel
def hottest_in_steps(term, view, size, plan):
    """Fetch the H most demanded, with the H of least time, the smallest on a tie; none is resident."""
    best_s, home_rows = give_all_home(term, view, size)
    best, free_s, arrived_s = 0, 0.0, 0.0
    for i in range(size):
        expert = view.active[i]
        free_s, arrived_s = next_end_s(term, view, expert, free_s, arrived_s)
        home_s, home_rows = without_s(term, view, expert, home_rows)
        moved_s = max(free_s, home_s, term.remote_s)
        if less(moved_s, best_s):
            best_s, best = moved_s, i + 1
        if not less(free_s, best_s):
            break  # the GPU by itself takes as long already, and only gets slower
    for i in range(size):
        plan[i] = ON_GPU if i < best else HOME
