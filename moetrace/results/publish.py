"""How the files of a result take their places together: a redo log, so that a kill loses no result and mixes none.

All files are written and synced in a hidden folder inside the result's. One rename gives it the name `.moetrace-new`:
from then on the new result counts. Its files then move up one by one, and those of the older result that it lacks are
removed. A kill in between leaves `.moetrace-new`: moetrace reads a file there first (`file_in`), and the next write
finishes the older one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moetrace.results.record import OWN_FILES, RESULT_FILES
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.later import Later
from moetrace.spec.ordinary_file import is_folder, named_folder
from moetrace.trace.atomic import lock, remove_stale, sync_folder, uninterrupted, unlock

if TYPE_CHECKING:
    import polars as pl
else:
    pl = Later("polars")

COMMITTED = ".moetrace-new"
GONE = ".gone"  # ends the name of an empty file in the committed folder: the new result has no such file
_STAGED = re.compile(r"\.moetrace-[a-z0-9_]{8}", re.ASCII)  # as `tempfile` names it; COMMITTED is shorter
_PATIENCE_S = 60.0  # another writer holds a folder only while it moves a few files


def file_in(folder: Path, name: str) -> Path:
    """Where a file of a result lies, or would lie: among what a killed write has left to move up, else in `folder`."""
    waiting = folder / COMMITTED
    if is_folder(waiting) and (os.path.lexists(waiting / name) or os.path.lexists(waiting / f"{name}{GONE}")):
        return waiting / name
    return folder / name


def check_committed(folder: Path) -> None:
    """Raise a MoetraceError now, not after long work, if `.moetrace-new` is not as a write of ours leaves it."""
    with _held(folder):
        _waiting_names(folder)


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str], owned: Iterable[str] = RESULT_FILES) -> Iterator[Path]:
    """Yield an empty hidden folder inside `folder`, whose files move up when the block ends well.

    A `folder` that does not exist is made, with its parents. On any error, Ctrl-C included, it is as it was before.
    Files of the names `owned` are those of the older result: one that the new result lacks is removed. Raises
    MoetraceError if the folder cannot be written or a stranger's `.moetrace-new` is in it, UsageError if it is a file.
    """
    folder = named_folder(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, but results are written into a folder: name another.")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    temporary, held = None, None
    try:
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            check_committed(folder)
            remove_stale(folder, _STAGED)
            temporary = Path(tempfile.mkdtemp(prefix=".moetrace-", dir=folder))
            held = lock(temporary)  # so that nobody takes it for what a killed run left
        yield temporary
        _publish(temporary, folder, owned)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    finally:
        unlock(held)


@contextlib.contextmanager
def explained(folder: Path, outcome: str = "nothing was changed") -> Iterator[None]:
    """Turn a refusal by the system into one sentence, which ends with the outcome."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
    except pl.exceptions.ComputeError as error:
        # Polars reports the system's error only inside its own message.
        code = re.search(r"\(os error (\d+)\)", str(error))
        why = os.strerror(int(code[1])) if code else error
    else:
        return
    raise MoetraceError(f"{folder} could not be written: {why}; {outcome}.") from None


def _publish(temporary: Path, folder: Path, owned: Iterable[str]) -> None:
    """Commit the staged files, once they are on the disk and nothing is in their way, and move them up."""
    with explained(folder):
        names = sorted(path.name for path in temporary.iterdir())
        for name in {*names, *owned}:
            if is_folder(folder / name):
                raise UsageError(f"{folder / name} is a folder, but a file of that name is to be written: move it.")
        for name in owned:
            if name not in names:
                (temporary / f"{name}{GONE}").touch()
        for name in names:
            with (temporary / name).open("rb+") as written:
                os.fsync(written.fileno())
        sync_folder(temporary)
    with _held(folder), uninterrupted():
        with explained(folder):
            _move_up(folder)  # what a killed write has left
            temporary.rename(folder / COMMITTED)
            sync_folder(folder)
        with explained(folder, f"the new files are in its folder {COMMITTED}, and the next write moves them up"):
            _move_up(folder)


def _move_up(folder: Path) -> None:
    """Finish what a commit began; the folder is held."""
    waiting, names = folder / COMMITTED, _waiting_names(folder)
    if names is None:
        return
    # First what the new result lacks: nothing that is read by its name then belongs to the older one only.
    for name in sorted(names, key=lambda name: (not name.endswith(GONE), name)):
        if name.endswith(GONE):
            (folder / name.removesuffix(GONE)).unlink(missing_ok=True)
            (waiting / name).unlink()
        else:
            os.replace(waiting / name, folder / name)  # noqa: PTH105  over a link, not through it
    waiting.rmdir()
    sync_folder(folder)


def _waiting_names(folder: Path) -> list[str] | None:
    """Names in the committed folder of a killed write, None if there is no such folder; the folder is held."""
    waiting = folder / COMMITTED
    if not os.path.lexists(waiting):
        return None
    names = sorted(entry.name for entry in os.scandir(waiting)) if is_folder(waiting) else [""]
    for name in names:
        plain = name in OWN_FILES or name.removesuffix(GONE) in OWN_FILES
        if not plain or not stat.S_ISREG(os.lstat(waiting / name).st_mode):
            raise MoetraceError(f"{waiting} is not what a write of moetrace leaves: look what it is, and remove it.")
    return names


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder against other writers; wait for one that moves its files up."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            held = lock(os.path.realpath(folder))
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise MoetraceError(f"{folder} is held by another process that writes there: try again.") from None
            time.sleep(0.05)
        except OSError as error:
            raise MoetraceError(f"{folder} could not be written: {error.strerror}; nothing was changed.") from None
    try:
        yield
    finally:
        unlock(held)
