"""Tell the user why a first run takes seconds: kernels compile, which later runs find in Numba's cache."""

import contextlib
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator

# Of compiling before a word is said, and between one word and the next. A kernel is loaded in some 20 ms.
_MOMENT_S, _AGAIN_S, _LOADED_S = 1.0, 10.0, 0.2

_FIRST = "moetrace: compiling for this machine, as a first run does; `moetrace warm` does it for all commands at once."


class _Clock:
    """Seconds that this process compiled so far, and what was said of it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # Numba compiles one kernel at a time, but threads may wait for one another
        self.depth, self.kernels, self.seconds, self.said_s = 0, 0, 0.0, 0.0

    def say(self, begun: float) -> None:
        """Say that, or how long, it has been compiling."""
        with self.lock:
            if self.depth == 0 or sys.stderr is None:
                return
            seconds = self.seconds + time.perf_counter() - begun
            still = f"moetrace: still compiling; {self.kernels} kernels and {seconds:.0f} s so far."
            line = still if self.said_s else _FIRST
            self.said_s = max(seconds, _MOMENT_S)
            self.watch(begun)
        print(line, file=sys.stderr, flush=True)

    def watch(self, begun: float) -> None:
        """Have something said when it is time; the lock is held."""
        due_s = self.said_s + _AGAIN_S if self.said_s else _MOMENT_S
        wait_s = due_s - self.seconds - (time.perf_counter() - begun)
        self.timer = threading.Timer(max(0.0, wait_s), self.say, (begun,))
        self.timer.daemon = True
        self.timer.start()


_clock = _Clock()


@contextlib.contextmanager
def announced() -> Iterator[None]:
    """Compile, or load, a kernel inside the block: what takes more than a moment is said on stderr, and again later.

    Of a pool of processes the first one speaks.
    """
    if multiprocessing.parent_process() is not None and not multiprocessing.current_process().name.endswith("-1"):
        yield
        return
    begun = time.perf_counter()
    with _clock.lock:
        _clock.depth += 1
        if _clock.depth == 1:
            _clock.watch(begun)
    try:
        yield
    finally:
        with _clock.lock:
            _clock.depth -= 1
            if _clock.depth == 0:
                _clock.timer.cancel()
                took_s = time.perf_counter() - begun
                if took_s >= _LOADED_S:
                    _clock.kernels += 1
                    _clock.seconds += took_s
