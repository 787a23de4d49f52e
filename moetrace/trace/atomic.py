"""A file that appears whole or not at all, in a form that a C library can write to without ever seeing an error."""

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import signal
import stat
import threading
import time
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.ordinary_file import is_folder

STALE_S = 24 * 3600.0  # after which what a killed run left is removed


class AtomicFile(io.RawIOBase):
    """A new file beside `path` that takes its place on `commit`, and is removed by `discard`.

    For HDF5, which crashes the process when it closes a file that it could not write (a full disk): here, writing
    never fails. The first refusal of the system is kept in `error`, and from then on nothing is written.

    A `path` that the user names may be a symlink: its target is replaced. A name inside a folder may come from
    a stranger: without `follow` the file takes the place of the link itself.
    """

    def __init__(self, path: Path, *, follow: bool = True) -> None:
        self._path = real_path(path) if follow else path
        if follow and self._path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        # Without `follow` a file of any kind with the name is replaced and not opened; a folder is not.
        if (self._path.exists() and not self._path.is_file()) if follow else is_folder(self._path):
            raise OSError(0, "it is not an ordinary file")
        if follow:  # otherwise the owner of the folder does it, once for all of its files
            remove_stale(self._path.parent, temporary_of(re.escape(self._path.name)))
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
        """Read the written bytes, or zeros where nothing could be read."""
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
        """Put the file at `path`, on disk and not only in memory; raise OSError if that fails.

        Without `sync` a crash of the machine (not of the process) may leave an empty file.
        """
        self.raise_error()
        if sync:
            os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        if not sync:
            return
        sync_folder(self._path.parent)

    def discard(self) -> None:
        """Remove the file; a file at `path` stays unchanged."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def real_path(path: Path) -> Path:
    """Where `path` leads through symlinks; a link that leads to itself stays, and opening it fails with that reason."""
    return Path(os.path.realpath(path))  # Path.resolve raises a RuntimeError for such a link before Python 3.13


def check_writable(path: Path, *, follow: bool = True) -> None:
    """Raise a MoetraceError now, not after long work, if nothing can be written at `path`."""
    try:
        AtomicFile(path, follow=follow).discard()
    except OSError as error:
        raise _refused(path, error) from error


@contextlib.contextmanager
def whole_file(path: Path, *, sync: bool = True, follow: bool = True) -> Iterator[AtomicFile]:
    """Yield a file that takes its place at `path` when the block ends well; on any error nothing there changes.

    `sync` as in `AtomicFile.commit`, `follow` as in `AtomicFile`. Raises MoetraceError if the system refuses (a full
    disk).
    """
    try:
        output = AtomicFile(path, follow=follow)
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
            raise UsageError(f"The output {path} is also an input: choose another name.")


def remove_stale(folder: Path, name: re.Pattern[str]) -> None:
    """Remove what killed runs of this user left in `folder` under names of this form, older than a day.

    Ordinary files, and folders that nobody holds (`lock`); never a link or its target. Never an error.
    """
    oldest = time.time() - STALE_S
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if not name.fullmatch(entry.name):
                    continue
                about = entry.stat(follow_symlinks=False)
                if about.st_mtime >= oldest or (hasattr(os, "getuid") and about.st_uid != os.getuid()):
                    continue
                if stat.S_ISREG(about.st_mode):
                    Path(entry.path).unlink()
                elif stat.S_ISDIR(about.st_mode):
                    _remove_unheld(entry.path)


def lock(folder: str | os.PathLike[str]) -> int | None:
    """Hold a folder until the descriptor that is returned is closed, or this process ends, however that happens.

    Raises BlockingIOError if another process holds it. Returns None where the system has no such locks.
    """
    if os.name == "nt":
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        held = hold(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise
    if not held:
        os.close(descriptor)
    return descriptor if held else None


def hold(descriptor: int) -> bool:
    """Hold an open file or folder as `lock` does; return False where the system has no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return False
    return True


def unlock(descriptor: int | None) -> None:
    """Let go of what `lock` returned."""
    if descriptor is not None:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_unheld(folder: str) -> None:
    held = lock(folder)
    try:
        shutil.rmtree(folder)  # which does not follow links
    finally:
        unlock(held)


def temporary_of(name: str) -> re.Pattern[str]:
    """Names of `AtomicFile` for files whose name is of the form `name`."""
    return re.compile(rf"\.(?:{name})\.[0-9a-f]{{8}}\.tmp")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C, SIGTERM and SIGHUP back until the block ends.

    Inside HDF5's calls to a Python file they would count as a failed write; between renames they would leave files of
    two results.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread runs handlers
        return
    held: list[tuple[int, types.FrameType | None]] = []
    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # Signals without a Python handler, as SIGTERM in a program that only imports moetrace, are left as they are.
    handlers = {number: handler for number in signals if callable(handler := signal.getsignal(number))}
    try:
        for number in handlers:
            signal.signal(number, lambda *arguments: held.append(arguments))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if held:
        handlers[held[0][0]](*held[0])
