"""The replay of a window of steps with a tape beside it; the rest of the trace runs through the replay without one."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from moetrace.engine.foresight import PLACES
from moetrace.engine.prefetch import BY_WORTH, HEAD, NO_PREFETCH, ONLINE, ORACLE, RELAYOUT, TAIL
from moetrace.engine.replay import Aside, Batch, Steps, Work
from moetrace.engine.tape import COUNT, COUNTS_A_LAYER, COUNTS_A_STEP, SLICE, new_tape
from moetrace.engine.tiers.tier_records import NO_GROUP, Tiers
from moetrace.engine.variants import variant


class Recording:
    """The record of the steps ``first`` to ``stop - 1`` of one policy; grows with the window, not with the trace.

    Attributes:
        first, stop: the window.
        slices: SLICE [n], step by step.
        counts: COUNT [n], in time order.
    """

    def __init__(self, first: int, stop: int) -> None:
        self.first, self.stop = first, stop
        self._slices: list[np.ndarray] = [np.zeros(0, SLICE)]
        self._counts: list[np.ndarray] = [np.zeros(0, COUNT)]

    @property
    def slices(self) -> np.ndarray:
        """All slices so far."""
        return np.concatenate(self._slices)

    @property
    def counts(self) -> np.ndarray:
        """All counts so far."""
        return np.concatenate(self._counts)

    def parts(self, batch: Batch, layers: int) -> Iterator[tuple[Batch, bool]]:
        """Cut a block into steps before the window, each step in it, and steps after; say which are to be recorded."""
        size = len(batch.steps.rows)
        inside = range(max(self.first - batch.steps.first, 0), min(self.stop - batch.steps.first, size))
        if not inside:
            yield batch, False
            return
        if inside.start > 0:
            yield cut(batch, 0, inside.start, layers), False
        for s in inside:
            yield cut(batch, s, s + 1, layers), True
        if inside.stop < size:
            yield cut(batch, inside.stop, size, layers), False

    def record(self, work: Work, hooks: tuple[Any, Any], tiers: Tiers | None, aside: Aside) -> None:
        """Replay a block of one step, and keep its record."""
        tape = new_tape(*_most_records(work, tiers))
        aside = aside._replace(tape=tape)
        variant(tiers, aside)(work, *hooks, tiers, aside)
        slices, counts = tape.ends
        if slices > len(tape.slices) or counts > len(tape.counts):
            raise RuntimeError(f"step {work.batch.steps.first} has more to note than its tape has room for.")
        self._slices.append(tape.slices[:slices].copy())
        self._counts.append(tape.counts[:counts].copy())


def cut(batch: Batch, first: int, stop: int, layers: int) -> Batch:
    """Steps ``first`` to ``stop - 1`` of a block; the steps ahead of them stay in reach."""
    rows, kv_tokens, phase, prompt_ends = (column[first:stop] for column in batch.steps[1:])
    return batch._replace(
        steps=Steps(batch.steps.first + first, rows, kv_tokens, phase, prompt_ends),
        demand=batch.demand._replace(start=batch.demand.start[first * layers :]),
        offset=batch.offset[first:],
    )


def _most_records(work: Work, tiers: Tiers | None) -> tuple[int, int]:
    """How many slices and counts a step can need. Unwritten parts take no memory: their pages stay untouched."""
    batch, setting, state = work.batch, work.setting[0], work.state
    layers, experts = state.cells.shape
    cells = layers * experts
    active = int(batch.demand.start[layers] - batch.demand.start[0])
    moved = 0
    if setting["prefetch"] != NO_PREFETCH:
        # Each time that the queue flows, one transfer may stop halfway; the others are complete, once each.
        moved = 2 * layers + 1 + int(state.queue.ends[TAIL] - state.queue.ends[HEAD])
        if setting["prefetch"] == ONLINE:
            moved += layers * min(setting["depth"], experts)
        elif setting["prefetch"] == BY_WORTH:
            moved += layers * PLACES
        elif setting["prefetch"] == ORACLE:
            start = batch.demand.start
            ahead = np.minimum(np.arange(layers) + 1 + setting["depth"], len(start) - 1)
            joining = start[ahead] - start[1 : layers + 1]
            moved += int(np.minimum(joining, cells).sum())
        elif setting["prefetch"] == RELAYOUT:
            moved += cells
    # An expert is fetched and runs; of a shared one, at most one in a layer, there is a part more. Layers have four
    # slices of their own, steps two.
    slices = 2 * active + moved + 5 * layers + 2
    if tiers is not None:
        # A disk also reads for prefetches, and may stop halfway while the link goes on. Each unit may have a slice of
        # an expert. Layers have four slices more. One move between layouts may stop halfway in a layer; the others are
        # complete: those under way before the step, and those that its layers begin.
        on_units = 1 if tiers.term["all_group"][0] == NO_GROUP else int(tiers.term["units"][0])
        slices += moved + 4 * layers + active * (1 + on_units) + 4 * layers
        slices += layers + 2 * cells if tiers.layout is not None else 0
    return slices, COUNTS_A_LAYER * layers + COUNTS_A_STEP
