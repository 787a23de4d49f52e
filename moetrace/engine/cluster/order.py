"""In which order a layer's stages run, and when the last of them ends: a list schedule of a few resources."""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.state import records
from moetrace.jit.compile import kernel

# When each resource is free: attention GPUs, network to the experts, expert GPUs, network back. Where the same GPUs do
# both, `attention` is that of all GPUs, and `dispatch` that of the network.
FREE = np.dtype([(name, np.float64) for name in ("attention", "dispatch", "experts", "combine", "last")])


class Agenda(NamedTuple):
    """A step on its way."""

    free: Any  # FREE [1]
    ready_s: np.ndarray  # float64 [r1]: when a micro-batch may begin its next layer
    attended_s: np.ndarray  # float64 [r1]: when its attention ends in this one
    shared_s: np.ndarray  # float64 [r1]: when its shared experts end in this one
    arrived_s: np.ndarray  # float64 [r1, r2]: when a chunk is with the experts
    done_s: np.ndarray  # float64 [r1, r2]: when they have run it
    back_s: np.ndarray  # float64 [r1, r2]: when it is back


@kernel
def begin_step(agenda):
    """Begin a step: everything is free and ready."""
    free = agenda.free[0]
    free.attention, free.dispatch, free.experts, free.combine, free.last = 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(agenda.ready_s.size):
        agenda.ready_s[i] = 0.0


@kernel(inline=False)
def add_layer(gpus, cut, stages, sends, agenda):
    """Put a layer's stages behind those of the layers before; ``sends`` 0: transfers take no time.

    Each resource serves one task at a time: attention GPUs A and S by micro-batch (``asas``) or all A first (``aass``),
    the others by micro-batch and chunk. Where the same GPUs do both, they serve the layer's A and S, then its experts;
    their network all that goes to the experts, then all that comes back. Chunks without rows are left out.
    """
    free, micro_batches = agenda.free[0], stages.rows.shape[0]
    for i in range(micro_batches):
        if stages.all_rows[i] == 0:
            continue
        free.attention = max(free.attention, agenda.ready_s[i]) + stages.attention_s[i]
        agenda.attended_s[i] = free.attention
        if not cut.attention_first:
            free.attention += stages.shared_s[i]
            agenda.shared_s[i] = agenda.ready_s[i] = free.attention
    if cut.attention_first:
        for i in range(micro_batches):
            if stages.all_rows[i] > 0:
                free.attention += stages.shared_s[i]
                agenda.shared_s[i] = agenda.ready_s[i] = free.attention
    free.last = max(free.last, free.attention)
    _send(stages, sends, agenda)
    _run(gpus, stages, agenda)
    _send_back(gpus, stages, sends, agenda)


@kernel
def _send(stages, sends, agenda):
    """Send each chunk to the experts once its micro-batch is attended."""
    free = agenda.free[0]
    for i in range(stages.rows.shape[0]):
        for j in range(stages.rows.shape[1]):
            if stages.rows[i, j] > 0:
                free.dispatch = max(free.dispatch, agenda.attended_s[i]) + sends * stages.dispatch_s[i, j]
                agenda.arrived_s[i, j] = free.dispatch


@kernel
def _run(gpus, stages, agenda):
    """Run the experts of each chunk that has arrived."""
    free = agenda.free[0]
    free_s = free.attention if gpus.colocated else free.experts
    for i in range(stages.rows.shape[0]):
        for j in range(stages.rows.shape[1]):
            if stages.rows[i, j] > 0:
                free_s = max(free_s, agenda.arrived_s[i, j]) + stages.experts_s[i, j]
                agenda.done_s[i, j] = free_s
    if gpus.colocated:
        free.attention = free_s
    else:
        free.experts = free_s
    free.last = max(free.last, free_s)


@kernel
def _send_back(gpus, stages, sends, agenda):
    """Send each chunk back once it has run; a micro-batch is ready when its last one is back."""
    free = agenda.free[0]
    free_s = free.dispatch if gpus.colocated else free.combine
    for i in range(stages.rows.shape[0]):
        for j in range(stages.rows.shape[1]):
            if stages.rows[i, j] > 0:
                free_s = max(free_s, agenda.done_s[i, j]) + sends * stages.combine_s[i, j]
                agenda.back_s[i, j] = free_s
                agenda.ready_s[i] = max(agenda.ready_s[i], free_s)
    if gpus.colocated:
        free.dispatch = free_s
    else:
        free.combine = free_s
    free.last = max(free.last, free_s)


def new_agenda(micro_batches: int, chunks: int) -> Agenda:
    """Return room for steps cut into ``micro_batches`` and ``chunks``."""
    parts = micro_batches, chunks
    each = [np.zeros(micro_batches) for _ in range(3)]
    return Agenda(records(1, FREE), *each, *(np.zeros(parts) for _ in range(3)))
