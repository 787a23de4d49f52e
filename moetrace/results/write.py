"""The files of a result: the same bytes each time, each marked as of the same result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrace.results.publish import explained
from moetrace.results.record import PARQUET_MARK, SUMMARY_FILE
from moetrace.spec.later import Later

if TYPE_CHECKING:
    import polars as pl
    from polars.io import plugins
else:
    pl, plugins = Later("polars"), Later("polars.io.plugins")

# Rows of a Parquet row group: the same for any number of threads, small enough to be written from constant memory.
GROUP_ROWS = 1 << 17


def to_json(summary: Mapping[str, Any]) -> str:
    """Return `summary.json`: fixed order, each float with the digits that give it back, no NaN."""
    return json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def sha256_of(text: str) -> str:
    """Return what marks the other files of a result as those of this `summary.json` or `sweep.json`."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_files(
    folder: Path,
    summary: Mapping[str, Any],
    step_slices: Callable[[], Iterator[pl.DataFrame]],
    frames: Mapping[str, pl.DataFrame],
    others: Mapping[str, Callable[[Any, str], None]],
) -> None:
    """Write `summary.json`, `steps.parquet` from its slices, and a Parquet file for each of `frames`, into `folder`.

    Each of `others` is written by the function that it names, from an open file and the hash that marks it. Steps
    stream in constant memory. Raises MoetraceError if the system refuses (a full disk).
    """
    text = to_json(summary)
    mark = sha256_of(text)
    parquet: dict[str, Any] = {
        "metadata": {PARQUET_MARK: mark},
        "compression": "zstd",
        "compression_level": 3,
        "statistics": True,
        "row_group_size": GROUP_ROWS,
    }
    with explained(folder.parent):
        (folder / SUMMARY_FILE).write_text(text, encoding="utf-8")
        steps = plugins.register_io_source(lambda *_: step_slices(), schema=next(step_slices()).schema)
        steps.sink_parquet(folder / "steps.parquet", maintain_order=True, **parquet)
        for name, frame in frames.items():
            frame.write_parquet(folder / f"{name}.parquet", **parquet)
        for name, write in others.items():
            with (folder / name).open("wb") as file:
                write(file, mark)
