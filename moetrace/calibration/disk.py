"""Times of reads from a disk, past the page cache."""

import contextlib
import errno
import mmap
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from time import perf_counter

from moetrace.calibration.repeated_times import repeated
from moetrace.spec.errors import MoetraceError

FILE_BYTES = 256 << 20
READ_BYTES = (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
_TIMES = 9
# Windows and macOS lack one or the other. Without `preadv` a read has no position; without O_DIRECT or posix_fadvise it
# may come from memory.
_CAN_READ = hasattr(os, "preadv") and (hasattr(os, "O_DIRECT") or hasattr(os, "posix_fadvise"))
NO_DISK = "" if _CAN_READ else "Reads past the page cache need Linux or FreeBSD, so no disk was measured."


def disk_times(folder: str | Path | None = None) -> Iterator[tuple[int, float, float]]:
    """Yield bytes, median seconds and scatter of reads at random places of a file of 256 MiB, which is then removed.

    Reads go past the page cache (O_DIRECT) where the file system allows it; elsewhere its pages are given up first.

    Raises:
        MoetraceError: The folder cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".moetrace-", suffix=".tmp") as file:
            for _ in range(FILE_BYTES >> 20):
                file.write(secrets.token_bytes(1 << 20))  # bytes that no file system compresses
            file.flush()
            os.fsync(file.fileno())
            yield from _times(file.name)
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise MoetraceError(f"Cannot measure the disk of {where}: {error.strerror or error}.") from None


def _times(path: str) -> Iterator[tuple[int, float, float]]:
    descriptor = _opened(path)
    buffer = mmap.mmap(-1, max(READ_BYTES))  # aligned to a page, as O_DIRECT wants it
    try:
        draw = Random(0)
        for size in READ_BYTES:
            times = []
            for _ in range(_TIMES):
                offset = draw.randrange(FILE_BYTES // size) * size
                _give_up(descriptor, offset, size)
                start = perf_counter()
                _read(descriptor, memoryview(buffer)[:size], offset)
                times.append(perf_counter() - start)
            median_s, scatter = repeated(times)
            yield size, median_s, scatter
    finally:
        os.close(descriptor)


def _opened(path: str) -> int:
    flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EINVAL:  # tmpfs and some others have no direct reads
            raise
        return os.open(path, os.O_RDONLY)


def _give_up(descriptor: int, offset: int, size: int) -> None:
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def _read(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise OSError(0, "the file ended early")
        done += count
