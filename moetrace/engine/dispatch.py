"""Splits of a layer's work between the GPU and home (timing model, section 6), which several dispatches share.

A dispatch hook (`dispatches/`) gets ``plan`` uint8 [n], all zero, and sets ``plan[i] = 1`` to run the i-th active
expert (in demand order) on the GPU; what stays 0 runs at home: on the units that hold it, or on the CPU.
"""

import numpy as np

from moetrace.engine.layer import (
    clear_groups,
    give_rest,
    give_to_group,
    gpu_end_s,
    home_end_s,
    less,
    ndp_end_s,
    take_from_group,
)
from moetrace.engine.sharing import share_fetch_s, share_gpu_s
from moetrace.engine.state import ON_GPU, SHARED
from moetrace.jit.compile import kernel

OPTIMAL_UP_TO = 20  # active experts


@kernel
def move_while_faster(view, size, plan):
    """Move experts to the GPU one by one while the layer gets faster; return the layer's seconds."""
    give_rest(view, size, plan)
    moe_s = ndp_end_s(view)
    free_s, arrival_s = 0.0, 0.0
    if view.groups.size == 1:
        return _move_while_faster(view, size, plan, view.groups[0], moe_s)
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


@kernel
def _move_while_faster(view, size, plan, group, moe_s):
    """Do the same where all units share every expert, to the last bit: their sums stay in registers."""
    free_s, arrival_s = 0.0, 0.0
    busy_s, rows, count = group.busy_s, group.rows, group.count
    for j in range(size):
        i = view.active[j].turn
        expert = view.active[i]
        arrives_s = arrival_s + expert.fetch_s
        ends_s = gpu_end_s(view, free_s, arrives_s, expert)
        if less(moe_s, ends_s):
            continue
        left_s, left_rows = busy_s - expert.ndp_s if count > 1 else 0.0, rows - expert.rows
        moved_s = max(ends_s, home_end_s(view, min(float(view.rows), left_rows), left_s, count - 1))
        if less(moved_s, moe_s) or (expert.resident and not less(moe_s, moved_s)):
            plan[i] = 1
            moe_s, free_s, arrival_s = moved_s, ends_s, arrives_s
            busy_s, rows, count = left_s, left_rows, count - 1
        else:
            busy_s, rows = left_s + expert.ndp_s, left_rows + expert.rows
    group.busy_s, group.rows, group.count = busy_s, rows, count
    return moe_s


@kernel
def _gpu_without(view, size, plan, but):
    """Return when the GPU has run all its experts except ``but``, and when the last fetch of those arrives."""
    free_s, arrival_s = 0.0, 0.0
    for j in range(size):
        i = view.active[j].turn
        if plan[i] == ON_GPU and i != but:
            arrival_s += view.active[i].fetch_s
            free_s = max(free_s, arrival_s) + view.active[i].gpu_s
    return free_s, arrival_s


@kernel(inline=False)
def share_one(view, size, plan, moe_s):
    """Share one expert between the GPU, which runs it last, and all units, if the layer then takes less than ``moe_s``.

    The share in closed form: both end at once. A part of a missing expert is only fetched where no slot is free.
    """
    best_s, best, best_share = moe_s, -1, 0.0
    all_s, all_arrive_s = _gpu_without(view, size, plan, -1)
    units_s = ndp_end_s(view)
    for i in range(size):
        expert = view.active[i]
        gpu_s, home_s = expert.gpu_s - view.gpu_launch_s, expert.ndp_s - view.home_launch_s
        on_gpu = plan[i] == ON_GPU
        free_s, arrive_s, whole_s = all_s, all_arrive_s, units_s
        if on_gpu:
            if not expert.resident or not less(units_s, all_s):
                continue
            free_s, arrive_s = _gpu_without(view, size, plan, i)
            give_to_group(view.groups, expert)
            whole_s = ndp_end_s(view)
            take_from_group(view.groups, expert)
        x = (whole_s - free_s - view.gpu_launch_s) / (gpu_s + home_s)
        if x > expert.here:
            link_s = expert.fetch_s - view.link_latency_s
            slack_s = whole_s - arrive_s - view.link_latency_s - view.gpu_launch_s
            streamed = min(x, (slack_s + expert.here * link_s) / (gpu_s + home_s + link_s))
            x = max(expert.here, streamed) if view.is_full else expert.here
        x = min(x, 1.0)
        if x <= 0.0:
            continue
        expert.share = x
        fetch_s = share_fetch_s(view, expert)
        ends_s = (max(free_s, arrive_s + fetch_s) if fetch_s > 0.0 else free_s) + share_gpu_s(view, expert)
        left_s = whole_s - x * home_s
        if x >= 1.0:
            if not on_gpu:
                take_from_group(view.groups, expert)
            left_s = ndp_end_s(view)
            if not on_gpu:
                give_to_group(view.groups, expert)
        if less(max(ends_s, left_s), best_s):
            best_s, best, best_share = max(ends_s, left_s), i, x
    if best >= 0:
        view.active[best].share = best_share
        plan[best] = ON_GPU if best_share >= 1.0 and view.active[best].resident else SHARED


@kernel(inline=False)
def search_splits(view, size, plan, best_s):
    """Improve ``plan``, which takes ``best_s``, to the best of all splits by branch and bound.

    Depth j decides the j-th expert in the order in which the GPU would run them: first for the units, then for the
    GPU. The decisions so far bound the time from below, as more work never ends earlier. A plan is a bit mask with the
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
