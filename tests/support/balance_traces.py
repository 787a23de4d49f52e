"""Small random traces for balance, and their loads by plain counting."""

import numpy as np

from moetrace.trace import Trace

EXPERTS, LAYERS = 7, 3


def small_trace(seed, steps=24, most=5, model="", experts=EXPERTS):
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, most + 1, steps)
    n = int(rows.sum())
    order = rng.permuted(np.tile(np.arange(experts, dtype=np.uint8), (n, LAYERS, 1)), axis=2)
    ids = np.where(rng.random((n, LAYERS, 2)) < 0.15, 255, order[:, :, :2])
    phase = rng.integers(0, 2, steps)
    size = rng.integers(1, 40, (LAYERS, experts))
    return Trace.from_arrays(
        ids, num_experts=experts, steps=rows, phase=phase, expert_bytes=size, model=model, request=np.zeros(n, int)
    )


def counted(trace):
    """Rows of each step, layer and expert, by plain counting."""
    counts = np.zeros((trace.steps, trace.layers, trace.num_experts), np.int64)
    ids = trace.read("experts", 0, trace.rows)
    for step in range(trace.steps):
        for row in range(trace.offset[step], trace.offset[step + 1]):
            for layer in range(trace.layers):
                for e in ids[row, layer]:
                    if e != np.iinfo(ids.dtype).max:
                        counts[step, layer, e] += 1
    return counts
