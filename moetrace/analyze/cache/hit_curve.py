"""Hits of LRU caches of every capacity, from one pass over a trace (see `caches.stack`)."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise

import numpy as np
import polars as pl

from moetrace.analyze.cache.accesses import accesses, layer_accesses
from moetrace.analyze.cache.kernels import stack
from moetrace.analyze.sizes import own_experts
from moetrace.jit.apart import result_of
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.format import Trace
from moetrace.trace.schema import PHASE_NAMES, Block

_COLUMNS = ("scope", "sequential", "phase", "capacity_experts", "accesses", "hits", "hit_rate")
_PART_IDS = 1 << 19  # of a block, each thread's, whose accesses and distances then stay in the caches
_AHEAD = 2  # blocks that wait to be counted
_MAX_COUNTS = 1 << 27  # of distances, in all layers: a gigabyte


def lru_curve(
    trace: Trace,
    *,
    scope: str = "global",
    sequential: bool = False,
    threads: int = 1,
    progress: Callable[[int], object] | None = None,
) -> pl.DataFrame:
    """Hit rate of an LRU cache at every capacity, from 1 on until everything fits, of experts of equal size.

    docs/cache.md, "Every capacity at once". With experts demanded at once, the rows begin with the least capacity of a
    pool that holds every event of the trace.

    Args:
        trace: The trace.
        scope: "global" is one cache; "layer" gives each layer its own.
        sequential: Demand experts one access at a time instead of together.
        threads: Threads, which share the layers with scope "layer".
        progress: A function that gets the number of rows since its last call.

    Returns:
        A frame with a row for each phase and capacity. Its columns are scope, sequential, phase ("all" and those that
        occur), capacity_experts (of all layers together; with scope "layer" the multiples of the number of layers),
        accesses, hits, hit_rate.

    Raises:
        UsageError: The scope is unknown, or there is no thread.
        MoetraceError: The trace is damaged or holds only counts.
    """
    if scope not in ("global", "layer"):
        raise UsageError(f"there is no scope {scope!r}; known are global, layer.")
    if threads < 1:
        raise UsageError(f"{threads} threads cannot work: give 1 or more.")
    if not has_curve(trace):
        raise MoetraceError(
            f"{trace.shown} has {trace.layers} x {trace.num_experts} experts, too many for a curve of every capacity."
        )
    pools = trace.layers if scope == "layer" else 1
    most = trace.layers * trace.num_experts // pools
    count = np.zeros((len(PHASE_NAMES), 1, most + 1), np.int64)
    largest = 0
    if scope == "layer":
        walk = _layer_walk(trace, sequential, threads, count)
    else:
        walk = _global_walk(trace, sequential, count)
    for rows, most_at_once in walk:
        largest = max(largest, most_at_once)
        if progress is not None:
            progress(rows)
    own = own_experts(trace)
    fits = int(own.max() if scope == "layer" else own.sum())  # from there on, everything does
    frames = [_frame(count.sum((0, 1)), "all", pools, largest, fits)]
    frames += [_frame(of.sum(0), name, pools, largest, fits) for name, of in zip(PHASE_NAMES, count, strict=True)]
    known = pl.concat([frame for frame in frames if frame["phase"][0] == "all" or frame["accesses"][0]])
    return known.with_columns(scope=pl.lit(scope), sequential=pl.lit(sequential)).select(*_COLUMNS)


def has_curve(trace: Trace) -> bool:
    """Whether a trace has not too many experts for `lru_curve`."""
    counts = len(PHASE_NAMES) * trace.layers * (trace.num_experts + 1)
    return counts <= _MAX_COUNTS and trace.num_experts <= stack.MAX_EXPERTS


def _frame(count: np.ndarray, phase: str, pools: int, largest: int, fits: int) -> pl.DataFrame:
    """The curve of one phase from its distances, int64 [keys + 1], the last of which are first accesses."""
    accessed, hits = int(count.sum()), np.cumsum(count[:-1])
    frame = pl.DataFrame({"capacity_experts": np.arange(1, hits.size + 1) * pools, "hits": hits})
    rate = pl.col("hits") / accessed if accessed else pl.lit(None, pl.Float64)
    frame = frame.with_columns(phase=pl.lit(phase), accesses=pl.lit(accessed, pl.Int64), hit_rate=rate)
    return frame[max(0, largest - 1) : fits]


class _Part:
    """Some layers of a trace, which one thread works on: with arrays of its own, which it keeps.

    Arrays that threads share, or allocate again for each block, keep them waiting for each other: two were 1.5 times as
    quick as one.
    """

    def __init__(self, trace: Trace, layers: tuple[int, int], sequential: bool) -> None:
        """Take layers layers[0] up to layers[1]."""
        self._trace, self._layers, self._sequential = trace, layers, sequential
        number = layers[1] - layers[0]
        self._stacks = stack.layer_stacks(number, trace.num_experts)
        self.count = np.zeros((len(PHASE_NAMES), number, trace.num_experts + 1), np.int64)
        self._key, self._distance = np.empty(0, np.int32), np.empty(0, np.int16)

    def add(self, block: Block) -> int:
        """Count the distances of the next block; return the most accesses of an event."""
        choices = len(block.experts) * self._trace.top_k * len(self._stacks.seen)
        if self._key.size < choices:
            self._key, self._distance = np.empty(choices, np.int32), np.empty(choices, np.int16)
        found = layer_accesses(self._trace, block, self._layers, sequential=self._sequential, buffer=self._key)
        distance = self._distance[: found.key.size]
        stack.layer_distances(self._stacks, found, self._trace.num_experts, self._sequential, distance)
        stack.count_distances(distance, found, len(self._stacks.seen), self.count)
        return 0 if self._sequential else int(np.diff(found.bounds).max(initial=0))


def _layer_walk(trace: Trace, sequential: bool, threads: int, count: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the rows of each block that is counted, and its most accesses of an event; at last, add to count.

    Threads never wait for each other: each goes its own way through the blocks that the caller's reads ahead of them.
    """
    layers, number = trace.layers, min(threads, trace.layers)
    edges = [layers * part // number for part in range(number + 1)]
    parts = [_Part(trace, own, sequential) for own in pairwise(edges)]
    waiting: deque[tuple[int, list[Future[int]]]] = deque()

    def finished() -> tuple[int, int]:
        rows, futures = waiting.popleft()
        return rows, max(map(result_of, futures))

    with ExitStack() as pools:
        pool = [pools.enter_context(ThreadPoolExecutor(1)) for _ in parts]
        for block in trace.blocks(max(1, number * _PART_IDS // (layers * trace.top_k))):
            counting = [own.submit(part.add, block) for own, part in zip(pool, parts, strict=True)]
            waiting.append((len(block.request), counting))
            if len(waiting) > _AHEAD:
                yield finished()
        while waiting:
            yield finished()
    for part in parts:
        count[:, 0] += part.count.sum(1)


def _global_walk(trace: Trace, sequential: bool, count: np.ndarray) -> Iterator[tuple[int, int]]:
    stacks = stack.global_stack(trace.layers * trace.num_experts)
    for block in accesses(trace, sequential=sequential):
        distance = np.empty(block.key.size, np.int32)
        stack.global_distances(stacks, block, sequential, distance)
        steps = block._replace(bounds=np.ascontiguousarray(block.bounds[:: trace.layers]))
        stack.count_distances(distance, steps, 1, count)
        yield block.rows, 0 if sequential else int(np.diff(block.bounds).max(initial=0))
