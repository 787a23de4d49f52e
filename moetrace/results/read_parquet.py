"""Parquet files as strangers may have written them: checked, or refused in one sentence."""

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import polars as pl

from moetrace.results.record import PARQUET_MARK
from moetrace.spec.errors import MoetraceError, printable
from moetrace.spec.ordinary_file import open_ordinary
from moetrace.spec.parquet_pages import DamagedParquetError, Sizes, parquet_sizes

# Our files have fewer rows for each byte; a file that claims more could take memory out of proportion to its size.
_MOST_ROWS_A_BYTE = 64
# A table that is read whole, and a row group of one that is read in parts (ours have 1 << 17 rows).
MOST_ROWS = 1 << 24
MOST_BYTES = 1 << 30
# A table that is read in parts.
MOST_ROWS_IN_PARTS = 1 << 31
MOST_BYTES_IN_PARTS = 1 << 40


def scan(
    path: Path,
    columns: dict[str, Any],
    newer: dict[str, Any] | None = None,
    *,
    of: str | None = None,
    signed: Collection[str] = (),
) -> pl.LazyFrame | None:
    """Return these columns of a Parquet file, as these types, or None if there is no such file.

    `newer` columns are null where the file, of an earlier version, lacks them. `of` is the hash of the file that
    it belongs to: one that is marked as of another is refused. Numbers must be finite, and not negative except in
    columns `signed`. Raises MoetraceError (file, column) if it is damaged, no ordinary file, lacks a column, or unpacks
    to more than the ceilings above or than its size justifies.
    """
    if not os.path.lexists(path):
        return None
    return _checked(path, _opened(path), columns, newer, of, signed)


def whole_frame(
    path: Path,
    columns: dict[str, Any],
    newer: dict[str, Any] | None = None,
    *,
    of: str | None = None,
    signed: Collection[str] = (),
) -> pl.DataFrame | None:
    """Return what `scan` finds, in memory; the file may have `MOST_ROWS` rows, and unpack to `MOST_BYTES`."""
    if not os.path.lexists(path):
        return None
    frame = _checked(path, _opened(path, whole=True), columns, newer, of, signed)
    with readable(path):
        return frame.collect()


def schema_of(path: Path) -> dict[str, Any]:
    """Return the columns of a file and their types, none if there is no such file; raises MoetraceError as `scan`."""
    return dict(_opened(path).schema) if os.path.lexists(path) else {}


class _Opened(NamedTuple):
    """A file that was opened once: the checked content is read, even if another file takes its name meanwhile."""

    frame: pl.LazyFrame
    schema: pl.Schema
    mark: str | None


def _opened(path: Path, whole: bool = False) -> _Opened:
    with open_ordinary(path, follow=False) as file:
        sizes = _checked_sizes(path, file)
        if whole:
            _check_size(path, "rows", sizes.rows, MOST_ROWS)
            _check_size(path, "bytes when it is unpacked", sizes.unpacked_bytes, MOST_BYTES)
        with readable(path):
            file.seek(0)
            mark = pl.read_parquet_metadata(file).get(PARQUET_MARK)
            file.seek(0)
            frame = pl.scan_parquet(file, glob=False)  # which keeps the file open
            schema = frame.collect_schema()
            rows = frame.select(pl.len()).collect().item()
    if rows != sizes.rows:
        raise MoetraceError(f"{path} claims {sizes.rows:,} rows, but has {rows:,}: it is damaged.")
    return _Opened(frame, schema, mark)


def _checked(
    path: Path,
    opened: _Opened,
    columns: dict[str, Any],
    newer: dict[str, Any] | None,
    of: str | None,
    signed: Collection[str],
) -> pl.LazyFrame:
    frame, schema, mark = opened
    if of is not None and mark is not None and mark != of:
        raise MoetraceError(f"{path} is of another result than the files beside it: write the folder again.")
    missing = [name for name in newer or {} if name not in schema]
    columns = columns | {name: kind for name, kind in (newer or {}).items() if name in schema}
    for name, kind in columns.items():
        if name not in schema or not _alike(schema[name], kind):
            found = f"{schema[name]}" if name in schema else "no such column"
            raise MoetraceError(f"{path} must have a column {name} of {kind}, but there is {found}: replay again.")
    kept = [pl.col(name).cast(kind) for name, kind in columns.items()]
    frame = frame.select(*kept, *(pl.lit(None, pl.Float64).alias(name) for name in missing))
    numbers = {name: name in signed for name, kind in columns.items() if kind.is_numeric()}
    _check_numbers(path, frame, numbers)
    return frame


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn Polars' refusal of a damaged file into one sentence."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MoetraceError(f"{path} could not be read: {printable(why)}.") from None


def _checked_sizes(path: Path, file: BinaryIO) -> Sizes:
    """Return the sizes of a file that can be read in parts, without unpacking it."""
    try:
        size_bytes = os.fstat(file.fileno()).st_size
        sizes = parquet_sizes(file)
    except DamagedParquetError as error:
        raise MoetraceError(f"{path} could not be read: {error}.") from None
    except OSError as error:
        raise MoetraceError(f"{path} could not be read: {error.strerror or error}.") from None
    if sizes.rows > _MOST_ROWS_A_BYTE * size_bytes:
        raise MoetraceError(f"{path} claims {sizes.rows:,} rows in {size_bytes:,} bytes: it is damaged.")
    _check_size(path, "rows", sizes.rows, MOST_ROWS_IN_PARTS)
    _check_size(path, "bytes when it is unpacked", sizes.unpacked_bytes, MOST_BYTES_IN_PARTS)
    _check_size(path, "rows in a row group", sizes.group_rows, MOST_ROWS)
    _check_size(path, "bytes in a row group when it is unpacked", sizes.group_bytes, MOST_BYTES)
    return sizes


def _check_size(path: Path, what: str, found: int, most: int) -> None:
    if found > most:
        raise MoetraceError(f"{path} has {found:,} {what}, but {most:,} is the most that is read.")


def _check_numbers(path: Path, frame: pl.LazyFrame, columns: dict[str, bool]) -> None:
    """Raise if a number is not finite or, in a column that is not signed, negative; `columns` says which are."""
    if not columns:
        return
    good = {name: pl.col(name).cast(pl.Float64).is_finite() for name in columns}
    good |= {name: good[name] & (pl.col(name) >= 0) for name, signed in columns.items() if not signed}
    with readable(path):
        found = frame.select(each.all().alias(name) for name, each in good.items()).collect(engine="streaming")
    for name, is_good in found.row(0, named=True).items():
        if not is_good:
            sign = "" if columns[name] else " that are not negative"
            raise MoetraceError(f"{path}: the column {name} must have finite numbers{sign}.")


def _alike(found: Any, wanted: Any) -> bool:
    """Whether a column can stand for another: any width of integers, any number for a float."""
    if wanted == pl.Int64:
        return found.is_integer()
    return found.is_numeric() if wanted == pl.Float64 else found == wanted
