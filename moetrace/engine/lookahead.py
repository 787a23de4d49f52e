"""When an expert is demanded next, for policies that look ahead: one pass over the ids, kept in a temporary file."""

from collections.abc import Iterator

import numpy as np

from moetrace.engine.demand import Demand
from moetrace.engine.state import file_backed
from moetrace.jit.compile import kernel


class NextSteps:
    """The step of the next demand of every active expert, in the order of ``Demand``; -1 = none.

    The file is as large as 4 bytes an active expert, is mapped, and has no name: nothing is left behind.
    """

    def __init__(self, demands: Iterator[Demand], layers: int, experts: int, most: int):
        """``demands`` are the blocks of a trace in order; ``most`` bounds the active experts in all of them."""
        self._next = file_backed(most, np.dtype(np.int32))
        last = np.full((layers, experts), -1)
        done, step = 0, 0
        for demand in demands:
            _link(demand, layers, step, done, last, self._next)
            done += len(demand.expert)
            step += (len(demand.start) - 1) // layers
        self._done = 0

    def add_to(self, demand: Demand, steps: int, layers: int) -> Demand:
        """Return the next block's demand with its next steps; of it, ``steps`` are not only looked ahead at."""
        part = self._next[self._done : self._done + len(demand.expert)]
        self._done += int(demand.start[steps * layers])
        return demand._replace(next_step=np.array(part))


@kernel
def _link(demand, layers, first_step, first, last, next_step):
    """Write a block's next steps into next_step int32 from ``first`` on; last int64 [L, E] is where each was last."""
    for at in range(demand.start.size - 1):
        step, layer = first_step + at // layers, at % layers
        for i in range(demand.start[at], demand.start[at + 1]):
            next_step[first + i] = -1
            before = last[layer, demand.expert[i]]
            if before >= 0:
                next_step[before] = step
            last[layer, demand.expert[i]] = first + i
