"""NumPy archives: the arrays of moetrace.importers.npz, which reads them back.

`expert_ids`, `request_id`, `position`, `phase` (0 prefill, 1 decode), `layer_index`, `meta` (JSON), `step_rows`, and if
the trace has them `gate_weights` and `token_id`. Members are stored, not compressed, at a fixed time: the same trace
gives the same bytes on any machine. Sizes of experts and recorded residency have no place in it.
"""

import io
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import numpy as np

from moetrace.exports.blocks import kept_facts, parts
from moetrace.trace.format import Trace
from moetrace.trace.schema import BLOCK_BYTES, PART_ROWS, as_dtype, row_dtype, row_shape

_NAMES = {"request": "request_id", "position": "position", "gates": "gate_weights", "token": "token_id"}


def write(trace: Trace, file: IO[bytes], progress: Callable[[int], object]) -> None:
    """Write `trace` to `file`, in one pass for each array."""
    with zipfile.ZipFile(file, "w") as archive:
        ids = _columns(trace, "experts")
        _add(archive, "expert_ids", *ids, _told(trace, progress))
        for name, member in _NAMES.items():
            if name in ("request", "position") or name in trace.has:
                _add(archive, member, *_columns(trace, name), _slices(trace, name))
        _add(
            archive, "phase", np.dtype("u1"), (trace.rows,), (part.phase for part in trace.parts(PART_ROWS, ids=False))
        )
        step_rows = as_dtype("step_rows", np.diff(trace.offset), np.dtype("<i4"))
        meta = np.array(_meta(trace))
        for member, array in (("layer_index", trace.layer_index), ("step_rows", step_rows), ("meta", meta)):
            _add(archive, member, array.dtype, array.shape, [array])


def _columns(trace: Trace, name: str) -> tuple[np.dtype, tuple[int, ...]]:
    return row_dtype(name, trace.num_experts), row_shape(name, trace.rows, trace.layers, trace.top_k)


def _told(trace: Trace, progress: Callable[[int], object]) -> Iterator[np.ndarray]:
    for part in parts(trace):
        yield part.experts
        progress(len(part.experts))


def _slices(trace: Trace, name: str) -> Iterator[np.ndarray]:
    rows = max(1, BLOCK_BYTES // (2 * trace.layers * trace.top_k))
    return (trace.read(name, start, start + rows) for start in range(0, trace.rows, rows))


def _meta(trace: Trace) -> str:
    """The fields that the importer needs, the ones that it keeps, and the trace's whole source."""
    known = {"model": trace.model, "num_experts": trace.num_experts, "top_k": trace.top_k, "trace": trace.source}
    return json.dumps(kept_facts(trace) | known, sort_keys=True)


def _add(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...], arrays: Iterable[np.ndarray]
) -> None:
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    member.create_system = 3  # always Unix, so that the bytes do not depend on the system
    member.file_size = header.tell() + math.prod(shape) * dtype.itemsize  # tells zipfile whether 4 GiB are enough
    with archive.open(member, "w") as file:
        file.write(header.getvalue())
        for array in arrays:
            file.write(np.ascontiguousarray(array).data)
