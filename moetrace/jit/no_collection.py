"""Work that makes many objects and no garbage in cycles, done without Python looking for cycles all the while."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_held: list[bool] = []  # for each block that has begun and not ended: whether the first found the search enabled


@contextmanager
def no_collection() -> Iterator[None]:
    """Hold the search for cycles, in all threads, until the last of the blocks that overlap ends."""
    with _lock:
        _held.append(_held[0] if _held else gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            enabled = _held.pop()
            if enabled and not _held:
                gc.enable()
