"""A tape beside the replay: what runs where and when, noted down by the replay itself as it goes.

The replay is compiled twice from the same lines: without a tape (``None``, so that Numba drops every line that would
write on one) and, only for the steps of a timeline, with one.
"""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.cost import head_s
from moetrace.engine.machine import FIRST_HOME, GPU_DEVICE
from moetrace.engine.prefetch import HEAD, TAIL, is_complete, remaining_bytes
from moetrace.engine.sharing import missing_share, share_fetch_s, share_gpu_s, share_home_s
from moetrace.engine.state import FIRST_GROUP, GPU, HOME, LINK_IN, LINK_OUT, ON_GPU, records
from moetrace.jit.compile import kernel

# Kinds of slices. A layer is dense and moe together; a wait is that of `prefetch_blocks`. The last seven are those of
# machines with more tiers (`tiers/tier_tape.py`).
KINDS = ("layer", "wait", "dense", "expert", "fetch", "prefetch", "activations", "head", "cold")
KINDS += ("evict", "activations-cpu", "outside", "read", "read-ahead", "move", "remote")
LAYER, WAIT, DENSE, EXPERT, FETCH, PREFETCH, ACTIVATIONS, HEAD_WORK, COLD = range(9)
EVICT, ACTIVATIONS_CPU, OUTSIDE, READ, READ_AHEAD, MOVE, REMOTE = range(9, 16)
NOBODY = -1  # unit of a LAYER, a WAIT, a COLD start, an EVICT and a MOVE

SLICE = np.dtype(
    [(name, np.int64) for name in ("step", "layer", "kind", "unit", "expert", "resident")]
    + [(name, np.float64) for name in ("start_s", "duration_s", "rows", "bytes")],
)
COUNT = np.dtype(
    [(name, np.int64) for name in ("step", "residents", "queued")]
    + [(name, np.float64) for name in ("at_s", "queued_bytes")],
)
COUNTS_A_LAYER, COUNTS_A_STEP = 4, 3


class Tape(NamedTuple):
    """The record of a step. Times are seconds since the step began.

    ``unit`` of a SLICE is a row of the unit log (a group of units is one), ``layer`` and ``expert`` are -1 where it has
    no such number, ``resident`` is 1 or 0 for an EXPERT and -1 for others, ``rows`` and ``bytes`` are the whole
    group's.
    """

    slices: Any  # SLICE [n]
    counts: Any  # COUNT [n]
    ends: np.ndarray  # int64 [2]: how many slices and counts are written
    clock_s: np.ndarray  # float64 [1]: where the layer at hand begins


def new_tape(slices: int, counts: int) -> Tape:
    """Return an empty tape with room for ``slices`` slices and ``counts`` counts."""
    return Tape(records(slices, SLICE), records(counts, COUNT), np.zeros(2, np.int64), np.zeros(1))


@kernel
def last_slice(tape):
    """Return the slice written last; on a full tape, whose ``ends`` then tell, the last one again and again."""
    return tape.slices[min(tape.ends[0], tape.slices.size) - 1]


@kernel
def note(tape, step, layer, kind, unit, start_s, duration_s, byte_count):
    """Write a slice that no expert and no rows belong to; ``layer`` is -1 outside the layers."""
    tape.ends[0] += 1
    entry = last_slice(tape)
    entry.step, entry.layer, entry.kind, entry.unit = step, layer, kind, unit
    entry.start_s, entry.duration_s, entry.bytes = start_s, duration_s, byte_count
    entry.rows, entry.expert, entry.resident = 0.0, -1, -1


@kernel
def note_count(tape, step, at_s, state):
    """Write how many experts are resident, and how much of the prefetch queue has yet to arrive."""
    queue = state.queue
    queued = 0
    for at in range(queue.ends[HEAD], queue.ends[TAIL]):
        key = np.int64(queue.key[at])
        queued += queue.place[key] == at and not is_complete(queue, key)
    tape.ends[1] += 1
    entry = tape.counts[min(tape.ends[1], tape.counts.size) - 1]
    entry.step, entry.at_s, entry.residents = step, at_s, state.cache.residents.sum()
    entry.queued, entry.queued_bytes = queued, remaining_bytes(queue)


@kernel
def note_flow(tape, step, budget_bytes, start_s, machine, state):
    """Write what ``flow`` is about to let arrive, in its order and by its arithmetic."""
    queue, experts = state.queue, state.cells.shape[1]
    left, moved_bytes = budget_bytes, 0.0
    for at in range(queue.ends[HEAD], queue.ends[TAIL]):
        if left <= 0:
            break
        key = np.int64(queue.key[at])
        if queue.place[key] != at or is_complete(queue, key):
            continue
        step_bytes = min(left, queue.weight_bytes[key] - queue.moved_bytes[key])
        begin_s = start_s + moved_bytes * machine.link[0].s_per_byte
        duration_s = step_bytes * machine.link[0].s_per_byte
        layer, expert = divmod(key, experts)
        note(tape, step, layer, PREFETCH, LINK_IN, begin_s, duration_s, step_bytes)
        last_slice(tape).expert = expert
        left -= step_bytes
        moved_bytes += step_bytes


@kernel
def note_cold(tape, step, seconds):
    """Write the cold start of functions, with which the first step begins."""
    if tape is None:
        return
    note(tape, step, -1, COLD, NOBODY, 0.0, seconds, 0.0)
    tape.clock_s[0] = seconds


@kernel
def note_wait(tape, step, machine, state):
    """Before it: write the wait for the queue, with which the step begins."""
    if tape is None:
        return
    note_count(tape, step, 0.0, state)
    total_bytes = remaining_bytes(state.queue)
    if total_bytes == 0.0:
        return
    note_flow(tape, step, total_bytes, 0.0, machine, state)
    tape.clock_s[0] = total_bytes * machine.link[0].s_per_byte
    note(tape, step, -1, WAIT, NOBODY, 0.0, tape.clock_s[0], 0.0)


@kernel
def note_dense(tape, step, layer, dense, machine, state):
    """Before the queue flows beside it: write a layer's dense work, and that flow."""
    if tape is None:
        return
    start_s = tape.clock_s[0]
    note_count(tape, step, start_s, state)
    # The host's overhead, in which the GPU is idle, comes after the dense work: before the router's word.
    note(tape, step, layer, DENSE, GPU, start_s, dense - machine.work[0].overhead_s, machine.work[0].dense_bytes)
    note_flow(tape, step, dense * machine.link[0].bytes_s, start_s, machine, state)


@kernel
def note_moe(tape, step, layer, dense, seen, line, machine, state):
    """Before the queue flows beside it: write who runs the layer's experts and what moves for it, and that flow.

    ``seen`` is the hooks' view, the number of active experts, and the one that is shared, -1 = none.

    Order that the timing model leaves open is drawn as demand order: a unit's shards. Prefetches flow "for the time
    that demand fetches leave", and those come first.
    """
    if tape is None:
        return
    view, size, shared = seen
    start_s = tape.clock_s[0] + dense
    note_count(tape, step, start_s, state)
    free_s = _note_gpu(tape, step, layer, start_s, (size, shared), machine, state)
    if shared >= 0:
        _note_share(tape, step, layer, (start_s, free_s, line.fetch_s), shared, view, state)
    if line.act_bytes > 0.0:
        _note_groups(tape, step, layer, start_s + line.act_s, size, machine, state)
        if shared >= 0:
            _note_rest(tape, step, layer, start_s + line.act_s, shared, view, state)
        note(tape, step, layer, ACTIVATIONS, LINK_OUT, start_s, line.act_s, line.act_bytes)
        back_s = start_s + (line.act_s + line.busiest_s)
        note(tape, step, layer, ACTIVATIONS, LINK_IN, back_s, line.act_s, line.act_bytes)
    spare_bytes = max(0.0, line.moe_s - line.fetch_s) * machine.link[0].bytes_s
    note_flow(tape, step, spare_bytes, start_s + line.fetch_s, machine, state)
    note(tape, step, layer, LAYER, NOBODY, tape.clock_s[0], dense + line.moe_s, line.demand_bytes)


@kernel
def _note_gpu(tape, step, layer, start_s, seen, machine, state):
    """Write the GPU's experts and their fetches: rules 3 and 4 of a layer, as in ``layer.timeline``.

    The start of a layer's kernel is a part of its first expert's slice. ``seen``: how many experts, and the one that is
    shared, which comes last. Returns when the GPU is free.
    """
    size, shared = seen
    gpu_free_s, arrival_s, layer_s = 0.0, 0.0, machine.device[GPU_DEVICE].layer_s
    for j in range(size):
        i = state.scratch.active[j].turn
        if state.scratch.plan[i] != ON_GPU or i == shared:
            continue
        expert = state.scratch.active[i]
        if not expert.resident:
            note(tape, step, layer, FETCH, LINK_IN, start_s + arrival_s, expert.fetch_s, expert.weight_bytes)
            last_slice(tape).expert = expert.expert
        arrival_s += expert.fetch_s
        begin_s = max(gpu_free_s, arrival_s)
        duration_s = expert.gpu_s + (layer_s if expert.resident else 0.0)
        layer_s = 0.0 if expert.resident else layer_s
        note_expert(tape, step, layer, GPU, start_s + begin_s, duration_s, expert)
        gpu_free_s = begin_s + duration_s
    return gpu_free_s


@kernel
def _note_share(tape, step, layer, times, shared, view, state):
    """Write the GPU's part of a shared expert and its fetch; times: router's word, GPU free, all fetched."""
    start_s, free_s, fetched_s = times
    expert = state.scratch.active[shared]
    fetch_s = share_fetch_s(view, expert)
    if fetch_s > 0.0:
        fetched_bytes = missing_share(expert) * expert.weight_bytes
        note(tape, step, layer, FETCH, LINK_IN, start_s + (fetched_s - fetch_s), fetch_s, fetched_bytes)
        last_slice(tape).expert = expert.expert
        free_s = max(free_s, fetched_s)
    _note_part(tape, step, layer, GPU, (start_s + free_s, share_gpu_s(view, expert), expert.share), expert)


@kernel
def _note_rest(tape, step, layer, start_s, shared, view, state):
    """Write home's part of a shared expert, which comes last."""
    expert = state.scratch.active[shared]
    group = state.scratch.groups[expert.group]
    rest_s = share_home_s(view, expert)
    if rest_s > 0.0:
        part = (start_s + group.busy_s, rest_s, 1.0 - expert.share)
        _note_part(tape, step, layer, FIRST_GROUP + expert.group, part, expert)
        group.busy_s += rest_s


@kernel
def _note_part(tape, step, layer, unit, part, expert):
    """Write the slice of a part of an expert: begin and seconds, and which share."""
    note(tape, step, layer, EXPERT, unit, part[0], part[1], part[2] * expert.weight_bytes)
    entry = last_slice(tape)
    entry.expert, entry.rows, entry.resident = expert.expert, part[2] * expert.rows, expert.resident


@kernel
def _note_groups(tape, step, layer, start_s, size, machine, state):
    """Write the units' experts, one after another in each group: ``busy_s`` counts up to what it is again.

    The start of a layer's work is a part of its first expert's slice.
    """
    layer_s = machine.device[FIRST_HOME].layer_s
    for g in range(state.scratch.groups.size):
        state.scratch.groups[g].busy_s = 0.0
    for i in range(size):
        if state.scratch.plan[i] != HOME:
            continue
        expert = state.scratch.active[i]
        group = state.scratch.groups[expert.group]
        is_first = group.busy_s == 0.0
        begin_s = start_s + (group.busy_s + (0.0 if is_first else layer_s))
        duration_s = expert.ndp_s + (layer_s if is_first else 0.0)
        note_expert(tape, step, layer, FIRST_GROUP + expert.group, begin_s, duration_s, expert)
        group.busy_s += expert.ndp_s


@kernel
def note_expert(tape, step, layer, unit, start_s, duration_s, expert):
    """Write the slice of an expert, a record of ACTIVE."""
    note(tape, step, layer, EXPERT, unit, start_s, duration_s, expert.weight_bytes)
    entry = last_slice(tape)
    entry.expert, entry.rows, entry.resident = expert.expert, expert.rows, expert.resident


@kernel
def note_layer_end(tape, step, seconds, state):
    """Write the counts after a layer that took ``seconds``; the next one begins here."""
    if tape is None:
        return
    tape.clock_s[0] += seconds
    note_count(tape, step, tape.clock_s[0], state)


@kernel
def note_head(tape, step, machine, state):
    """Write the LM head, with which the step ends, and the queue after it."""
    if tape is None:
        return
    head = head_s(machine)
    note(tape, step, -1, HEAD_WORK, GPU, tape.clock_s[0], head, machine.work[0].head_bytes)
    note_count(tape, step, tape.clock_s[0] + head, state)
