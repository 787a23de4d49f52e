"""Tables of strangers, read by Polars a bounded piece at a time: Parquet, CSV and JSON lines."""

import contextlib
import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import polars as pl

from moetrace.importers.reading.table import tables
from moetrace.importers.reading.text import chunks, first_bytes, json_lines
from moetrace.spec.errors import MoetraceError, printable
from moetrace.spec.ordinary_file import open_ordinary
from moetrace.spec.parquet_pages import DamagedParquetError, Sizes, parquet_sizes

PARQUET = b"PAR1"
# What a file may claim: rows and values for each of its bytes, and in all; of Parquet, in a row group, which is read as
# a whole. Choices of one expert in one layer pack to almost nothing, but other columns do not.
MOST_ROWS_A_BYTE = 64
MOST_ROWS, MOST_GROUP_ROWS, MOST_GROUP_VALUES = 1 << 33, 1 << 24, 1 << 27
MOST_GROUP_BYTES = 1 << 30
_SLICE_ROWS = 1 << 18, 1 << 22  # at a time, at least and at most
_FIRST_BYTES = 64 << 10
_FLOATS = ("gates", "scores")
_NO_NUMBER = ["", "null", "None", "NaN", "nan", "-"]
_JSON_KINDS = {"experts": Any, "gates": Any, "scores": float | None, "phase": int | str | bool, "request": int | str}


class TableFile(NamedTuple):
    """One file: what kind it is, and the names of its columns in order."""

    path: Path
    kind: str  # "parquet", "csv" or "jsonl"
    names: list[str]
    separator: str = ","
    first: Sequence[str] = ()  # fields of the first line of a CSV
    sizes: Sizes | None = None


def open_table(path: Path) -> TableFile:
    """Look at a file without reading its rows. Raises MoetraceError if it is damaged or claims too much."""
    first = first_bytes(path, _FIRST_BYTES)
    if first.startswith(PARQUET):
        sizes = _checked_sizes(path)
        try:
            with _no_panic_message():
                names = list(pl.scan_parquet(path, glob=False).collect_schema())
        except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise _unreadable(path, error) from None
        return TableFile(path, "parquet", names, sizes=sizes)
    line = first.split(b"\n", 1)[0].decode(errors="replace")
    if line.lstrip().startswith("{"):
        return TableFile(path, "jsonl", list(_json_object(path, line)))
    separator = max(",;\t", key=line.count)
    rows = csv.reader(io.StringIO(first.decode(errors="replace").replace("\0", "")), delimiter=separator)
    try:
        names, values = next(rows, []), next(rows, [])
    except csv.Error as error:
        raise _unreadable(path, error) from None
    return TableFile(path, "csv", [name.strip() for name in names], separator, values)


def blocks(
    file: TableFile, wanted: Sequence[tuple[str, str]], reading: Callable[[int], object]
) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield the number of the first row and some rows, in order.

    `wanted` are pairs of what a column means ("layer", "experts", ...) and its name. Raises MoetraceError.
    """
    if file.kind == "parquet":
        yield from _parquet_blocks(file, [name for _, name in wanted], reading)
    elif file.kind == "jsonl":
        yield from _json_blocks(file, wanted, reading)
    else:
        yield from _csv_blocks(file, wanted, reading)


def first_row(file: TableFile, name: str) -> pl.DataFrame:
    """The first row of a column of Parquet, which costs no reading of the rest. Raises MoetraceError."""
    try:
        with _no_panic_message():
            return pl.scan_parquet(file.path, glob=False).select(name).head(1).collect()
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise _unreadable(file.path, error) from None


def _parquet_blocks(
    file: TableFile, names: list[str], reading: Callable[[int], object]
) -> Iterator[tuple[int, pl.DataFrame]]:
    assert file.sizes is not None
    rows = file.sizes.rows
    at_once = min(max(file.sizes.group_rows, _SLICE_ROWS[0]), _SLICE_ROWS[1])
    told, size_bytes = 0, file.path.stat().st_size
    frame = pl.scan_parquet(file.path, glob=False).select(names)
    for start in range(0, rows, at_once):
        try:
            with _no_panic_message():
                table = frame.slice(start, at_once).collect()
        except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise _unreadable(file.path, error) from None
        if table.height != min(at_once, rows - start):
            raise MoetraceError(f"{file.path} claims {rows:,} rows, but has fewer: it is damaged.")
        done = size_bytes * (start + table.height) // rows
        reading(done - told)
        told = done
        yield start, table


def _csv_blocks(
    file: TableFile, wanted: Sequence[tuple[str, str]], reading: Callable[[int], object]
) -> Iterator[tuple[int, pl.DataFrame]]:
    fields = dict(zip(file.names, file.first, strict=False))
    kinds: dict[str, Any] = {
        name: pl.String
        if is_text(fields.get(name, ""), what)
        else pl.Float64
        if what in ("gates", "scores")
        else pl.Int64
        for what, name in wanted
    }
    quoted = any(kind == pl.String and '"' in fields.get(name, "") for name, kind in kinds.items())
    lists = {name for what, name in wanted if what in ("experts", "gates") and kinds[name] == pl.String}
    done = 0
    if not lists and not quoted:
        columns = {name if name in kinds else f"#{at}": kinds.get(name) for at, name in enumerate(file.names)}
        for _, table in tables(file.path, columns, reading, header=1, separator=file.separator):
            yield done, table
            done += table.height
        return
    names = file.separator.join(f'"{at}"' for at in range(len(file.names))).encode() + b"\n"
    places = {str(file.names.index(name)): name for name in kinds}
    overrides = {str(at): kinds.get(name, pl.String) for at, name in enumerate(file.names)}
    for line, data in chunks(file.path, reading):
        text = data[data.find(b"\n") + 1 or len(data) :] if line == 1 else data
        if not text:
            continue
        try:
            table = pl.read_csv(
                io.BytesIO(names + text), separator=file.separator, schema=overrides, columns=list(places)
            ).rename(places)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            why = printable(str(error).splitlines()[0][:200])
            raise MoetraceError(f"{file.path}: the lines from {line} on can't be read as CSV: {why}.") from None
        for what, name in wanted:
            if name in lists:
                table = table.with_columns(
                    _numbers_in(file.path, table[name], pl.Float64 if what == "gates" else pl.Int64)
                )
        yield done, table
        done += table.height


def is_text(field: str, what: str) -> bool:
    """Whether a CSV field of this meaning holds a text (a name, or a list) rather than a number."""
    try:
        float(field) if what == "gates" else int(field)
    except ValueError:
        return what in ("experts", "gates", "phase", "request") and field != ""
    return False


def _numbers_in(path: Path, texts: pl.Series, kind: type[pl.DataType]) -> pl.Series:
    """Texts such as `[3, 1, 7]` or `3 1 7` as lists of numbers; what is none is null."""
    first = texts[0] or ""
    separator = next((mark for mark in ",;|" if mark in first), " ")
    lines = texts.str.join("\n").item() or ""
    data = lines.encode().translate(None, delete=b"[]()" + (b"" if separator == " " else b" "))
    width = first.strip("[]() ").count(separator) + 1
    names = [str(at) for at in range(width)]
    with contextlib.suppress(pl.exceptions.PolarsError, pl.exceptions.PanicException):  # lists of one length are a CSV
        found = pl.read_csv(
            io.BytesIO(separator.join(names).encode() + b"\n" + data),
            separator=separator,
            quote_char=None,
            schema=dict.fromkeys(names, kind),
        )
        if found.height == texts.len() and not any(found.null_count().row(0)):
            return pl.Series(texts.name, found.to_numpy(), pl.Array(kind, width))
    inner = texts.str.replace_all(r"[\[\](),;|\s]+", " ").str.strip_chars().str.split(" ")
    numbers = inner.cast(pl.List(kind), strict=False)
    bad = (
        numbers.list.eval(pl.element().is_null()).list.sum()
        > inner.list.eval(pl.element().is_in(_NO_NUMBER)).list.sum()
    )
    if bad.any():
        shown = printable(str(texts[bad.arg_max() or 0])[:60])
        raise MoetraceError(f"{path}: the column {texts.name} holds {shown!r}, but must hold numbers.")
    return numbers


def _json_blocks(
    file: TableFile, wanted: Sequence[tuple[str, str]], reading: Callable[[int], object]
) -> Iterator[tuple[int, pl.DataFrame]]:
    names = [name for _, name in wanted]
    fields = [(f"f{at}", _JSON_KINDS.get(what, int)) for at, (what, _) in enumerate(wanted)]
    rename = {f"f{at}": name for at, name in enumerate(names)}
    record = msgspec.defstruct("Row", fields, rename=rename, gc=False)
    done = 0
    for line, records in json_lines(file.path, record, reading):
        columns = {name: [getattr(one, f"f{at}") for one in records] for at, name in enumerate(names)}
        try:
            table = pl.DataFrame(columns, strict=True, infer_schema_length=None)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError, OverflowError):
            raise MoetraceError(
                f"{file.path}: the lines from {line} on hold different kinds of values in one column."
            ) from None
        yield done, table
        done += table.height


def _json_object(path: Path, line: str) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(line)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise MoetraceError(f"{path}: line 1 is not JSON: {str(error)[:200].rstrip('.')}.") from None
    if not isinstance(found, dict):
        raise MoetraceError(f"{path}: line 1 is no JSON object.")
    return found


def _checked_sizes(path: Path) -> Sizes:
    with open_ordinary(path) as file:
        try:
            size_bytes = os.fstat(file.fileno()).st_size
            sizes = parquet_sizes(file)
        except DamagedParquetError as error:
            raise MoetraceError(f"{path} could not be read: {error}.") from None
    for what, found, most in (
        ("rows", sizes.rows, min(MOST_ROWS, MOST_ROWS_A_BYTE * size_bytes)),
        ("rows in a row group", sizes.group_rows, MOST_GROUP_ROWS),
        ("values in a row group", sizes.group_values, min(MOST_GROUP_VALUES, MOST_ROWS_A_BYTE * size_bytes)),
        ("bytes in a row group when it is unpacked", sizes.group_bytes, MOST_GROUP_BYTES),
    ):
        if found > most:
            raise MoetraceError(f"{path} claims {found:,} {what}, but {most:,} is the most that is read of its size.")
    return sizes


@contextlib.contextmanager
def _no_panic_message() -> Iterator[None]:
    """Keep what Polars prints of a panic from stderr: it is raised as an error, and told in one sentence."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 2)
        os.close(sink)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _unreadable(path: Path, error: BaseException) -> MoetraceError:
    why = printable(str(error).splitlines()[0][:200]) if str(error) else type(error).__name__
    return MoetraceError(f"{path} could not be read: {why.rstrip('.')}.")
