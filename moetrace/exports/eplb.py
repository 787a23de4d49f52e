"""Expert counts as SGLang's `--init-expert-location FILE.json` takes them, to place experts by its EPLB.

`{"logical_count": [[...], ...]}`: how often each expert was chosen, summed over the trace, [layers, experts]. SGLang
looks layers up by their index in the model, dense ones included, so these are rows of zeros here.
"""

import json
from collections.abc import Callable
from typing import IO

import numpy as np

from moetrace.exports.blocks import check_objects, parts
from moetrace.trace.format import Trace
from moetrace.trace.schema import absent_id


def write(trace: Trace, file: IO[bytes], progress: Callable[[int], object]) -> None:
    """Write the counts of `trace`, which may hold just counts, to `file`."""
    layers = int(trace.layer_index[-1]) + 1
    check_objects(trace, layers)
    counts = np.zeros((layers, trace.num_experts), np.int64)
    counts[trace.layer_index] = _summed(trace, progress) if "counts" in trace.has else _counted(trace, progress)
    rows = ",\n".join(json.dumps(row) for row in counts.tolist())
    file.write(f'{{"logical_count": [\n{rows}\n]}}\n'.encode())


def _counted(trace: Trace, progress: Callable[[int], object]) -> np.ndarray:
    shape = (trace.layers, trace.num_experts)
    first_of_layer = (np.arange(trace.layers) * trace.num_experts)[:, None]
    counts = np.zeros(trace.layers * trace.num_experts, np.int64)
    for part in parts(trace):
        made = part.experts != absent_id(trace.num_experts)
        counts += np.bincount((part.experts + first_of_layer)[made], minlength=counts.size)
        progress(len(part.experts))
    return counts.reshape(shape)


def _summed(trace: Trace, progress: Callable[[int], object]) -> np.ndarray:
    counts = np.zeros((trace.layers, trace.num_experts), np.int64)
    for block in trace.count_blocks():
        counts += block.counts.sum(axis=0)
        progress(int(block.rows.sum()))
    return counts
