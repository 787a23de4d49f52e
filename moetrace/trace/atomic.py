"""A file that appears whole or not at all, in a form that a C library can write to without ever seeing an error."""

import contextlib
import errno
import io
import os
import secrets
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from moetrace.spec.errors import MoetraceError, UsageError


class AtomicFile(io.RawIOBase):
    """A new file beside `path` that takes its place on `commit`, and is removed by `discard`.

    For HDF5, which crashes the process when it closes a file that it could not write (a full disk): here, writing
    never fails. The first refusal of the system is kept in `error`, and from then on nothing is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = real_path(path)  # through a symlink: replace what it points to, not the link
        if self._path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        if self._path.exists() and not self._path.is_file():
            raise OSError(0, "it is not an ordinary file")
        self._temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.tmp")
        self._file = self._temporary.open("x+b", buffering=0)
        self._position = self._size = 0
        self.error: OSError | None = None

    def readable(self) -> bool:
        """Yes: HDF5 reads back what it wrote."""
        return True

    def writable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The place of the next read or write, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to `offset` from the start or from the end."""
        self._position = offset + (self._size if whence == os.SEEK_END else 0)
        return self._position

    def readinto(self, buffer) -> int:
        """Read what was written, or zeros where nothing could be."""
        view = memoryview(buffer).cast("B")
        self._file.seek(self._position)
        count = self._file.readinto(view) or 0
        view[count:] = bytes(len(view) - count)
        self._position += len(view)
        return len(view)

    def write(self, data) -> int:
        """Write all of `data`, or keep the system's error and pretend."""
        view = memoryview(data).cast("B")
        size, rest = len(view), view
        try:
            self._file.seek(self._position)
            while self.error is None and len(rest):
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
        self._position += size
        self._size = max(self._size, self._position)
        return size

    def truncate(self, size: int | None = None) -> int:
        """Cut or extend the file to `size`."""
        self._size = self._position if size is None else size
        try:
            if self.error is None:
                self._file.truncate(self._size)
        except OSError as error:
            self.error = error
        return self._size

    def raise_error(self) -> None:
        """Raise what the system refused, if it did."""
        if self.error is not None:
            raise self.error

    def commit(self, sync: bool = True) -> None:
        """Make the file what is at `path`, on disk and not only in memory; raise OSError if that fails.

        Without `sync` a crash of the machine (not of the process) may leave an empty file.
        """
        self.raise_error()
        if sync:
            os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        if not sync:
            return
        with contextlib.suppress(OSError):  # not every system lets a folder be synced
            descriptor = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def discard(self) -> None:
        """Remove the file; what is at `path` stays as it was."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def real_path(path: Path) -> Path:
    """Where `path` leads through symlinks; a link that leads to itself stays, and whatever opens it says so."""
    return Path(os.path.realpath(path))  # Path.resolve raises a RuntimeError for such a link before Python 3.13


def check_writable(path: Path) -> None:
    """Raise a MoetraceError now, not after long work, if nothing can be written at `path`."""
    try:
        AtomicFile(path).discard()
    except OSError as error:
        raise _refused(path, error) from error


@contextlib.contextmanager
def whole_file(path: Path, sync: bool = True) -> Iterator[AtomicFile]:
    """Yield a file that takes its place at `path` when the block ends well; on any error nothing there changes.

    `sync` as in `AtomicFile.commit`. Raises MoetraceError if the system refuses (a full disk).
    """
    try:
        output = AtomicFile(path)
    except OSError as error:
        raise _refused(path, error) from error
    try:
        yield output
        try:
            output.commit(sync)
        except OSError as error:
            output.error = error
            raise
    except BaseException as error:
        output.discard()
        if output.error is not None:
            raise _refused(path, output.error) from error
        raise


def write_whole(files: Mapping[Path, bytes]) -> None:
    """Write files, each whole or not at all, and none if the system refuses one of them (MoetraceError)."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(whole_file(path)) for path in files]
        for file, data in zip(opened, files.values(), strict=True):
            file.write(data)
        for file in opened:
            file.raise_error()


def _refused(path: Path, error: OSError) -> MoetraceError:
    missing = error.errno == errno.ENOENT and not real_path(path).parent.is_dir()
    why = f"there is no folder {path.parent}" if missing else error.strerror or error
    return MoetraceError(f"{path} could not be written: {why}; nothing was changed.")


def keep_inputs(path: Path, inputs: Iterable[Path | None]) -> None:
    """Raise a UsageError if writing to `path` would replace one of the `inputs`."""
    for given in inputs:
        if given is None:
            continue
        if real_path(path) == real_path(given) or (path.exists() and given.exists() and path.samefile(given)):
            raise UsageError(f"{path} is what is read: choose another name for what is written.")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends: inside HDF5's calls to a Python file it would count as a failed write."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # only the main thread gets KeyboardInterrupt
        return
    held: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(*held[0])
