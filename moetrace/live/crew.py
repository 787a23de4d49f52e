"""Several requests at a time: threads that ask, and one that takes what they bring."""

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import TypeVar

from moetrace.jit.apart import LOOK_UP_S
from moetrace.live.exchange import LONGEST_WAIT_S, RequestError
from moetrace.spec.errors import MoetraceError

Task = TypeVar("Task")
FIRST_WAIT_S = 0.5  # before a request is tried again; then twice as long each time, up to LONGEST_WAIT_S
_END_S = 2.0  # that threads have to end


def in_parallel(
    tasks: Iterable[Task], work: Callable[[Task], bytes], threads: int, stop: Callable[[], object]
) -> Iterator[tuple[Task, bytes | MoetraceError]]:
    """Yield each task with what `work` returned or raised, as they end; no more than `threads` are under way.

    A task is taken from `tasks` in this thread when there is room. However this ends, `stop` is called, which must make
    `work` return wherever it is.
    """
    todo: SimpleQueue[Task | None] = SimpleQueue()
    done: SimpleQueue[tuple[Task, bytes | BaseException]] = SimpleQueue()

    def run() -> None:
        while (task := todo.get()) is not None:
            try:
                done.put((task, work(task)))
            except BaseException as error:  # noqa: BLE001 - is raised where it is taken
                done.put((task, error))

    waiting, under_way = iter(tasks), 0
    started: list[threading.Thread] = []
    try:
        while True:
            while under_way < threads and (task := next(waiting, None)) is not None:
                if len(started) <= under_way:
                    started.append(threading.Thread(target=run, daemon=True))
                    started[-1].start()
                todo.put(task)
                under_way += 1
            if not under_way:
                return
            try:
                task, result = done.get(timeout=LOOK_UP_S)
            except Empty:  # once more, since not every wait hears Ctrl-C
                continue
            under_way -= 1
            if isinstance(result, BaseException) and not isinstance(result, MoetraceError):
                raise result
            yield task, result
    finally:
        stop()
        for _ in started:
            todo.put(None)
        for thread in started:
            thread.join(_END_S)


def persistent(ask: Callable[[], bytes], retries: int, stopped: threading.Event) -> bytes:
    """Return the result of `ask`, at the latest after `retries` further tries; raises RequestError."""
    wait_s = FIRST_WAIT_S
    for left in range(retries, -1, -1):
        try:
            return ask()
        except RequestError as error:
            if not error.again or not left or stopped.wait(max(wait_s, error.wait_s or 0)):
                raise
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)
    raise AssertionError("the last try returns or raises")
