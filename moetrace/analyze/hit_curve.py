"""What LRU caches of every capacity hit, from one pass over a trace (see `caches.stack`)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import polars as pl

from moetrace.analyze.accesses import Accesses, accesses
from moetrace.analyze.caches import stack
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.format import Trace
from moetrace.trace.schema import PHASE_NAMES

_COLUMNS = ("scope", "sequential", "phase", "capacity_experts", "accesses", "hits", "hit_rate")
_BLOCK_IDS = 1 << 19  # of a block, whose accesses and distances then stay in the caches: 4.5 ns an access, not 5.9
_MAX_COUNTS = 1 << 27  # of distances, in all layers: a gigabyte


def lru_curve(
    trace: Trace,
    *,
    scope: str = "global",
    sequential: bool = False,
    threads: int = 1,
    progress: Callable[[int], object] | None = None,
) -> pl.DataFrame:
    """Return a row for each phase and capacity, from 1 on until everything fits, of experts of equal size.

    Columns: scope, sequential, phase ("all" and those that occur), capacity_experts (of all layers together; with scope
    "layer" the multiples of the number of layers), accesses, hits, hit_rate. At once, the rows begin with the least
    capacity of a pool that holds every event of the trace. With scope "layer", several threads share the layers.

    Raises UsageError for an unknown scope or no thread; MoetraceError if the trace is damaged or holds counts only.
    """
    if scope not in ("global", "layer"):
        raise UsageError(f"there is no scope {scope!r}; known are global, layer.")
    if threads < 1:
        raise UsageError(f"{threads} threads cannot work: give 1 or more.")
    if not has_curve(trace):
        raise MoetraceError(
            f"{trace.path or 'the trace'} has {trace.layers} x {trace.num_experts} experts, too many for a curve of "
            f"every capacity."
        )
    pools = trace.layers if scope == "layer" else 1
    most = trace.layers * trace.num_experts // pools
    count = np.zeros((len(PHASE_NAMES), pools, most + 1), np.int64)
    largest = 0
    if scope == "layer":
        walk = _layer_walk(trace, sequential, threads, count)
    else:
        walk = _global_walk(trace, sequential, count)
    for block in walk:
        if not sequential:
            largest = max(largest, int(np.diff(block.bounds).max(initial=0)))
        if progress is not None:
            progress(block.rows)
    frames = [_frame(count.sum((0, 1)), "all", pools, largest)]
    frames += [_frame(of.sum(0), name, pools, largest) for name, of in zip(PHASE_NAMES, count, strict=True)]
    known = pl.concat([frame for frame in frames if frame["phase"][0] == "all" or frame["accesses"][0]])
    return known.with_columns(scope=pl.lit(scope), sequential=pl.lit(sequential)).select(*_COLUMNS)


def has_curve(trace: Trace) -> bool:
    """Whether a trace has not too many experts for `lru_curve`."""
    counts = len(PHASE_NAMES) * trace.layers * (trace.num_experts + 1)
    return counts <= _MAX_COUNTS and trace.num_experts <= stack.MAX_EXPERTS


def _frame(count: np.ndarray, phase: str, pools: int, largest: int) -> pl.DataFrame:
    """The curve of one phase from its distances, int64 [keys + 1], the last of which are first accesses."""
    accessed, hits = int(count.sum()), np.cumsum(count[:-1])
    frame = pl.DataFrame({"capacity_experts": np.arange(1, hits.size + 1) * pools, "hits": hits})
    rate = pl.col("hits") / accessed if accessed else pl.lit(None, pl.Float64)
    frame = frame.with_columns(phase=pl.lit(phase), accesses=pl.lit(accessed, pl.Int64), hit_rate=rate)
    return frame[max(0, largest - 1) :]


def _layer_walk(trace: Trace, sequential: bool, threads: int, count: np.ndarray) -> Iterator[Accesses]:
    """Yield the blocks of a trace when their distances are counted; the threads also read the next one meanwhile."""
    layers, experts = trace.layers, trace.num_experts
    stacks = stack.layer_stacks(layers, experts)
    # One thread reads for about as long as it counts one of these, two of which the others count.
    number = 2 * threads - 1
    unit = 8 if layers >= 8 * number else 1  # the kernel takes eight layers in turn
    edges = [layers * part // number // unit * unit for part in range(number)] + [layers]
    parts = [(first, stop) for first, stop in pairwise(edges) if first < stop]

    def work(block: Accesses, distance: np.ndarray, part: tuple[int, int]) -> None:
        stack.layer_distances(stacks, block, experts, part, sequential, distance)
        stack.count_distances(distance, block, layers, part, count)

    blocks = accesses(trace, sequential=sequential, block_rows=max(1, _BLOCK_IDS // max(1, layers * trace.top_k)))
    buffer = np.empty(0, np.int16)  # kept: new memory for each block would take as long as half of the counting
    with ThreadPoolExecutor(threads) as pool:
        reading = pool.submit(next, blocks, None)
        while (block := reading.result()) is not None:
            reading = pool.submit(next, blocks, None)
            if buffer.size < block.key.size:
                buffer = np.empty(block.key.size, np.int16)
            counting = [pool.submit(work, block, buffer[: block.key.size], part) for part in parts]
            for future in counting:
                future.result()
            yield block


def _global_walk(trace: Trace, sequential: bool, count: np.ndarray) -> Iterator[Accesses]:
    stacks = stack.global_stack(trace.layers * trace.num_experts)
    for block in accesses(trace, sequential=sequential):
        distance = np.empty(block.key.size, np.int32)
        stack.global_distances(stacks, block, sequential, distance)
        steps = block._replace(bounds=np.ascontiguousarray(block.bounds[:: trace.layers]))
        stack.count_distances(distance, steps, 1, (0, 1), count)
        yield block
