"""The files of a result: all of them or none, and the same bytes each time."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
from polars.io.plugins import register_io_source

from moetrace.results.record import SUMMARY_FILE, TIMELINE_FILE
from moetrace.spec.errors import MoetraceError, UsageError

# Rows of a Parquet row group: the same for any number of threads, small enough to be written from constant memory.
GROUP_ROWS = 1 << 17


def to_json(summary: Mapping[str, Any]) -> str:
    """Return `summary.json`: fixed order, each float with the digits that give it back, no NaN."""
    return json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty hidden folder inside `folder`, whose files move up when the block ends well.

    A `folder` that does not exist is made, with its parents. On any error, Ctrl-C included, it is as it was before,
    unless the system refuses halfway through those moves. Raises MoetraceError if it cannot be written, UsageError if
    it is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, but results are written into a folder: name another.")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    temporary = None
    try:
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".moetrace-", dir=folder))
        yield temporary
        with _explained(folder):
            _publish(temporary, folder)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    temporary.rmdir()


def write_files(
    folder: Path,
    summary: Mapping[str, Any],
    step_slices: Callable[[], Iterator[pl.DataFrame]],
    frames: Mapping[str, pl.DataFrame],
    others: Mapping[str, Callable[[Any], None]],
) -> None:
    """Write `summary.json`, `steps.parquet` from its slices, and a Parquet file for each of `frames`, into `folder`.

    Each of `others` is written by the function that it names. Steps stream in constant memory. Raises MoetraceError if
    the system refuses (a full disk).
    """
    parquet: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": 3,
        "statistics": True,
        "row_group_size": GROUP_ROWS,
    }
    with _explained(folder.parent):
        (folder / SUMMARY_FILE).write_text(to_json(summary), encoding="utf-8")
        steps = register_io_source(lambda *_: step_slices(), schema=next(step_slices()).schema)
        steps.sink_parquet(folder / "steps.parquet", maintain_order=True, **parquet)
        for name, frame in frames.items():
            frame.write_parquet(folder / f"{name}.parquet", **parquet)
        for name, write in others.items():
            with (folder / name).open("wb") as file:
                write(file)


def _publish(temporary: Path, folder: Path) -> None:
    """Move every file up, once all of them are safely on the disk and nothing is in their way."""
    files = sorted(temporary.iterdir())
    for file in files:
        if (folder / file.name).is_dir():
            raise UsageError(f"{folder / file.name} is a folder, but a file of that name is to be written: move it.")
        with file.open("rb+") as written:
            os.fsync(written.fileno())
    with _explained(folder, "its files may now be of two results"):
        try:
            for file in files:
                file.replace(folder / file.name)
        except KeyboardInterrupt:
            # A few renames are left: old and new files side by side would be worse than a moment more.
            for file in files:
                if file.exists():
                    file.replace(folder / file.name)
            raise
        # A timeline of another replay would lie beside tables that it does not belong to.
        if not any(file.name == TIMELINE_FILE for file in files):
            (folder / TIMELINE_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(folder: Path, outcome: str = "nothing was changed") -> Iterator[None]:
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
