"""Tell the user why a first run takes seconds: kernels compile, which later runs find in Numba's cache."""

import contextlib
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator

# Processor seconds of compiling before a word is said, and between one word and the next; a kernel is loaded in 0.02.
_MOMENT_S, _AGAIN_S, _LOADED_S = 1.0, 10.0, 0.2
_LOOK_S = 0.25

_FIRST = "moetrace: compiling for this machine, as a first run does; `moetrace warm` does it for all commands at once."


class _Compiling:
    """How long this process has been compiling, and the notes printed so far."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # Numba compiles one kernel at a time, but threads may wait for one another
        self.depth, self.kernels, self.seconds, self.said_s = 0, 0, 0.0, 0.0
        self.begun_s = 0.0

    def so_far_s(self) -> float:
        """Seconds so far, with those of the kernel at hand."""
        return self.seconds + (time.process_time() - self.begun_s if self.depth else 0.0)

    def watch(self, ends: threading.Event) -> None:
        """Print the notes that are due until `ends` is set: a thread's work while a kernel compiles."""
        while not ends.wait(_LOOK_S):
            with self.lock:
                seconds = self.so_far_s()
                if ends.is_set() or seconds < (self.said_s + _AGAIN_S if self.said_s else _MOMENT_S):
                    continue
                still = f"moetrace: still compiling; {self.kernels} kernels and {seconds:.0f} s so far."
                line = still if self.said_s else _FIRST
                self.said_s = seconds
            if sys.stderr is not None:
                print(line, file=sys.stderr, flush=True)


_compiling = _Compiling()


@contextlib.contextmanager
def announced() -> Iterator[None]:
    """Compile, or load, a kernel inside the block: a note on stderr says if it takes more than a moment, and again
    later.

    In a pool of processes only the first one prints.
    """
    if multiprocessing.parent_process() is not None and not multiprocessing.current_process().name.endswith("-1"):
        yield
        return
    with _compiling.lock:
        _compiling.depth += 1
        is_first = _compiling.depth == 1
        if is_first:
            _compiling.begun_s = time.process_time()
    ends = threading.Event()
    if is_first:
        threading.Thread(target=_compiling.watch, args=(ends,), daemon=True).start()
    try:
        yield
    finally:
        ends.set()
        with _compiling.lock:
            _compiling.depth -= 1
            if is_first:
                took_s = time.process_time() - _compiling.begun_s
                if took_s >= _LOADED_S:
                    _compiling.kernels += 1
                    _compiling.seconds += took_s
