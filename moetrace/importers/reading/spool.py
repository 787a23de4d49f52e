"""Rows on their way from a source that must be read to its end before a trace of it can begin."""

import tempfile
import weakref
from collections.abc import Iterator
from typing import IO

import numpy as np

from moetrace.importers.captured import Hints, Part
from moetrace.trace.schema import BLOCK_BYTES, NOT_RECORDED, absent_id, row_dtype, row_shape

# Values of cells that were never written.
_EMPTY = {"gates": 0, "recorded": NOT_RECORDED, "token": 0}


class Spool:
    """Arrays over rows in temporary files without a name, which the system always removes.

    `append` adds whole rows; `scatter` puts single choices at any place of rows that `grow` has made. `parts` yields
    them all, in order. Memory is bounded by what one call is given (and, of `scatter`, by how far apart its rows lie).
    """

    def __init__(self, hints: Hints, num_experts: int, layers: int, top_k: int, optional: tuple[str, ...] = ()) -> None:
        self.rows = 0
        self._absent = absent_id(num_experts)
        self._dtype = {name: row_dtype(name, num_experts) for name in ("experts", *optional)}
        self._inner = {name: row_shape(name, 0, layers, top_k)[1:] for name in self._dtype}
        self._files: dict[str, IO[bytes]] = {
            name: tempfile.TemporaryFile(dir=hints.scratch)  # noqa: SIM115
            for name in self._dtype
        }
        weakref.finalize(self, _close, list(self._files.values()))

    def append(self, **arrays: np.ndarray) -> None:
        """Add rows: "experts" [n, layers, top_k] and each announced optional array, in the dtypes of a trace."""
        count = len(arrays["experts"])
        for name, file in self._files.items():
            array = np.ascontiguousarray(arrays[name], self._dtype[name])
            assert array.shape == (count, *self._inner[name])
            file.seek(self.rows * self._row_bytes(name))
            file.write(array.data)
        self.rows += count

    def grow(self, rows: int) -> None:
        """Make it `rows` rows long; the new ones are absent in every layer."""
        at_once = max(1, BLOCK_BYTES // max(self._row_bytes(name) for name in self._files))
        while self.rows < rows:
            count = min(at_once, rows - self.rows)
            self.append(
                **{
                    name: np.full((count, *self._inner[name]), _EMPTY.get(name, self._absent), self._dtype[name])
                    for name in self._files
                }
            )

    def scatter(self, row: np.ndarray, layer: np.ndarray, slot: np.ndarray, **values: np.ndarray) -> None:
        """Put one value a choice, of the named arrays, at `[row, layer, slot]` (integers [n]); the rows must exist."""
        if not row.size:
            return
        first, stop = int(row.min()), int(row.max()) + 1
        for name, value in values.items():
            window = self._window(name, first, stop)
            window[row - first, layer, slot] = value
            del window

    def put(self, row: np.ndarray, layer: np.ndarray, **values: np.ndarray) -> None:
        """Put whole cells, of the named arrays [n, top_k], at `[row, layer]` (integers [n]); the rows must exist."""
        if not row.size:
            return
        first, stop = int(row.min()), int(row.max()) + 1
        for name, value in values.items():
            window = self._window(name, first, stop)
            window[row - first, layer] = value
            del window

    def fill(self, cell: int, **values: np.ndarray) -> None:
        """Put whole cells, of the named arrays [n, top_k], one after another from number `cell` (row x layers) on."""
        for name, value in values.items():
            array = np.ascontiguousarray(value, self._dtype[name])
            file = self._files[name]
            file.seek(cell * array.itemsize * int(self._inner[name][-1]))
            file.write(array.data)

    def take(self, row: np.ndarray, layer: np.ndarray) -> np.ndarray:
        """The ids [n, top_k] that are at `[row, layer]` (integers [n], one or more) by now."""
        first = int(row.min())
        window = self._window("experts", first, int(row.max()) + 1)
        return np.array(window[row - first, layer])

    def parts(self) -> Iterator[Part]:
        """Yield all rows in order, some MiB at a time."""
        at_once = max(1, BLOCK_BYTES // self._row_bytes("experts"))
        for start in range(0, self.rows, at_once):
            yield self.read(start, min(start + at_once, self.rows))

    def read(self, start: int, stop: int) -> Part:
        """The rows `start:stop`, which must exist."""
        return {name: np.array(self._window(name, start, stop)) for name in self._files}

    @property
    def row_bytes(self) -> int:
        """Bytes of the ids of a row."""
        return self._row_bytes("experts")

    def _row_bytes(self, name: str) -> int:
        return int(np.prod(self._inner[name], dtype=np.int64)) * self._dtype[name].itemsize

    def _window(self, name: str, start: int, stop: int) -> np.memmap:
        file = self._files[name]
        file.flush()
        return np.memmap(
            file, self._dtype[name], "r+", start * self._row_bytes(name), (stop - start, *self._inner[name])
        )


def _close(files: list[IO[bytes]]) -> None:
    for file in files:
        file.close()


class GrowingArray:
    """An int32 array that grows at its end."""

    def __init__(self) -> None:
        self.size = 0
        self._data = np.empty(1024, np.int32)

    @property
    def array(self) -> np.ndarray:
        """The rows added so far, as a view."""
        return self._data[: self.size]

    def add(self, values: np.ndarray) -> None:
        """Add values at the end."""
        if self.size + values.size > self._data.size:
            self._data = np.concatenate([self.array, np.empty(self.size // 2 + values.size, np.int32)])
        self._data[self.size : self.size + values.size] = values
        self.size += values.size
