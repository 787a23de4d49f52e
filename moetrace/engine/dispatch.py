"""Splits of a layer's work between the GPU and where experts live (timing model, section 6), which several dispatches share.

A dispatch hook (`dispatches/`) gets ``plan`` uint8 [n], all zero, and sets ``plan[i] = 1`` to run the i-th active
expert (in demand order) on the GPU; what stays 0 runs at home: on the units that hold it, or on the CPU.
"""

import numpy as np

from moetrace.engine.layer import clear_groups, give_rest, give_to_group, gpu_end_s, less, ndp_end_s, take_from_group
from moetrace.jit.compile import kernel

OPTIMAL_UP_TO = 20  # active experts


@kernel
def move_while_faster(view, size, plan):
    """Move experts to the GPU one by one while the layer gets faster; return the layer's seconds."""
    give_rest(view, size, plan)
    moe_s = ndp_end_s(view)
    free_s, arrival_s = 0.0, 0.0
    for j in range(size):
        i = view.active[j].turn
        expert = view.active[i]
        arrives_s = arrival_s + expert.fetch_s
        ends_s = gpu_end_s(view, free_s, arrives_s, expert)
        if less(moe_s, ends_s):
            continue
        take_from_group(view.groups, expert)
        moved_s = max(ends_s, ndp_end_s(view))
        if less(moved_s, moe_s) or (expert.resident and not less(moe_s, moved_s)):
            plan[i] = 1
            moe_s, free_s, arrival_s = moved_s, ends_s, arrives_s
        else:
            give_to_group(view.groups, expert)
    return moe_s


@kernel(inline=False)
def search_splits(view, size, plan, best_s):
    """Improve ``plan``, which takes ``best_s``, to the best of all splits by branch and bound.

    Depth j decides the j-th expert in the order in which the GPU would run them: first for the units, then for the
    GPU. What is decided bounds the time from below, as more work never ends earlier. A plan is a bit mask with the
    most demanded expert in the highest bit, so of two plans of one size the larger mask is lexicographically first.
    """
    choice = np.full(size + 1, -1)
    free_s, arrival_s = np.zeros(size + 1), np.zeros(size + 1)
    saved = np.empty((size, 2))
    best_count, best_mask, count, mask = 0, 0, 0, 0
    for i in range(size):
        best_count += plan[i]
        best_mask += plan[i] << (size - 1 - i)
    clear_groups(view.groups)
    j = 0
    while j >= 0:
        if j == size:
            moe_s = max(free_s[j], ndp_end_s(view))
            if less(moe_s, best_s) or count < best_count or (count == best_count and mask > best_mask):
                best_s, best_count, best_mask = moe_s, count, mask
            j -= 1
            continue
        i = view.active[j].turn
        expert = view.active[i]
        group = view.groups[expert.group]
        choice[j] += 1
        if choice[j] == 0:
            saved[j, 0], saved[j, 1] = group.busy_s, group.rows
            give_to_group(view.groups, expert)
            free_s[j + 1], arrival_s[j + 1] = free_s[j], arrival_s[j]
        elif choice[j] == 1:
            group.busy_s, group.rows = saved[j, 0], saved[j, 1]
            group.count -= 1
            count += 1
            mask += 1 << (size - 1 - i)
            arrival_s[j + 1] = arrival_s[j] + expert.fetch_s
            free_s[j + 1] = gpu_end_s(view, free_s[j], arrival_s[j + 1], expert)
        else:
            count -= 1
            mask -= 1 << (size - 1 - i)
            choice[j] = -1
            j -= 1
            continue
        bound_s = max(free_s[j + 1], ndp_end_s(view))
        if less(bound_s, best_s) or (not less(best_s, bound_s) and count <= best_count):
            j += 1
    for i in range(size):
        plan[i] = (best_mask >> (size - 1 - i)) & 1
