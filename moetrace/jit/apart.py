"""Long calls, made where they do not keep the main thread from hearing signals.

Python runs the handler of a signal in the main thread, between two of its instructions: not while a kernel runs there,
and not reliably while Numba compiles there, whose library calls back into Python and drops what such a call raises.
"""

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

_Made = TypeVar("_Made")

# Numba and LLVM recurse deeply, and threads have 512 KiB on macOS, 128 KiB with musl. Untouched pages cost nothing.
_STACK_BYTES = 64 << 20
# How long the end of the process waits for threads that were left behind: a block takes well under a second.
_PATIENCE_S = 3.0
_LAST_WORD_S = 0.2  # for one whose work is done, or failed, but which has not ended yet
# Windows lets no signal interrupt a wait; nor does Polars, once imported, unless the wait has an end.
LOOK_UP_S = 1.0

_left: list[threading.Thread] = []


class Hands(Executor):
    """Threads that end with the block, unless an error ends it: then they are left running.

    The process does not wait long for those at its end: a function that never returns can't hold it.
    """

    def __init__(self, count: int) -> None:
        self._calls: SimpleQueue[tuple[Future, Callable[[], Any]] | None] = SimpleQueue()
        stack_bytes = threading.stack_size(_STACK_BYTES)
        try:
            self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
            for thread in self._threads:
                thread.start()
        finally:
            threading.stack_size(stack_bytes)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Have a function called by the next thread that is free."""
        future: Future = Future()
        self._calls.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end when all that was submitted is done; and wait for that, or not."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads if wait else []:
            thread.join()

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        self.shutdown(wait=kind is None)
        if kind is not None:
            _leave(self._threads)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001  the future raises it
                future.set_exception(error)
            else:
                future.set_result(result)
            del call, future, function


def heard(function: Callable[..., _Made], *arguments: Any) -> _Made:
    """Call a function; where this is the main thread, in another one, while this one waits and hears signals."""
    if not may_wait():
        return function(*arguments)
    with Hands(1) as hands:
        return result_of(hands.submit(function, *arguments))


def result_of(future: Future) -> Any:
    """Wait for the submitted call while handling signals; return its result, or raise its error."""
    while not future.done():
        wait([future], LOOK_UP_S)
    return future.result()


def may_wait() -> bool:
    """Whether this is the thread that hears signals, and may wait for another one.

    It may not while it imports a module: Numba imports the module of what it compiles, and would wait for it in turn.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is None


def end_process(code: object) -> None:
    """End the process with this exit code if there are threads that were left behind and are still busy."""
    for thread in _left:
        thread.join(_LAST_WORD_S)
    if any(thread.is_alive() for thread in _left):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _leave(threads: list[threading.Thread]) -> None:
    if not _left:
        atexit.register(_end_in_spite_of_them)
    _left.extend(threads)


def _end_in_spite_of_them() -> None:
    """Wait a little at the end of the process, then end it: compiled code must not run while Python takes it down."""
    for thread in _left:
        thread.join(_PATIENCE_S)
    end_process(1)
