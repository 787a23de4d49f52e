"""NumPy archives: plain arrays, one file a capture.

Arrays, all [rows] or [rows, layers, top_k], rows in time order:
`expert_ids` (integers; 255, 65535 or -1 by dtype is absent), `request_id`, `position`, `phase` (0 prefill, 1 decode),
`layer_index` [layers], `meta` (JSON text with at least num_experts; model, licence, source, commit are kept);
optional: `gate_weights` [rows, layers, top_k], `token_id` [rows], `step_rows` [steps] (rows of each forward pass).
"""

import contextlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from moetrace.importers.captured import Capture, Hints, Part
from moetrace.importers.reading.npy import read_header
from moetrace.importers.reading.placeholders import Placeholders, advice
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import (
    BLOCK_BYTES,
    MAX_EXPERTS,
    absent_id,
    as_dtype,
    check_sizes,
    expert_dtype,
    plain_json,
    row_dtype,
)

FACTS = ("engine", "version", "source", "commit", "licence", "license", "quantization", "transformers", "torch")
# An archive may unpack to a thousand times its size, so nothing is unpacked before its announced size is checked.
ROW_ARRAY_BYTES = 256 << 20
META_BYTES = 1 << 20
_OPTIONAL = {"gates": "gate_weights", "token": "token_id"}
# The methods that NumPy writes. Others bring their own errors and decompression bombs.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError)


class _Array(NamedTuple):
    """An array of the archive: what its header says, not yet unpacked."""

    member: str
    shape: tuple[int, ...]
    dtype: np.dtype
    header_bytes: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes may be such an archive."""
    return first.startswith(b"PK\x03\x04") and b".npy" in first


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture an archive."""
    return [_read(path, hints) for path in sources]


def _read(path: Path, hints: Hints) -> Capture:
    """Read the arrays with one entry a row now, and the routing when `parts` yields it."""
    try:
        with zipfile.ZipFile(path) as archive:
            headers = {name: header_of(path, archive, name) for name in archive.namelist() if name.endswith(".npy")}
            arrays = {name.removesuffix(".npy"): array for name, array in headers.items()}
            for name in ("expert_ids", "request_id", "position", "phase", "layer_index", "meta"):
                if name not in arrays:
                    raise MoetraceError(f"{path} has no array {name!r}.")
            meta = _meta(path, archive, arrays["meta"])
            ids = arrays["expert_ids"]
            if len(ids.shape) != 3 or ids.dtype.kind not in "iu":
                raise MoetraceError(
                    f"{path}: expert_ids is {ids.dtype} {ids.shape}, not integers [rows, layers, top_k]."
                )
            rows, layers, top_k = ids.shape
            num_experts = _num_experts(path, meta, ids)
            check_sizes(str(path), num_experts, top_k, layers, rows, 1)
            if arrays["layer_index"].shape != (layers,):
                raise MoetraceError(f"{path}: layer_index has shape {arrays['layer_index'].shape}, not ({layers},).")
            layer_index = _load(path, archive, arrays["layer_index"])
            request, position, phase = (
                _row_array(path, archive, arrays[name], rows) for name in ("request_id", "position", "phase")
            )
            step_rows = _step_rows(path, archive, arrays["step_rows"], rows) if "step_rows" in arrays else None
    except UNREADABLE as error:
        raise MoetraceError(f"{path} can't be read as an npz archive: {str(error)[:200]}.") from error
    if phase.max() > 1 or phase.min() < 0:
        row = int(np.argmax((phase > 1) | (phase < 0)))
        raise MoetraceError(f"{path}: phase of row {row} is {phase[row]}, but must be 0 or 1.")
    hints.reading(path.stat().st_size)
    optional = tuple(name for name, key in _OPTIONAL.items() if key in arrays)
    for name in optional:
        array, want = arrays[_OPTIONAL[name]], ids.shape if name == "gates" else ids.shape[:1]
        if array.shape != want:
            raise MoetraceError(f"{path}: {_OPTIONAL[name]} has shape {array.shape}, but {want} is needed.")
        as_dtype(f"{path}: {_OPTIONAL[name]}", np.empty(0, array.dtype), row_dtype(name, num_experts))
    streamed = {"experts": ids} | {name: arrays[_OPTIONAL[name]] for name in optional}
    return Capture(
        model=str(meta.get("model", "")),
        num_experts=num_experts,
        top_k=top_k,
        layer_index=layer_index,
        expert_bytes=None,
        request=request,
        position=position,
        phase=phase.astype(np.uint8),
        optional=optional,
        facts={"format": "npz"} | {key: str(meta[key])[:300] for key in FACTS if key in meta},
        parts=lambda: _parts(path, streamed, num_experts, hints),
        sources=(path,),
        step_rows=step_rows,
    )


def header_of(path: Path, archive: zipfile.ZipFile, member: str) -> _Array:
    """The header of an array in an archive. Raises MoetraceError if its size or method is another's."""
    info = archive.getinfo(member)
    if info.compress_type not in _METHODS or info.flag_bits & 1:
        raise MoetraceError(f"{path}: {member} is encrypted, or compressed by another method than NumPy's.")
    with archive.open(member) as file:
        array = _Array(member, *read_header(f"{path}: {member}", file))
    if array.header_bytes + array.nbytes != info.file_size:
        raise MoetraceError(f"{path}: {member} says it has shape {array.shape}, but its size differs.")
    return array


def read_rows(file: IO[bytes], array: _Array, rows: int) -> np.ndarray:
    """The next rows of an array of which the header has been read."""
    inner = array.shape[1:]
    size = rows * int(np.prod(inner, dtype=np.int64)) * array.dtype.itemsize
    data = file.read(size)
    if len(data) != size:
        raise EOFError(f"{array.member} ends too early")
    return np.frombuffer(data, array.dtype).reshape(rows, *inner)


def _load(path: Path, archive: zipfile.ZipFile, array: _Array, limit: int = ROW_ARRAY_BYTES) -> np.ndarray:
    if array.nbytes > limit:
        raise MoetraceError(f"{path}: {array.member} would take {array.nbytes} bytes; at most {limit} are read.")
    with archive.open(array.member) as file:
        file.read(array.header_bytes)
        return read_rows(file, array._replace(shape=array.shape or (1,)), array.shape[0] if array.shape else 1)


def _row_array(path: Path, archive: zipfile.ZipFile, array: _Array, rows: int) -> np.ndarray:
    if array.shape != (rows,) or array.dtype.kind not in "iu":
        raise MoetraceError(f"{path}: {array.member} is {array.dtype} {array.shape}, not integers ({rows},).")
    return _load(path, archive, array)


def _step_rows(path: Path, archive: zipfile.ZipFile, array: _Array, rows: int) -> np.ndarray:
    steps = _row_array(path, archive, array, (array.shape or (1,))[0])
    if not steps.size or steps.min() < 1 or steps.max() > rows or steps.sum(dtype=np.int64) != rows:
        raise MoetraceError(f"{path}: step_rows does not cut the {rows} rows into steps of one row or more.")
    return steps.astype(np.int64)


def _meta(path: Path, archive: zipfile.ZipFile, array: _Array) -> dict[str, Any]:
    if array.shape not in ((), (1,)) or array.dtype.kind not in "US":
        raise MoetraceError(f"{path}: meta is {array.dtype} {array.shape}, not a text.")
    text = _load(path, archive, array, META_BYTES)[0]
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MoetraceError(f"{path}: meta is not JSON: {error}.") from error
    if not isinstance(meta, dict):
        raise MoetraceError(f"{path}: meta is not a JSON object.")
    return plain_json(f"{path}: meta", meta)


def _num_experts(path: Path, meta: dict[str, Any], ids: _Array) -> int:
    num_experts = meta.get("num_experts")
    if type(num_experts) is not int:
        raise MoetraceError(f"{path}: meta does not say num_experts.")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise MoetraceError(f"{path}: meta says {num_experts} experts, but must say 1 to {MAX_EXPERTS}.")
    top_k = meta.get("top_k", ids.shape[2])
    if top_k != ids.shape[2]:
        raise MoetraceError(f"{path}: meta says top_k {top_k!r:.20}, but expert_ids has {ids.shape[2]} a layer.")
    if ids.dtype == np.uint8 and num_experts > 255:
        raise MoetraceError(
            f"{path}: with {num_experts} experts, expert_ids needs uint16: 255 could be absent or an id."
        )
    return num_experts


def _parts(path: Path, streamed: dict[str, _Array], num_experts: int, hints: Hints) -> Iterator[Part]:
    ids = streamed["experts"]
    placeholders = Placeholders(num_experts, hints, marks=True)
    rows_at_once = max(1, BLOCK_BYTES // max(1, ids.shape[1] * ids.shape[2] * ids.dtype.itemsize))
    try:
        with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(archive.open(array.member)) for name, array in streamed.items()}
            for name, file in files.items():
                file.read(streamed[name].header_bytes)
            for start in range(0, ids.shape[0], rows_at_once):
                rows = min(rows_at_once, ids.shape[0] - start)
                part = {name: read_rows(file, streamed[name], rows) for name, file in files.items()}
                part["experts"] = _narrow(path, start, part["experts"], num_experts, placeholders)
                yield part
        placeholders.told(str(path))
    except UNREADABLE as error:
        raise MoetraceError(f"{path} can't be read as an npz archive: {str(error)[:200]}.") from error


def _narrow(path: Path, first_row: int, ids: np.ndarray, num_experts: int, placeholders: Placeholders) -> np.ndarray:
    """The same ids in the dtype of a trace file, with its mark for absent."""
    mark = np.iinfo(ids.dtype).max if ids.dtype.kind == "u" else -1
    absent = ids == mark
    if mark > 0 and absent.any():
        ids = np.where(absent, -1, ids.astype(np.int64))
    ids, negative, wrong = placeholders.checked(ids)
    if wrong is not None:
        row, layer, slot = wrong
        expert = int(ids[row, layer, slot])
        raise MoetraceError(
            f"{path}: expert_ids of row {first_row + row}, layer entry {layer} holds {expert}, "
            f"but there are {num_experts} experts{advice(expert, num_experts)}."
        )
    narrow = ids.astype(expert_dtype(num_experts))
    if negative:
        narrow[ids == -1] = absent_id(num_experts)
    return narrow
