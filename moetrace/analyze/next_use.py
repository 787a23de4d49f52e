"""When each key is accessed next, for policies that know the future, in memory that does not grow with the trace.

Within a block, walking it backwards tells; beyond it, a table of the first use of each key after the block does. A
first pass over the trace leaves these tables in a temporary file, 8 bytes a key and block: a few percent of the ids.
"""

import tempfile
from collections.abc import Iterable
from typing import Self

import numpy as np

from moetrace.analyze.accesses import Accesses
from moetrace.engine.compile import kernel

NEVER = 1 << 62
_IN_MEMORY_BYTES = 64 << 20


class NextUses:
    """The time of each access's next use, asked for block by block in order; a context manager.

    Sequentially the time of an access is its number in the trace; at once it is that of its event, so that experts
    demanded together are next used together.
    """

    def __init__(self, blocks: Iterable[Accesses], keys: int, sequential: bool):
        """Pass over `blocks`, all of a trace; its later blocks must be cut in the same way."""
        self._sequential, self._now = sequential, 0
        self._table_bytes = keys * 8
        self._tables = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115
        now, count = 0, 0
        for block in blocks:
            first = np.full(keys, -1)
            next_use = np.empty(block.key.size, np.int64)
            now += _walk_back(block.key, block.bounds, now, sequential, first, next_use)
            self._tables.write(first.data)
            count += 1
        upcoming = np.full(keys, NEVER)
        for table in range(count - 1, -1, -1):
            first = self._table(table)
            self._tables.seek(table * self._table_bytes)
            self._tables.write(upcoming.data)
            upcoming = np.where(first >= 0, first, upcoming)
        self._done = 0

    def of(self, block: Accesses) -> np.ndarray:
        """Return the time of the next use of each access of the next block, int64 [n]; NEVER if there is none."""
        next_use = np.empty(block.key.size, np.int64)
        upcoming = self._table(self._done).copy()
        self._now += _walk_back(block.key, block.bounds, self._now, self._sequential, upcoming, next_use)
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
def _walk_back(key, bounds, now, sequential, upcoming, next_use):
    """Turn upcoming int64 [keys], first uses after the block, into those from its start on; return its length in time.

    Fills next_use with what `upcoming` was just after each access (or event).
    """
    events = bounds.size - 1
    for event in range(events - 1, -1, -1):
        for i in range(bounds[event + 1] - 1, bounds[event] - 1, -1):
            next_use[i] = upcoming[key[i]]
            upcoming[key[i]] = now + (i if sequential else event)
    return key.size if sequential else events
