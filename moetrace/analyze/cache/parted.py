"""Caches that are emptied between requests, and caches of unequal parts: made of those that are neither."""

from collections.abc import Callable, Iterator

import numpy as np

from moetrace.analyze.cache.accesses import Accesses
from moetrace.analyze.cache.kernels.replays import Budget, Replay


def cold_replay(make: Callable[[], Replay], cold: np.ndarray, layers: int) -> Replay:
    """Return a replay that ``make`` creates again before each step of ``cold``, int64 [n] in order."""
    state = {"replay": make(), "steps": 0}

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        steps = block.phase.size
        inside = cold[np.searchsorted(cold, state["steps"]) : np.searchsorted(cold, state["steps"] + steps)]
        inside = inside - state["steps"]
        edges = np.unique(np.concatenate(([0], inside, [steps])))
        parts = []
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if (inside == start).any():
                state["replay"] = make()
            part, own = _part(block, start, stop, layers)
            parts.append([hit.copy() for hit in state["replay"](part, next_use[own] if next_use.size else next_use)])
        state["steps"] += steps
        yield from (np.concatenate(hits) for hits in zip(*parts, strict=True))

    return replay


def _part(block: Accesses, start: int, stop: int, layers: int) -> tuple[Accesses, slice]:
    """Return steps ``start`` to ``stop - 1`` of a block, as far as a replay looks at them, and where they lie in it."""
    bounds = block.bounds[start * layers : stop * layers + 1]
    own = slice(int(bounds[0]), int(bounds[-1]))
    part = block._replace(
        first=block.first + own.start,
        key=block.key[own],
        bounds=bounds - own.start,
        phase=block.phase[start:stop],
        step_rows=block.step_rows[start:stop],
        chosen_by=block.chosen_by[own],
    )
    return part, own


def by_layer_replay(
    make: Callable[[list[Budget]], Replay], amounts: list[np.ndarray], layers: int, experts: int
) -> Replay:
    """Return a replay of caches of ``amounts``, int64 [L] each: from caches of equal parts, of each the layers it fits.

    Layers do not share anything, so a layer hits what it would if all had as much as it has.
    """
    sizes = np.unique(np.concatenate([np.zeros(0, np.int64), *amounts]))
    equal = make([Budget(int(size), False) for size in sizes])

    def replay(block: Accesses, next_use: np.ndarray) -> Iterator[np.ndarray]:
        layer = block.key // experts
        hits = np.zeros((len(amounts), block.key.size), np.uint8)
        for size, hit in zip(sizes, equal(block, next_use), strict=True):
            for own, amount in zip(hits, amounts, strict=True):
                own |= hit & (amount == size)[layer]
        yield from hits

    return replay
