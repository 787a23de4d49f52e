"""The loads that plans are made from: rows of each expert in the last steps, kept in as few sums as there must be."""

import numpy as np

from moetrace.engine.demand import Demand
from moetrace.jit.compile import kernel
from moetrace.spec.errors import UsageError

MOST_BYTES = 1 << 30  # of all sums


class Windows:
    """Sums of loads since each step at which a window begins; plans come at step ``window``, then each ``interval``."""

    def __init__(self, policy: str, window: int, interval: int, shape: tuple[int, int]) -> None:
        """Take how many steps a plan is made from, and after how many it is made again; 0: never.

        Raises UsageError if more sums of ``shape`` (layers, experts) are needed than memory should hold.
        """
        self.next_step: int | None = window
        self._window, self._interval, self._shape = window, interval, shape
        sums = 2 if interval == 0 else -(-window // interval) + 1
        if sums * shape[0] * shape[1] * 8 > MOST_BYTES:
            raise UsageError(
                f"Policy {policy}: a window of {window} steps and a plan every {interval} steps keep {sums} sums of "
                "loads, more than a GiB; set a longer interval or a shorter window."
            )
        self._sums: list[tuple[int, np.ndarray]] = []

    def add(self, demand: Demand, block: int, first: int, stop: int) -> None:
        """Count the steps from first to stop - 1, numbers in the block that begins with step ``block``."""
        while first < stop and self.next_step is not None:
            step = block + first
            if not self._sums or (self._interval and step % self._interval == 0):
                self._sums.append((step, np.zeros(self._shape, np.int64)))
            until = stop
            if self._interval:  # the next window may begin before
                until = min(stop, (step // self._interval + 1) * self._interval - block)
            _count(demand, first, until, self._sums[-1][1])
            first = until

    def take(self) -> np.ndarray:
        """Return the loads of the window that ends at ``next_step``, int64 [layers, experts], and go on to the next."""
        assert self.next_step is not None
        begin = self.next_step - self._window
        loads = np.zeros(self._shape, np.int64)
        for first, counted in self._sums:
            if first >= begin:
                loads += counted
        self.next_step = self.next_step + self._interval if self._interval else None
        if self.next_step is None:
            self._sums = []
        else:
            self._sums = [one for one in self._sums if one[0] >= self.next_step - self._window]
        return loads


@kernel(inline=False)
def _count(demand, first, stop, counted):
    """Add the rows of each active expert in some steps of a block to counted int64 [L, E]."""
    layers = counted.shape[0]
    for i in range(first * layers, stop * layers):
        own = counted[i % layers]
        for j in range(demand.start[i], demand.start[i + 1]):
            own[demand.expert[j]] += demand.rows[j]
