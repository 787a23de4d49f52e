"""An expert that the GPU and home share, each a part of its columns (dispatch `split`; timing model, section 6)."""

from moetrace.engine.prefetch import DONE_BYTES, leave
from moetrace.engine.state import FIRST_GROUP, GPU, ON_GPU, SHARED
from moetrace.jit.compile import kernel


@kernel
def shared_of(splits, size, plan):
    """Return which active expert is shared by the GPU and home, -1 = none."""
    if splits:
        for i in range(size):
            if plan[i] == SHARED:
                return i
    return -1


@kernel
def missing_share(expert):
    """Return which share of a shared expert has yet to be fetched."""
    return max(expert.share - expert.here, 0.0)


@kernel
def share_fetch_s(view, expert):
    """Return how long the missing part of a share takes to arrive; 0 if none is missing."""
    missing = missing_share(expert)
    return missing * (expert.fetch_s - view.link_latency_s) + view.link_latency_s if missing > 0.0 else 0.0


@kernel
def share_gpu_s(view, expert):
    """Return how long the GPU runs its share of an expert."""
    return expert.share * (expert.gpu_s - view.gpu_launch_s) + view.gpu_launch_s


@kernel
def share_home_s(view, expert):
    """Return how long home runs the rest of a shared expert; 0 if it has no part of it."""
    if expert.share >= 1.0:
        return 0.0
    return (1.0 - expert.share) * (expert.ndp_s - view.home_launch_s) + view.home_launch_s


@kernel
def give_shared_rest(view, expert):
    """Add what home runs of a shared expert to the work of the units that hold it."""
    if expert.share < 1.0:
        group = view.groups[expert.group]
        group.busy_s += share_home_s(view, expert)
        group.rows += expert.rows
        group.weight_bytes += (1.0 - expert.share) * expert.weight_bytes
        group.count += 1


@kernel
def see_parts(base, size, state):
    """Note which share of each active expert the GPU holds; keys of the layer begin at ``base``."""
    for i in range(size):
        active = state.scratch.active[i]
        moved_bytes = state.queue.moved_bytes[base + active.expert]
        active.here = 1.0 if active.resident else min(moved_bytes / active.weight_bytes, 1.0)


@kernel
def run_whole(key, shared, state):
    """If the share is all of an expert and some of it is fetched, treat it as any other; return whether it is so."""
    active, queue = state.scratch.active[shared], state.queue
    if active.share < 1.0 or missing_share(active) == 0.0:
        return False
    state.scratch.plan[shared] = ON_GPU
    if queue.place[key] >= 0:
        leave(queue, key)  # not wasted: what had arrived of it runs
    return True


@kernel
def share_out(layer, shared, state, log):
    """Correct the books for an expert that the GPU runs in part; the fetched part of a queued one counts as moved."""
    active, queue = state.scratch.active[shared], state.queue
    key = layer * state.cells.shape[1] + active.expert
    rest = 1.0 - active.share
    log.unit[GPU].rows -= rest * active.rows
    log.unit[GPU].bytes -= rest * active.weight_bytes
    if rest > 0.0:
        log.unit[FIRST_GROUP + active.group].rows -= active.share * active.rows
        log.layer[layer].ndp_experts += 1
    if not active.resident and queue.place[key] >= 0:
        moved_bytes = queue.moved_bytes[key] + missing_share(active) * active.weight_bytes
        # Sharing never completes a transfer, and never takes bytes back: a flow that ended is counted as complete.
        queue.moved_bytes[key] = max(queue.moved_bytes[key], min(moved_bytes, active.weight_bytes - 2 * DONE_BYTES))
