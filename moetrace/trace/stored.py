"""Data in compressed chunks: the unpacked size of a chunk is known, and checked, before HDF5 unpacks it.

The zstd filter allocates the size in a chunk's own header, deflate the size that comes out: a few bytes can
claim any size, and less than a chunk makes HDF5 read beyond what it has.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.trace.plain import MAX_CHUNKS
from moetrace.trace.schema import CHUNK_BYTES

DEFLATE, SHUFFLE, FLETCHER32, ZSTD = 1, 2, 3, 32015
KNOWN_FILTERS = (DEFLATE, SHUFFLE, FLETCHER32, ZSTD)  # HDF5 would load a plug-in for any other that a file names
CHUNK_CACHE_BYTES = 32 << 20  # of a dataset, or one chunk that is larger
_CHECKSUM_BYTES = 4
_SLACK_BYTES = 64 << 10  # what compressing may add to data that cannot be compressed
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def check_chunks(dataset: h5py.Dataset, where: str) -> int:
    """Return the bytes of a chunk; raise MoetraceError unless filters are known, and chunks there and small."""
    filters = _filters(dataset)
    for number in filters:
        if number not in KNOWN_FILTERS:
            raise MoetraceError(f"{where}: {dataset.name} is compressed by filter {number}, not by zstd or gzip.")
    packing = [number in (DEFLATE, ZSTD) for number in filters]
    if len(set(filters)) < len(filters) or sum(packing) > 1:
        raise MoetraceError(f"{where}: {dataset.name} is compressed more than once.")
    if any(packing) and SHUFFLE in filters[packing.index(True) :]:
        raise MoetraceError(f"{where}: {dataset.name} is shuffled after it was compressed.")
    chunk = dataset.chunks
    assert chunk is not None
    chunk_bytes = math.prod(chunk) * dataset.dtype.itemsize
    if chunk_bytes > CHUNK_BYTES:
        raise MoetraceError(f"{where}: {dataset.name} has chunks of more than {CHUNK_BYTES >> 20} MiB.")
    wanted = math.prod(_grid(dataset))
    if wanted > MAX_CHUNKS:
        raise MoetraceError(f"{where}: {dataset.name} has {wanted:,} chunks, but may have {MAX_CHUNKS:,} at most.")
    if dataset.id.get_num_chunks() != wanted:
        raise MoetraceError(f"{where}: {dataset.name} lacks some of its {wanted} chunks; the file is incomplete.")
    return chunk_bytes


def with_cache(file: h5py.File, path: str, chunk_bytes: int) -> h5py.Dataset:
    """Open a dataset with room for a chunk in its cache: else each read of a part unpacks the whole chunk again."""
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    access.set_chunk_cache(1, chunk_bytes, 1.0)
    return h5py.Dataset(h5py.h5d.open(file.id, path.encode(), access))


def stored_reader(dataset: h5py.Dataset, where: str) -> Callable[[int, int], np.ndarray]:
    """Return a function that reads entries start:stop of a dataset through HDF5."""
    chunks = _Chunks(dataset, where) if dataset.chunks is not None else None

    def read(start: int, stop: int) -> np.ndarray:
        try:
            if chunks is not None and stop > start:
                chunks.check(start, stop)
            return np.ascontiguousarray(dataset[start:stop])
        except (OSError, RuntimeError, ValueError) as error:
            name = dataset.name if dataset else "a dataset"
            raise MoetraceError(f"{where}: {name} entries {start} to {stop} can't be read: {error}.") from error

    return read


def _filters(dataset: h5py.Dataset) -> list[int]:
    properties = dataset.id.get_create_plist()
    return [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]


def _grid(dataset: h5py.Dataset) -> tuple[int, ...]:
    """How many chunks lie along each axis."""
    assert dataset.chunks is not None
    return tuple(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))


class _Chunks:
    """Where the chunks of a dataset are; each is checked once, when it is first read."""

    def __init__(self, dataset: h5py.Dataset, where: str) -> None:
        assert dataset.chunks is not None
        self.dataset, self.where, self.chunk = dataset, where, dataset.chunks
        self.grid = _grid(dataset)
        self.bytes = math.prod(self.chunk) * dataset.dtype.itemsize
        self.filters = _filters(dataset)
        self.place: np.ndarray | None = None  # int64 [chunks, 2]: filter mask and bytes, in C order
        self.done = np.zeros(math.prod(self.grid), bool)

    def check(self, start: int, stop: int) -> None:
        """Raise MoetraceError unless each chunk of entries start:stop unpacks to what a chunk holds."""
        beside = math.prod(self.grid[1:])
        first, last = start // self.chunk[0] * beside, -(-stop // self.chunk[0]) * beside
        todo = np.flatnonzero(~self.done[first:last])
        if todo.size and self.place is None:
            self.place = self._places()
        for number in (first + todo).tolist():
            self._check(number)
            self.done[number] = True

    def _places(self) -> np.ndarray:
        place = np.full((self.done.size, 2), -1, np.int64)

        def note(info: Any) -> None:
            index = [at // size for at, size in zip(info.chunk_offset, self.chunk, strict=True)]
            if all(at < count for at, count in zip(index, self.grid, strict=True)):
                number = int(np.ravel_multi_index(index, self.grid))
                place[number] = info.filter_mask, info.size

        self.dataset.id.chunk_iter(note)
        return place

    def _check(self, number: int) -> None:
        assert self.place is not None
        mask, size = (int(value) for value in self.place[number])
        applied = [one for i, one in enumerate(self.filters) if not mask >> i & 1]
        packed = next((one for one in applied if one in (DEFLATE, ZSTD)), None)
        checksum = _CHECKSUM_BYTES * (FLETCHER32 in applied)
        if size < 0 or size > self.bytes + self.bytes // 64 + _SLACK_BYTES:
            self._refuse(number, f"is stored in {size:,} bytes")
        if packed is None:
            unpacked, wanted = size, self.bytes + checksum
        else:
            inside = FLETCHER32 in applied[: applied.index(packed)]
            wanted = self.bytes + checksum * inside
            unpacked = (_zstd_bytes if packed == ZSTD else _deflate_bytes)(self._raw(number), wanted)
        if unpacked != wanted:
            shown = "an unknown number of" if unpacked is None else f"{unpacked:,}"
            self._refuse(number, f"unpacks to {shown} bytes")

    def _refuse(self, number: int, what: str) -> None:
        raise MoetraceError(
            f"{self.where}: chunk {number} of {self.dataset.name} {what}, but a chunk holds {self.bytes:,}; the "
            f"file is damaged."
        )

    def _raw(self, number: int) -> bytes:
        """A chunk as it is stored."""
        index = np.unravel_index(number, self.grid)
        return self.dataset.id.read_direct_chunk(tuple(int(i) * n for i, n in zip(index, self.chunk, strict=True)))[1]


def _zstd_bytes(raw: bytes, _wanted: int) -> int | None:
    """The unpacked size in the header of a zstd frame; None without one."""
    if len(raw) < 6 or raw[:4] != _ZSTD_MAGIC:
        return None
    flags = raw[4]
    single = flags >> 5 & 1
    at = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    width = (single, 2, 4, 8)[flags >> 6]
    if not width or len(raw) < at + width:
        return None
    number = int.from_bytes(raw[at : at + width], "little")
    return number + 256 if width == 2 else number


def _deflate_bytes(raw: bytes, wanted: int) -> int | None:
    """The unpacked size of a deflated chunk, counted up to one byte above `wanted`."""
    try:
        return len(zlib.decompressobj().decompress(raw, wanted + 1))
    except zlib.error:
        return None
