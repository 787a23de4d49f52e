"""The sha256 of what a trace holds: computed on its own, or beside the reading of what passes anyway."""

import hashlib
import json
import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.trace.hdf5 import Column
from moetrace.trace.schema import BLOCK_BYTES, SCHEMA

_WAITING = 2  # arrays that may wait for the thread


def sha256_of(column: Column) -> str:
    """Read a dataset, a few MiB at a time, and return its sha256."""
    digest = hashlib.sha256()
    rows = max(1, BLOCK_BYTES // max(1, math.prod(column.shape[1:]) * column.dtype.itemsize))
    for start in range(0, column.shape[0], rows):
        digest.update(column.read(start, min(start + rows, column.shape[0])).data)
    return digest.hexdigest()


def content_sha256_of(trace: Any, columns: Mapping[str, Column], hashes: Mapping[str, str]) -> str:
    """The sha256 of the routing, from the sizes of a trace, its columns, and the hash of each by name."""
    shape = [SCHEMA, trace.model, trace.num_experts, trace.top_k]
    datasets = sorted((columns[name].path, *columns[name].shape, hashes[name]) for name in hashes)
    return hashlib.sha256(json.dumps([shape, datasets]).encode()).hexdigest()


def refuse_changed(where: str, path: str) -> MoetraceError:
    """Say that a dataset is not what its hash says."""
    return MoetraceError(f"{where}: {path} differs from its sha256, so the file was damaged.")


class PassingHashes:
    """Compares datasets with their sha256 while something else reads them, in order: a thread of its own hashes.

    Hashing does not hold Python's lock, so that it runs beside the kernels.
    """

    def __init__(self, where: str, columns: Mapping[str, Column]) -> None:
        """Watch those of `columns`, by name, that have a sha256."""
        self._where = where
        self._columns = {name: column for name, column in columns.items() if column.sha256 is not None}
        self._digests = {name: hashlib.sha256() for name in self._columns}
        self._thread = ThreadPoolExecutor(1, "moetrace-sha256") if self._columns else None
        self._waiting: deque[Future[None]] = deque()

    def add(self, **arrays: np.ndarray) -> None:
        """Take the next entries of datasets; they must not change any more."""
        for name, array in arrays.items():
            if name in self._digests and self._thread is not None:
                while len(self._waiting) >= _WAITING:
                    self._waiting.popleft().result()
                self._waiting.append(self._thread.submit(self._digests[name].update, array.data))

    def compare(self) -> None:
        """After the last entries, raise MoetraceError if a dataset differs from its sha256."""
        self.__exit__()
        for name, digest in self._digests.items():
            if digest.hexdigest() != self._columns[name].sha256:
                raise refuse_changed(self._where, self._columns[name].path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread, once it has hashed what it has."""
        if self._thread is not None:
            self._thread.shutdown()
