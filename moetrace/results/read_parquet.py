"""Parquet files as strangers may have written them: checked, or refused in one sentence."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from moetrace.spec.errors import MoetraceError, printable

# No file of ours has so many rows a byte; one that claims more would take memory that it does not justify.
_MOST_ROWS_A_BYTE = 64


def scan(path: Path, columns: dict[str, Any], newer: dict[str, Any] | None = None) -> pl.LazyFrame | None:
    """Return these columns of a Parquet file, as these types, or None if there is no such file.

    `newer` columns are null where the file, of an earlier version, has none of them.

    Raises MoetraceError (file, column) if it is damaged, lacks a column, or claims more rows than its size justifies.
    """
    if not os.path.lexists(path):
        return None
    with readable(path):
        size_bytes = path.stat().st_size
        frame = pl.scan_parquet(path, glob=False)
        schema = frame.collect_schema()
        rows = frame.select(pl.len()).collect().item()
    if rows > _MOST_ROWS_A_BYTE * size_bytes:
        raise MoetraceError(f"{path} claims {rows:,} rows in {size_bytes:,} bytes: it is damaged.")
    missing = [name for name in newer or {} if name not in schema]
    columns = columns | {name: kind for name, kind in (newer or {}).items() if name in schema}
    for name, kind in columns.items():
        if name not in schema or not _alike(schema[name], kind):
            found = f"{schema[name]}" if name in schema else "no such column"
            raise MoetraceError(f"{path} must have a column {name} of {kind}, but there is {found}: replay again.")
    kept = [pl.col(name).cast(kind) for name, kind in columns.items()]
    return frame.select(*kept, *(pl.lit(None, pl.Float64).alias(name) for name in missing))


def whole_frame(path: Path, columns: dict[str, Any], newer: dict[str, Any] | None = None) -> pl.DataFrame | None:
    """Return what `scan` finds, in memory."""
    frame = scan(path, columns, newer)
    if frame is None:
        return None
    with readable(path):
        return frame.collect()


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn Polars' refusal of a damaged file into one sentence."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MoetraceError(f"{path} could not be read: {printable(why)}.") from None


def _alike(found: Any, wanted: Any) -> bool:
    """Whether a column can stand for another: any width of integers, any number for a float."""
    if wanted == pl.Int64:
        return found.is_integer()
    return found.is_numeric() if wanted == pl.Float64 else found == wanted
