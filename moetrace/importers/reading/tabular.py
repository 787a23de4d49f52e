"""Tables of strangers, read by Polars a bounded piece at a time: Parquet, CSV and JSON lines."""

import contextlib
import csv
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import polars as pl

from moetrace.importers.reading.table import tables
from moetrace.importers.reading.text import MAX_LINE_BYTES, chunks, first_bytes, json_lines
from moetrace.spec.errors import MoetraceError, printable
from moetrace.spec.ordinary_file import open_ordinary
from moetrace.spec.parquet_pages import DamagedParquetError, Sizes, parquet_sizes

PARQUET = b"PAR1"
# Limits on the sizes that a file claims: rows and values for each of its bytes, and in all; for Parquet also in a row
# group, which is read as a whole. Choices of one expert in one layer pack to almost nothing, but other columns do not.
MOST_ROWS_A_BYTE = 64
MOST_ROWS, MOST_GROUP_ROWS, MOST_GROUP_VALUES = 1 << 33, 1 << 24, 1 << 27
MOST_GROUP_BYTES = 1 << 30
_SLICE_ROWS = 1 << 18, 1 << 22  # at a time, at least and at most
_FIRST_BYTES = 64 << 10
_LOOKED_AT_BYTES = 1 << 18  # what stays in a core's cache
_FLOATS = ("gates", "scores")
_NO_NUMBER = ["", "null", "None", "NaN", "nan", "-"]
_JSON_KINDS = {"experts": Any, "gates": Any, "scores": float | None, "phase": int | str | bool}
_JSON_KINDS |= dict.fromkeys(("request", "layer"), int | str)


class TableFile(NamedTuple):
    """One file: its kind, and the names of its columns in order."""

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


def holds_layers(file: TableFile, name: str) -> bool:
    """Whether a column holds lists of lists, of all layers of a token."""
    if file.kind == "parquet":
        kind = first_row(file, name).schema[name]
        return isinstance(kind, pl.List | pl.Array) and isinstance(kind.inner, pl.List | pl.Array)
    if file.kind == "jsonl":
        first = first_bytes(file.path, _FIRST_BYTES).split(b"\n", 1)[0]
        return re.search(rb'"%s"\s*:\s*\[\s*\[' % re.escape(name.encode()), first) is not None
    return False


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
    kinds: dict[str, Any] = {name: _kind(fields.get(name, ""), what) for what, name in wanted}
    quoted, regular = _look(file)
    lists = {name for what, name in wanted if what in ("experts", "gates") and kinds[name] == pl.String}
    done = 0
    if regular and not quoted and not lists:
        columns = {name if name in kinds else f"#{at}": kinds.get(name) for at, name in enumerate(file.names)}
        for _, table in tables(file.path, columns, reading, header=1, separator=file.separator):
            yield done, table
            done += table.height
        return
    for line, data in _records(file.path, reading) if quoted else chunks(file.path, reading):
        text = data[data.find(b"\n") + 1 or len(data) :] if line == 1 else data
        if not text:
            continue
        if regular or quoted:
            table = _of_quoted(file, line, text, kinds)
        else:
            table, more = _of_ragged(file, done, text, {name: what for what, name in wanted}, kinds)
            lists |= more
        listed = any(what == "experts" and name in lists for what, name in wanted)
        for what, name in wanted:
            if name not in lists or table.schema[name] != pl.String:
                continue
            if what == "gates" and not listed and file.separator != ",":
                numbers = table[name].str.replace(",", ".", literal=True).cast(pl.Float64, strict=False)
            else:
                numbers = _numbers_in(file.path, table[name], pl.Float64 if what == "gates" else pl.Int64)
            table = table.with_columns(numbers)
        yield done, table
        done += table.height


def _look(file: TableFile) -> tuple[bool, bool]:
    """Whether a CSV has quotes, and whether the number of fields is, in total, lines times names."""
    quotes = fields = lines = 0
    data = b""
    with open_ordinary(file.path) as opened:
        while piece := opened.read(_LOOKED_AT_BYTES):
            data = piece
            quotes += b'"' in data
            marks = np.frombuffer(data, np.uint8)  # ten times as fast as `count` where separators are this frequent
            fields += np.count_nonzero(marks == ord(file.separator))
            lines += np.count_nonzero(marks == ord("\n"))
    lines += not data.endswith(b"\n")
    return quotes > 0, fields == lines * (len(file.names) - 1)


def _records(path: Path, reading: Callable[[int], object]) -> Iterator[tuple[int, bytes]]:
    """Pieces of a CSV, as `chunks`, that do not end within quotes."""
    first, held = 1, b""
    for line, data in chunks(path, reading):
        first, held = (line, data) if not held else (first, held + data)
        if held.count(b'"') % 2:
            marks = np.frombuffer(held, np.uint8)
            ends = np.flatnonzero((marks == ord("\n")) & (np.cumsum(marks == ord('"')) % 2 == 0))
            stop = int(ends[-1]) + 1 if ends.size else 0
            if len(held) - stop > MAX_LINE_BYTES:
                raise MoetraceError(f"{path}: the quotes of line {first} on do not end.")
        else:
            stop = len(held)
        if stop:
            yield first, held[:stop]
            first, held = first + held.count(b"\n", 0, stop), held[stop:]
    if held:
        yield first, held


def _of_quoted(file: TableFile, line: int, text: bytes, kinds: dict[str, Any]) -> pl.DataFrame:
    """The columns of some lines, of which fields may be in quotes."""
    names = file.separator.join(f'"{at}"' for at in range(len(file.names))).encode() + b"\n"
    places = {str(file.names.index(name)): name for name in kinds}
    overrides = {str(at): kinds.get(name, pl.String) for at, name in enumerate(file.names)}
    try:
        return pl.read_csv(
            io.BytesIO(names + text), separator=file.separator, schema=overrides, columns=list(places)
        ).rename(places)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        why = printable(str(error).splitlines()[0][:200])
        raise MoetraceError(f"{file.path}: the lines from {line} on can't be read as CSV: {why}.") from None


def _of_ragged(
    file: TableFile, first: int, text: bytes, meanings: dict[str, str], kinds: dict[str, Any]
) -> tuple[pl.DataFrame, set[str]]:
    """The columns of some lines that have too few or too many fields, and which of them are texts of lists.

    Missing fields of a line are null; more fields at its end are those of a list, if the last column is one of experts.
    """
    width, last = len(file.names), file.names[-1]
    lines = pl.Series("line", text.decode(errors="replace").split("\n"))
    lines = lines.filter(lines.str.strip_chars() != "")
    parts = lines.str.splitn(file.separator, width).struct.unnest()
    fields = {name: parts.to_series(at).str.strip_chars() for at, name in enumerate(file.names)}
    fields[last] = fields[last].str.strip_chars_end(file.separator + " ")
    many = fields[last].str.contains(file.separator, literal=True).fill_null(False)
    lists: set[str] = set()
    if many.any():
        if meanings.get(last) != "experts" or list(meanings.values()).count("experts") > 1:
            at = many.arg_max() or 0
            shown = printable(lines[at][:60])
            raise MoetraceError(f"{file.path}: row {first + at} has more fields than {width} names: {shown}.")
        lists, kinds = {last}, kinds | {last: pl.String}
    columns = []
    for name in meanings:
        column = fields[name].alias(name)
        if kinds[name] != pl.String:
            number = column.cast(kinds[name], strict=False)
            wrong = number.is_null() & (column.fill_null("") != "")
            if wrong.any():
                at = wrong.arg_max() or 0
                raise MoetraceError(f"{file.path}: row {first + at} holds {printable(column[at][:40])!r} as {name}.")
            column = number
        columns.append(column)
    return pl.DataFrame(columns), lists


def _kind(field: str, what: str) -> type[pl.DataType]:
    """The type of a column whose first field this is; pandas writes whole numbers beside missing ones as 3.0."""
    if is_text(field, what):
        return pl.String
    return pl.Float64 if what in _FLOATS or "." in field else pl.Int64


def is_text(field: str, what: str) -> bool:
    """Whether a CSV field of this meaning holds a text (a name, or a list) rather than a number."""
    try:
        if what != "gates" and not float(field).is_integer():
            return what in ("experts", "phase", "request", "layer")
        float(field)
    except (ValueError, OverflowError):
        return what in ("experts", "gates", "phase", "request", "layer") and field != ""
    return False


def _numbers_in(path: Path, texts: pl.Series, kind: type[pl.DataType]) -> pl.Series:
    """Texts such as `[3, 1, 7]` or `3 1 7` as lists of numbers; other texts are null."""
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
    """Keep the panic message of Polars from stderr: the panic is raised as an error, and reported in one sentence."""
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
