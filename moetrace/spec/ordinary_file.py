"""Files that a stranger may have laid out: opened without waiting, and read up to a ceiling that the reader names."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from moetrace.spec.errors import MoetraceError, UsageError

_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NOCTTY", "O_NONBLOCK"))
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


def open_ordinary(path: str | os.PathLike[str], *, follow: bool = True) -> BinaryIO:
    """Open an ordinary file for reading; never wait for the other end of a pipe, nor read from a device.

    A path that the user names may be a symbolic link. A name inside a folder may not: without `follow` a link is
    refused. Raises MoetraceError.
    """
    try:
        # Looked at before it is opened, as to open a device may do something; and after, as it may be another one then.
        _check(path, Path(path).stat(follow_symlinks=follow).st_mode)
        descriptor = os.open(path, _FLAGS | (0 if follow else _NO_FOLLOW))
        try:
            _check(path, os.fstat(descriptor).st_mode)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise MoetraceError(f"Cannot read {path}: {error.strerror or error}.") from None
    except ValueError as error:  # a name with a null byte
        raise MoetraceError(f"Cannot read {path}: {error}.") from None


def read_ordinary(path: str | os.PathLike[str], most_bytes: int, *, follow: bool = True) -> bytes:
    """Return the bytes of an ordinary file; raises MoetraceError if it has more than `most_bytes`, or as above."""
    with open_ordinary(path, follow=follow) as file:
        try:
            data = file.read(most_bytes + 1)
        except OSError as error:
            raise MoetraceError(f"Cannot read {path}: {error.strerror or error}.") from None
    if len(data) > most_bytes:
        raise MoetraceError(f"Cannot read {path}: it has more than {most_bytes >> 20} MiB.")
    return data


def named_folder(path: str | os.PathLike[str]) -> Path:
    """Return the path of a folder; raises UsageError for an empty text, which `Path` takes for the current folder."""
    if not os.fspath(path):
        raise UsageError("An empty path names no folder.")
    return Path(path)


def is_folder(path: Path) -> bool:
    """Whether this is a folder itself, and not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _check(path: str | os.PathLike[str], mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise MoetraceError(f"Cannot read {path}: it is a symbolic link, which no file of a result is; copy the file.")
    if not stat.S_ISREG(mode):
        raise MoetraceError(f"Cannot read {path}: it is not an ordinary file.")
