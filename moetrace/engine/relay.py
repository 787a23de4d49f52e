"""Lanes and bounds on their way through the blocks of a trace, in several threads.

Each goes on to the next block as soon as it is ready for it: if all waited for the slowest at the end of each block, a
thread would be idle for half a lane's time, a block.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from time import thread_time

from moetrace.engine.replay import Batch
from moetrace.jit.apart import result_of
from moetrace.spec.errors import MoetraceError

UNDER_WAY = 2  # blocks: memory holds them, and the one that is being decoded


@dataclass
class Walker:
    """One that takes all blocks in order.

    Attributes:
        group: Walkers of a group end together, where one fails; None: it cannot fail.
        advance: Replays a block; only a MoetraceError is a failure.
        last_s: Processor time that the last block took.
        coming: The blocks that it has not come through.
    """

    group: int | None
    advance: Callable[[Batch], None]
    last_s: float = 0.0
    coming: deque["_Given"] = field(default_factory=deque)


@dataclass
class _Given:
    number: int
    batch: Batch
    left: int  # walkers that have not come through
    ended: Future = field(default_factory=Future)


class Relay:
    """Gives blocks to walkers, in threads, or without an executor in this one.

    Attributes:
        errors: Of each group that failed, the MoetraceError of its first block that failed, and there of the first
            walker in order: it does not depend on threads.
    """

    def __init__(self, walkers: Sequence[Walker], pool: Executor | None) -> None:
        """Take who runs, and where."""
        self._walkers, self._pool, self._lock = walkers, pool, threading.Lock()
        self._under_way: deque[_Given] = deque()
        self._blocks = 0
        self._failed: dict[int | None, tuple[int, int, MoetraceError]] = {}

    @property
    def errors(self) -> dict[int | None, MoetraceError]:
        """See the class."""
        with self._lock:
            return {group: error for group, (_, _, error) in self._failed.items()}

    @property
    def under_way(self) -> int:
        """Blocks that were given and have not been seen to end."""
        return len(self._under_way)

    def give(self, batch: Batch) -> None:
        """Have all walkers take a block; return once few enough blocks are under way. Raises what a walker raises."""
        block = _Given(self._blocks, batch, len(self._walkers))
        self._blocks += 1
        if not self._walkers:
            return
        self._under_way.append(block)
        with self._lock:
            idle = [i for i, walker in enumerate(self._walkers) if not walker.coming]
            for walker in self._walkers:
                walker.coming.append(block)
        # Who took longest goes first: begun last, it would keep one thread when the others have nothing left to do.
        for i in sorted(idle, key=lambda i: -self._walkers[i].last_s):
            self._submit(i)
        self._wait(UNDER_WAY - 1)

    def finish(self) -> None:
        """Wait until all blocks are done."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        while self._under_way and (len(self._under_way) > most or self._under_way[0].ended.done()):
            result_of(self._under_way[0].ended)
            self._under_way.popleft()

    def _submit(self, i: int) -> None:
        if self._pool is None:
            self._take_next(i)
        else:
            self._pool.submit(self._take_next, i)

    def _take_next(self, i: int) -> None:
        """Let a walker take its next block, and come again, behind the others, if there is one more."""
        walker = self._walkers[i]
        with self._lock:
            block = walker.coming[0]
            failed = self._failed.get(walker.group)
        try:
            if failed is None or failed[0] >= block.number:
                begun_s = thread_time()
                walker.advance(block.batch)
                walker.last_s = thread_time() - begun_s
        except MoetraceError as error:
            with self._lock:
                known = self._failed.get(walker.group)
                if known is None or (block.number, i) < known[:2]:
                    self._failed[walker.group] = (block.number, i, error)
        except BaseException as error:  # who waits for the block raises it
            if self._pool is None:
                raise
            if not block.ended.done():
                block.ended.set_exception(error)
            return
        with self._lock:
            walker.coming.popleft()
            block.left -= 1
            is_last, more = block.left == 0, bool(walker.coming)
        if more:
            self._submit(i)
        if is_last and not block.ended.done():
            block.ended.set_result(None)
