"""Caches that start cold with each request (`scope = "request"`): when they are emptied, and how."""

from collections.abc import Iterator, Sequence

import numpy as np

from moetrace.engine.prefetch import COMPLETE, DONE_BYTES, HEAD, TAIL
from moetrace.engine.recording import cut
from moetrace.engine.replay import Batch, State
from moetrace.engine.schedule import Requests
from moetrace.engine.state import Log
from moetrace.spec.policy import PolicySpec


def cold_steps(requests: Requests, steps: int) -> np.ndarray:
    """Return the steps, int64 [n], before which no request is under way: none has rows both before and from there on.

    The first step of a trace is not among them: caches are empty then.
    """
    change = np.zeros(steps + 1, np.int64)
    there = requests.first_step >= 0
    np.add.at(change, requests.first_step[there] + 1, 1)
    np.add.at(change, requests.last_step[there] + 1, -1)
    return np.flatnonzero(np.cumsum(change)[:steps] == 0)[1:]


class ColdStarts:
    """A policy's state before the first step, to which it returns before each of ``steps``, int64 [n].

    ``layout``: where experts are and are about to be, if a prefetch moves them.
    """

    def __init__(self, steps: np.ndarray, state: State, layout: Sequence[np.ndarray]) -> None:
        self.steps = steps
        cache = [part for part in state.cache if isinstance(part, np.ndarray)]
        self._known = [(part, part.copy()) for part in (state.cells, *cache, *layout)]

    def parts(self, batch: Batch, layers: int) -> Iterator[tuple[Batch, bool]]:
        """Cut a block where caches are emptied; say of each part whether they are empty before it."""
        first, size = batch.steps.first, len(batch.steps.rows)
        inside = self.steps[np.searchsorted(self.steps, first) : np.searchsorted(self.steps, first + size)] - first
        edges = np.unique(np.concatenate(([0], inside, [size])))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            yield cut(batch, start, stop, layers), bool((inside == start).any())

    def empty(self, state: State, log: Log) -> None:
        """Empty caches and queue, and forget what the residency learned; prefetches that were not run are wasted."""
        queue = state.queue
        log.tally["wasted"] += int(state.cache.fresh.sum()) + int((queue.moved_bytes > DONE_BYTES).sum())
        for part, start in self._known:
            part[:] = start
        state.scratch.own["memory"] = 0.0  # of a user's function, as what it keeps with an expert
        queue.place[:], queue.moved_bytes[:], queue.late[:] = -1, 0.0, 0
        queue.ends[[HEAD, TAIL, COMPLETE]] = 0


def cold_starts_of(
    policy: PolicySpec, requests: Requests, steps: int, state: State, layout: Sequence[np.ndarray]
) -> ColdStarts | None:
    """Return the cold starts of a policy in a trace of ``steps`` steps; None if it never starts cold."""
    return ColdStarts(cold_steps(requests, steps), state, layout) if policy.scope == "request" else None
