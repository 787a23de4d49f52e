"""The HDF5 content of a trace file: opened, checked as a stranger's, and read in place if contiguous."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.trace import schema
from moetrace.trace.own_process import attributes_apart
from moetrace.trace.plain import is_cut, is_hdf5, is_plain
from moetrace.trace.probe import Attributes, attributes_of, hard_path
from moetrace.trace.schema import OPTIONAL, OTHER_PATHS, ROW_PATHS
from moetrace.trace.stored import CHUNK_CACHE_BYTES, check_chunks, stored_reader, with_cache

# A stranger's file may claim any size: compressed data that is read whole has at most this one.
WHOLE_BYTES = 256 << 20
ROOT_NAMES = {"schema": str, "model": str, "num_experts": int, "top_k": int, "source": str, "created_by": str}
PATHS = (*ROW_PATHS.values(), *(path for path, _ in OTHER_PATHS.values()), "/counts")


class Column(NamedTuple):
    """One dataset: its path, dtype and shape, how it is stored, and a function that returns its entries start:stop."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    storage: str  # "memory", "mapped" (contiguous in a file) or "stored" (read and decompressed by HDF5)
    sha256: str | None
    read: Callable[[int, int], np.ndarray]


class Source:
    """An open trace file: its name, its attributes, and whether the file at its path is still the opened one."""

    def __init__(self, path: Path) -> None:
        """Open it for reading; raise MoetraceError if the system or HDF5 refuses."""
        self.path, self.where = path, str(path)
        if not path.exists():
            raise MoetraceError(f"there is no file {path}.")
        if not path.is_file():
            raise MoetraceError(f"{path} is not a file.")
        try:
            with path.open("rb") as raw:  # HDF5's own words for "permission denied" are hard to read
                self._stamp = _stamp(raw.fileno())
                if not is_hdf5(raw):
                    raise MoetraceError(f"{path} is not a trace file: it is not an HDF5 file.")
                if is_cut(raw):
                    raise MoetraceError(f"{path} is not a trace file: it is truncated.")
                plain = is_plain(raw, PATHS)
            self._apart = None if plain else attributes_apart(path, ROOT_NAMES, PATHS, ["sha256"])
            self.file = h5py.File(path, "r", driver="sec2", locking=False, rdcc_nbytes=CHUNK_CACHE_BYTES)
        except OSError as error:
            if error.errno and "errno" not in str(error) and error.strerror:
                raise MoetraceError(f"{path} can't be read: {error.strerror}.") from error
            why = "it is truncated" if "truncated" in str(error) else "it is not an HDF5 file"
            raise MoetraceError(f"{path} is not a trace file: {why}.") from error

    def attributes(self, item: Any, path: str, names: Mapping[str, Any] | list[str]) -> Attributes:
        """Attributes of the root ("/") or of a dataset; of a file that is not plain, as another process read them."""
        if self._apart is not None:
            return self._apart.get(path, {})
        return attributes_of(item, names, schema.ATTRIBUTE_BYTES)

    def check_same(self) -> None:
        """Raise MoetraceError if the file was closed here, or written to since it was opened."""
        if not self.file:
            raise MoetraceError(f"{self.where} was closed.")
        if (now := _stamp(self.descriptor)) != self._stamp:
            how = "became shorter" if now[0] < self._stamp[0] else "was changed"
            raise MoetraceError(f"{self.where} {how} while it was read: run this again when nothing writes to it.")

    @property
    def descriptor(self) -> int:
        """The system's number of the open file."""
        return self.file.id.get_vfd_handle()


def _stamp(descriptor: int) -> tuple[int, int]:
    """Size and time of the last write. Not the time of the last change: that of another link to the file counts."""
    facts = os.fstat(descriptor)
    return facts.st_size, facts.st_mtime_ns


def read_attributes(source: Source) -> dict[str, Any]:
    """The root attributes of a trace file, `source` parsed; raise MoetraceError if one is missing or senseless."""
    where, values = source.where, {}
    found = source.attributes(source.file, "/", ROOT_NAMES)
    for name, kind in ROOT_NAMES.items():
        values[name] = _checked(found, where, name)
        if name == "schema" and values[name] != schema.SCHEMA:
            raise MoetraceError(f"{where} has schema {values[name]!r}, but this version reads {schema.SCHEMA!r}.")
        if not isinstance(values[name], kind):
            raise MoetraceError(f"{where}: the attribute {name} is not {'text' if kind is str else 'a whole number'}.")
    try:
        values["source"] = json.loads(values["source"])
    except (ValueError, RecursionError) as error:
        raise MoetraceError(f"{where}: the attribute source is not JSON: {error}.") from error
    if not isinstance(values["source"], dict):
        raise MoetraceError(f"{where}: the attribute source is not a JSON object.")
    # The largest sizes also bound the shapes that the datasets may have.
    schema.check_sizes(where, values["num_experts"], values["top_k"], 1, 1, 1)
    return values


def _checked(found: Attributes, where: str, name: str) -> str | int | None:
    """The value of a text or whole number; None for anything else."""
    if name not in found:
        raise MoetraceError(f"{where} has no attribute {name!r}, so it is not a trace file.")
    kind, value = found[name]
    if kind == "large":
        raise MoetraceError(f"{where}: the attribute {name} is larger than {schema.ATTRIBUTE_BYTES} bytes.")
    return value


def read_columns(source: Source, num_experts: int, top_k: int) -> dict[str, Column]:
    """Every dataset that the schema knows, after checking that sizes are possible, and shapes and dtypes agree."""
    where = source.where
    columns: dict[str, Column] = {}
    for name, (path, dtype) in OTHER_PATHS.items():
        if name in schema.OPTIONAL_OTHERS and not _present(source, path):
            continue
        columns[name] = _column(source, path, dtype)
    layers, steps = columns["layer_index"].shape, columns["phase"].shape
    _expect(where, columns["layer_index"], (None,))
    _expect(where, columns["phase"], (None,))
    _expect(where, columns["offset"], (steps[0] + 1,))
    schema.check_sizes(where, num_experts, top_k, layers[0], 1, steps[0])
    if _present(source, "/counts") and not _present(source, "/experts"):
        columns["counts"] = _column(source, "/counts", np.dtype("<i8"))
        _expect(where, columns["counts"], (*steps, *layers, num_experts))
    else:
        columns |= _row_columns(source, num_experts, top_k, layers[0])
    if "layer_experts" in columns:
        _expect(where, columns["layer_experts"], layers)
    if "expert_bytes" in columns:  # before it is read
        schema.check_expert_bytes_shape(where, columns["expert_bytes"].shape, layers[0], num_experts)
    return columns


def _row_columns(source: Source, num_experts: int, top_k: int, layers: int) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    rows = 0
    for name, path in ROW_PATHS.items():
        if name in OPTIONAL and not _present(source, path):
            continue
        columns[name] = _column(source, path, schema.row_dtype(name, num_experts))
        rows = columns["experts"].shape[0] if columns["experts"].shape else 0
        _expect(source.where, columns[name], schema.row_shape(name, rows, layers, top_k))
    return columns


def _expect(where: str, column: Column, shape: tuple[int | None, ...]) -> None:
    fits = len(column.shape) == len(shape) and all(b in (a, None) for a, b in zip(column.shape, shape, strict=True))
    if not fits:
        want = ", ".join("any" if n is None else str(n) for n in shape)
        raise MoetraceError(f"{where}: {column.path} has shape {column.shape}, but ({want}) is needed.")


def _present(source: Source, path: str) -> bool:
    """Whether `path` is in the file itself; a link elsewhere is refused, since it could name any file."""
    return _found(source, path) is not None


def _found(source: Source, path: str) -> Any:
    """The object at `path` in the file itself, None without one."""
    found = hard_path(source.file, path)
    if found is False:
        raise MoetraceError(f"{source.where}: {path} is a link; a trace must hold its data itself.")
    return found


def _column(source: Source, path: str, dtype: np.dtype) -> Column:
    where = source.where
    if (dataset := _found(source, path)) is None:
        raise MoetraceError(f"{where} has no dataset {path}.")
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise MoetraceError(f"{where}: {path} is not a dataset.")
    if dataset.dtype != dtype:
        raise MoetraceError(f"{where}: {path} holds {dataset.dtype}, but must hold {dtype}.")
    properties = dataset.id.get_create_plist()
    layout = properties.get_layout()
    if properties.get_external_count() or layout == h5py.h5d.VIRTUAL:
        raise MoetraceError(f"{where}: {path} keeps its data in another file; a trace must hold its data itself.")
    found = source.attributes(dataset, path, ["sha256"])
    text = _checked(found, where, "sha256") if "sha256" in found else None
    sha256 = text if isinstance(text, str) else None
    size = math.prod(dataset.shape) * dtype.itemsize
    if layout == h5py.h5d.CONTIGUOUS and size:
        offset = dataset.id.get_offset()
        # HDF5 itself trusts these numbers, and returns zeros for missing data.
        if offset is None or offset + size > os.fstat(source.descriptor).st_size:
            raise MoetraceError(f"{where}: {path} has no data or ends beyond the file; it is truncated.")
        return Column(path, dtype, dataset.shape, "mapped", sha256, _in_place(source, dataset, offset))
    if layout == h5py.h5d.CHUNKED:
        chunk_bytes = check_chunks(dataset, where)
        if chunk_bytes > CHUNK_CACHE_BYTES:
            del dataset  # HDF5 keeps the cache of a dataset as it was when it was first opened
            dataset = with_cache(source.file, path, chunk_bytes)
    return Column(path, dtype, dataset.shape, "stored", sha256, _stored(source, dataset))


def _in_place(source: Source, dataset: h5py.Dataset, offset: int) -> Callable[[int, int], np.ndarray]:
    """Reads entries where they lie in the file, without HDF5.

    They are copied: a map would end this process if another one cuts the file. 3 GB that are in the system's cache take
    1.06 s so, and 1.00 s by maps; a replay of them takes minutes.
    """
    dtype, inner = dataset.dtype, dataset.shape[1:]
    entry_bytes = math.prod(inner) * dtype.itemsize
    through_hdf5 = _stored(source, dataset)
    if not hasattr(os, "preadv"):
        return through_hdf5

    def read(start: int, stop: int) -> np.ndarray:
        source.check_same()
        array = np.empty((stop - start, *inner), dtype)
        flat, done = array.reshape(-1).view(np.uint8), 0
        while done < flat.size:  # the system reads some 2 GiB at a time
            count = os.preadv(source.descriptor, [flat[done:].data], offset + start * entry_bytes + done)
            if count <= 0:
                break
            done += count
        source.check_same()
        if done < flat.size:
            raise MoetraceError(f"{source.where}: {dataset.name} ends beyond the file; it is truncated.")
        return array

    return read


def _stored(source: Source, dataset: h5py.Dataset) -> Callable[[int, int], np.ndarray]:
    through_hdf5 = stored_reader(dataset, source.where)

    def read(start: int, stop: int) -> np.ndarray:
        source.check_same()
        array = through_hdf5(start, stop)
        source.check_same()
        return array

    return read
