"""The values of a lane's steps that outlive a block if no figures of each step are needed: their seconds, and sums."""

import tempfile
import threading
from typing import NamedTuple, Self

import numpy as np


class _Filed(NamedTuple):
    """Numbers, float64, that lie in a store's file."""

    place: int  # of the first byte
    numbers: int


class StepStore:
    """Keeps numbers that many lanes put aside block by block; beyond a limit of memory, in a file that has no name.

    A context manager: it ends with the file.
    """

    def __init__(self, memory_bytes: int) -> None:
        """Take the limit."""
        self._left_bytes, self._end, self._file = memory_bytes, 0, None
        self._lock = threading.Lock()

    def put(self, numbers: np.ndarray) -> "np.ndarray | _Filed":
        """Keep a copy of float64 [n]; return what `get` wants. A full disk raises OSError."""
        numbers = np.array(numbers, np.float64)
        with self._lock:
            if numbers.nbytes <= self._left_bytes:
                self._left_bytes -= numbers.nbytes
                return numbers
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed at the end
            filed = _Filed(self._end, numbers.size)
            self._file.seek(self._end)
            self._file.write(numbers.data)
            self._end += numbers.nbytes
            return filed

    def get(self, kept: "np.ndarray | _Filed") -> np.ndarray:
        """Return the stored values."""
        if isinstance(kept, np.ndarray):
            return kept
        with self._lock:
            assert self._file is not None
            self._file.seek(kept.place)
            return np.frombuffer(self._file.read(8 * kept.numbers), np.float64)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


class FoldedSteps:
    """The steps of one lane: the seconds of each, which percentiles need, and of the rest what a summary needs.

    Sums are taken over all steps at once, as without folding: the last bits are the same.
    """

    def __init__(self, store: StepStore) -> None:
        """Take where numbers are kept."""
        self._store = store
        self._duration_s: list = []
        self._prefetch_bytes: list = []  # an int stands for this number of zeros
        self._wait: tuple[int, float] | None = None  # one step of a replay waits, if any
        self.late = 0

    def add(self, first: int, steps: np.ndarray) -> None:
        """Add the log of a block, STEP [n], whose first step is `first`."""
        self._duration_s.append(self._store.put(steps["duration_s"]))
        prefetches = np.any(steps["prefetch_bytes"])
        self._prefetch_bytes.append(self._store.put(steps["prefetch_bytes"]) if prefetches else len(steps))
        for step in np.flatnonzero(steps["wait_s"]).tolist():
            self._wait = first + step, float(steps["wait_s"][step])
        self.late += int(np.sum(steps["late"]))

    @property
    def duration_s(self) -> np.ndarray:
        """Seconds of each step, float64 [steps]; read again each time."""
        return np.concatenate([np.zeros(0), *map(self._store.get, self._duration_s)])

    @property
    def busy_s(self) -> np.ndarray:
        """The same without what a step waited for."""
        busy_s = self.duration_s
        if self._wait is not None:
            busy_s[self._wait[0]] -= self._wait[1]
        return busy_s

    @property
    def prefetch_bytes(self) -> float:
        """Prefetched bytes, in total."""
        parts = (np.zeros(kept) if isinstance(kept, int) else self._store.get(kept) for kept in self._prefetch_bytes)
        if all(isinstance(kept, int) for kept in self._prefetch_bytes):
            return 0.0
        return float(np.sum(np.concatenate(list(parts))))
