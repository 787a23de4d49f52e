"""NumPy archives: the arrays of moetrace.trace.engines.npz, which reads them back.

`expert_ids`, `request_id`, `position`, `phase` (0 prefill, 1 decode), `layer_index`, `meta` (JSON), and if the trace
has them `gate_weights` and `token_id`; beyond these `step_rows`, int64 [steps], the rows of each step. Stored, not
compressed, with the times of members fixed: the same trace gives the same bytes on any machine. Sizes of experts and
recorded residency have no place in it.
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

from moetrace.trace.engines.npz import FACTS
from moetrace.trace.exports.blocks import PART_CHOICES, parts
from moetrace.trace.format import Trace


def write(trace: Trace, file: IO[bytes], progress: Callable[[int], object]) -> None:
    """Write `trace` to `file`, in passes of one array each."""
    rows, cells = trace.rows, (trace.rows, trace.layers, trace.top_k)
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        ids = (part.experts for part in _told(parts(trace), progress))
        _member(archive, "expert_ids", cells, ids)
        _member(archive, "request_id", (rows,), (block.request for block in trace.row_blocks()))
        _member(archive, "position", (rows,), (block.position for block in trace.row_blocks()))
        _member(archive, "phase", (rows,), (block.phase for block in trace.row_blocks()))
        _member(archive, "layer_index", (trace.layers,), iter([trace.layer_index]))
        meta = np.array(_meta(trace))
        _member(archive, "meta", (), iter([meta]))
        _member(archive, "step_rows", (trace.steps,), iter([np.diff(trace.offset)]))
        if "gates" in trace.has:
            _member(archive, "gate_weights", cells, _slices(trace, "gates"))
        if "token" in trace.has:
            _member(archive, "token_id", (rows,), _slices(trace, "token"))
