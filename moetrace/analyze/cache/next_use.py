"""When each key is accessed next, for policies that know the future, in memory that does not grow with the trace.

Within a block, walking it backwards tells; beyond it, a table of the first use of each key after the block does. A
first pass over the trace leaves these tables in a temporary file, 8 bytes a key and block: a few percent of the ids.
"""

import tempfile
from collections.abc import Iterable
from typing import Self

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.jit.compile import kernel

NEVER = 1 << 62
_IN_MEMORY_BYTES = 64 << 20


class NextUses:
    """The number of the access that is each access's next use; a context manager.

    It is shown all blocks of a trace (`learn`), and then asked for each in the same order, cut in the same way (`of`).
    """

    def __init__(self, keys: int):
        self._keys, self._table_bytes, self._done = keys, keys * 8, 0
        self._tables = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115

    def learn(self, blocks: Iterable[Accesses]) -> None:
        """Pass over all blocks of a trace."""
        count = 0
        for block in blocks:
            first = np.full(self._keys, -1)
            _walk_back(block.key, block.first, first, np.empty(0, np.int64))
            self._tables.write(first.data)
            count += 1
        upcoming = np.full(self._keys, NEVER)
        for table in range(count - 1, -1, -1):
            first = self._table(table)
            self._tables.seek(table * self._table_bytes)
            self._tables.write(upcoming.data)
            upcoming = np.where(first >= 0, first, upcoming)

    def of(self, block: Accesses) -> np.ndarray:
        """Return the next use of each access of the next block, int64 [n].

        NEVER minus its own number for the last access: among those, the key accessed longest ago is farthest.
        """
        next_use = np.empty(block.key.size, np.int64)
        upcoming = self._table(self._done).copy()
        _walk_back(block.key, block.first, upcoming, next_use)
        self._done += 1
        return next_use

    def _table(self, number: int) -> np.ndarray:
        self._tables.seek(number * self._table_bytes)
        return np.frombuffer(self._tables.read(self._table_bytes), np.int64)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tables.close()


@kernel
def _walk_back(key, first, upcoming, next_use):
    """Turn upcoming int64 [keys], first uses after a block, into those from its start on; fill next_use [n] or [0]."""
    for i in range(key.size - 1, -1, -1):
        if next_use.size:
            after = upcoming[key[i]]
            next_use[i] = after if after < NEVER else NEVER - (first + i)
        upcoming[key[i]] = first + i
