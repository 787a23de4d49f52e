"""What a trace file holds, as HDF5 has it: opened, checked as a stranger's, and mapped where it lies contiguous."""

import json
import math
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.trace import schema
from moetrace.trace.schema import OPTIONAL, ROW_PATHS

# gzip, shuffle, fletcher32 and zstd. HDF5 would load a plug-in for any other that a file names.
KNOWN_FILTERS = (1, 2, 3, 32015)
# A stranger's file may claim any size: what is not mapped, and one chunk, is read only up to this one.
WHOLE_BYTES = 256 << 20
CHUNK_CACHE_BYTES = 32 << 20
MAP_BYTES = 256 << 10


class Column(NamedTuple):
    """One dataset: its path, dtype and shape, how it is stored, and a function that returns its entries start:stop."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    storage: str  # "memory", "mapped" or "stored" (read and decompressed by HDF5)
    sha256: str | None
    read: Callable[[int, int], np.ndarray]


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading; raise MoetraceError if the system or HDF5 refuses."""
    if not path.exists():
        raise MoetraceError(f"there is no file {path}.")
    if not path.is_file():
        raise MoetraceError(f"{path} is not a file.")
    try:
        with path.open("rb"):  # HDF5's own words for "permission denied" are hard to read
            return h5py.File(path, "r", driver="sec2", locking=False, rdcc_nbytes=CHUNK_CACHE_BYTES)
    except OSError as error:
        if error.errno and "errno" not in str(error) and error.strerror:
            raise MoetraceError(f"{path} can't be read: {error.strerror}.") from error
        why = "it is truncated" if "truncated" in str(error) else "it is not an HDF5 file"
        raise MoetraceError(f"{path} is not a trace file: {why}.") from error


def read_attributes(file: h5py.File, where: str) -> dict[str, Any]:
    """The root attributes of a trace file, `source` parsed; raise MoetraceError if one is missing or senseless."""
    found = _attribute(file, where, "schema")
    if found != schema.SCHEMA:
        raise MoetraceError(f"{where} has schema {found!r}, but this version reads {schema.SCHEMA!r}.")
    values: dict[str, Any] = {"schema": found}
    for name, kind in (("model", str), ("num_experts", int), ("top_k", int), ("source", str), ("created_by", str)):
        values[name] = _attribute(file, where, name)
        if not isinstance(values[name], kind):
            raise MoetraceError(f"{where}: the attribute {name} is not {'text' if kind is str else 'a whole number'}.")
    try:
        values["source"] = json.loads(values["source"])
    except (ValueError, RecursionError) as error:
        raise MoetraceError(f"{where}: the attribute source is not JSON: {error}.") from error
    if not isinstance(values["source"], dict):
        raise MoetraceError(f"{where}: the attribute source is not a JSON object.")
    # The largest sizes also bound what is asked of the datasets' shapes.
    schema.check_sizes(where, values["num_experts"], values["top_k"], 1, 1, 1)
    return values


def _attribute(item: Any, where: str, name: str) -> str | int | None:
    """A scalar text or integer attribute of a file or dataset; anything else reads as None."""
    if name not in item.attrs:
        raise MoetraceError(f"{where} has no attribute {name!r}, so it is not a trace file.")
    handle = item.attrs.get_id(name)
    if handle.shape != () or handle.dtype.kind not in "iuSO":
        return None
    # Text of variable length is held elsewhere: HDF5 tells its length only with the text.
    value = item.attrs[name] if handle.get_storage_size() <= schema.ATTRIBUTE_BYTES else None
    if value is None or (isinstance(value, str | bytes) and len(value) > schema.ATTRIBUTE_BYTES):
        raise MoetraceError(f"{where}: the attribute {name} is larger than {schema.ATTRIBUTE_BYTES} bytes.")
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value if isinstance(value, str) else int(value) if isinstance(value, np.integer) else None


def read_columns(file: h5py.File, where: str, num_experts: int, top_k: int) -> dict[str, Column]:
    """Every dataset that the schema knows, after checking that their shapes and dtypes agree."""
    columns: dict[str, Column] = {}
    for name, (path, dtype) in schema.OTHER_PATHS.items():
        if name == "expert_bytes" and not _present(file, where, path):
            continue
        columns[name] = _column(file, where, path, dtype)
    layers, steps = columns["layer_index"].shape, columns["phase"].shape
    _expect(where, columns["layer_index"], (None,))
    _expect(where, columns["phase"], (None,))
    _expect(where, columns["offset"], (steps[0] + 1,))
    if _present(file, where, "/counts") and not _present(file, where, "/experts"):
        columns["counts"] = _column(file, where, "/counts", np.dtype("<i8"))
        _expect(where, columns["counts"], (*steps, *layers, num_experts))
        return columns
    rows = 0
    for name, path in ROW_PATHS.items():
        if name in OPTIONAL and not _present(file, where, path):
            continue
        columns[name] = _column(file, where, path, schema.row_dtype(name, num_experts))
        rows = columns["experts"].shape[0] if columns["experts"].shape else 0
        _expect(where, columns[name], schema.row_shape(name, rows, layers[0], top_k))
    return columns


def _expect(where: str, column: Column, shape: tuple[int | None, ...]) -> None:
    fits = len(column.shape) == len(shape) and all(b in (a, None) for a, b in zip(column.shape, shape, strict=True))
    if not fits:
        want = ", ".join("any" if n is None else str(n) for n in shape)
        raise MoetraceError(f"{where}: {column.path} has shape {column.shape}, but ({want}) is needed.")


def _present(file: h5py.File, where: str, path: str) -> bool:
    """Whether `path` is in the file itself; a link elsewhere is refused, since it could name any file."""
    group: Any = file
    for part in path.strip("/").split("/"):
        if not isinstance(group, h5py.Group) or part not in group.keys():  # noqa: SIM118
            return False
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise MoetraceError(f"{where}: {path} is a link; a trace must hold its data itself.")
        group = group[part]
    return True


def _column(file: h5py.File, where: str, path: str, dtype: np.dtype) -> Column:
    if not _present(file, where, path):
        raise MoetraceError(f"{where} has no dataset {path}.")
    dataset = file[path]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise MoetraceError(f"{where}: {path} is not a dataset.")
    if dataset.dtype != dtype:
        raise MoetraceError(f"{where}: {path} holds {dataset.dtype}, but must hold {dtype}.")
    properties = dataset.id.get_create_plist()
    layout = properties.get_layout()
    if properties.get_external_count() or layout == h5py.h5d.VIRTUAL:
        raise MoetraceError(f"{where}: {path} keeps its data in another file; a trace must hold its data itself.")
    text = _attribute(dataset, where, "sha256") if "sha256" in dataset.attrs else None
    sha256 = text if isinstance(text, str) else None
    size = math.prod(dataset.shape) * dtype.itemsize
    if layout == h5py.h5d.CONTIGUOUS and size:
        offset = dataset.id.get_offset()
        # HDF5 itself trusts these numbers; a map beyond the end of the file would end the process.
        if offset is None or offset + size > Path(file.filename).stat().st_size:
            raise MoetraceError(f"{where}: {path} has no data or ends beyond the file; it is truncated.")
        if offset % dtype.alignment == 0:
            return Column(path, dtype, dataset.shape, "mapped", sha256, _mapped(file, dataset, offset, where))
    if layout == h5py.h5d.CHUNKED:
        _check_chunks(dataset, properties, where)
    return Column(path, dtype, dataset.shape, "stored", sha256, _stored(dataset, where))


def _check_chunks(dataset: h5py.Dataset, properties: Any, where: str) -> None:
    for i in range(properties.get_nfilters()):
        number = properties.get_filter(i)[0]
        if number not in KNOWN_FILTERS:
            raise MoetraceError(f"{where}: {dataset.name} is compressed by filter {number}, not by zstd or gzip.")
    chunk = dataset.chunks
    assert chunk is not None
    if math.prod(chunk) * dataset.dtype.itemsize > WHOLE_BYTES:
        raise MoetraceError(f"{where}: {dataset.name} has chunks of more than {WHOLE_BYTES >> 20} MiB.")
    wanted = math.prod(-(-n // c) for n, c in zip(dataset.shape, chunk, strict=True))
    if dataset.id.get_num_chunks() != wanted:
        raise MoetraceError(f"{where}: {dataset.name} lacks some of its {wanted} chunks; the file is incomplete.")


def _mapped(file: h5py.File, dataset: h5py.Dataset, offset: int, where: str) -> Callable[[int, int], np.ndarray]:
    """Reads entries by mapping just them: nothing is copied, and pages go when the array does.

    A map of the whole file would be simpler, but a private writable one beyond the size of memory is refused by Linux.
    Copy-on-write, because a read-only array would make Numba compile every kernel again. Little is copied instead: that
    is as fast, and each map holds a file descriptor for as long as its array lives.
    """
    dtype, inner = dataset.dtype, dataset.shape[1:]
    entry_bytes = math.prod(inner) * dtype.itemsize
    through_hdf5 = _stored(dataset, where)

    def read(start: int, stop: int) -> np.ndarray:
        if not file:
            raise MoetraceError(f"{where} was closed.")
        descriptor, begin, size = file.id.get_vfd_handle(), offset + start * entry_bytes, (stop - start) * entry_bytes
        if os.fstat(descriptor).st_size < begin + size:  # HDF5 would return zeros, a map would end the process
            raise MoetraceError(f"{where} became shorter while it was read.")
        if size < MAP_BYTES and hasattr(os, "preadv"):
            array = np.empty((stop - start, *inner), dtype)
            if os.preadv(descriptor, [array.data], begin) == size:
                return array
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        try:
            window = mmap.mmap(descriptor, begin - page + size, access=mmap.ACCESS_COPY, offset=page)
        except OSError:  # more maps than the system allows
            return through_hdf5(start, stop)
        return np.frombuffer(window, dtype, (stop - start) * math.prod(inner), begin - page).reshape(-1, *inner)

    return read


def _stored(dataset: h5py.Dataset, where: str) -> Callable[[int, int], np.ndarray]:
    def read(start: int, stop: int) -> np.ndarray:
        try:
            return np.ascontiguousarray(dataset[start:stop])
        except (OSError, RuntimeError, ValueError) as error:
            name = dataset.name if dataset else "a dataset"
            raise MoetraceError(f"{where}: {name} entries {start} to {stop} can't be read: {error}.") from error

    return read
