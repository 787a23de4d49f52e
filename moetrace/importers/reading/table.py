"""Text sources of columns of numbers, as tables of some MiB at a time; an error names the line that can't be read."""

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from moetrace.importers.captured import Hints
from moetrace.importers.reading.text import BOM, chunks
from moetrace.spec.errors import MoetraceError

NEWLINE = b"\n"
Numbers = Mapping[str, np.ndarray]

_LARGEST = {pl.Int32: 2**31, pl.Int64: 2**63}
_SHOWN_BYTES = 60
_RAGGED_CELLS = 64 << 20  # bytes read at a time x columns


def tables(
    path: Path,
    columns: Mapping[str, type[pl.DataType] | None],
    reading: Callable[[int], object],
    *,
    header: int = 0,
    separator: str = ",",
    ragged: bool = False,
    cut: Callable[[str], object] | None = None,
) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield the number of the first line (from 1) and a table of the lines that follow, without the `header` lines.

    `columns` names all columns of the file in order, those of type None are not read. A colon is taken as a space if
    that separates. Raises MoetraceError with the line that lacks a number, unless `ragged`, which makes it null, or
    that holds something else; one with more columns may pass if some of `columns` are not read. A last line that lacks
    columns, as a process that is killed leaves it, goes to `cut` as a sentence, if there is one.
    """
    schema = {name: kind or pl.String for name, kind in columns.items()}
    wanted = [name for name, kind in columns.items() if kind is not None]
    unread = path.stat().st_size
    # Nulls that a ragged line lacks take memory but no bytes of the file.
    for line, data in chunks(path, reading, max(1 << 16, _RAGGED_CELLS // len(columns)) if ragged else None):
        unread -= len(data)
        while header and data:
            line, data, header = line + 1, data[data.find(b"\n") + 1 or len(data) :], header - 1
        if cut and data and unread <= len(BOM):
            start = data.removesuffix(NEWLINE).rfind(NEWLINE) + 1
            fields = data[start:].split(separator.encode())
            if data[start:].strip() and (len(fields) < len(columns) or not fields[-1].strip()):
                cut(f"{path}: line {line + data[:start].count(NEWLINE)} is incomplete.")
                data = data[:start]
        if not data:
            continue
        text = data.translate(_SPACES) if separator == " " else data
        try:
            table = _parsed(text, schema, wanted, separator, ragged)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise _bad_line(path, columns, separator, ragged, line, data) or MoetraceError(
                f"{path}: the lines from {line} on can't be read as CSV: {str(error).splitlines()[0][:200]}."
            ) from None
        must = wanted if not ragged else wanted[:1]
        empty = table.select(pl.any_horizontal(pl.col(must).is_null())).to_series()
        if empty.any():
            raise MoetraceError(f"{path}: line {line + (empty.arg_max() or 0)} is incomplete.")
        yield line, table


class CutLines:
    """Last lines that were cut: they are left out, counted and said in a note; `--strict` refuses them."""

    def __init__(self, path: Path, hints: Hints) -> None:
        self._path, self._hints = path, hints
        self._found: dict[str, int] = {}  # lines of each sentence

    def __call__(self, sentence: str, count: int = 1) -> None:
        """Take what a reading of the file has found, perhaps again."""
        if self._hints.strict:
            raise MoetraceError(sentence)
        self._found[sentence] = count

    def told(self) -> dict[str, Any]:
        """Their entries in `source`."""
        if not self._found:
            return {}
        count = sum(self._found.values())
        lines = "a last line that was" if count == 1 else f"{count} last lines that were"
        self._hints.note(f"{self._path}: left out {lines} cut: {next(iter(self._found))}")
        return {"left_out_cut_lines": count}


_SPACES = bytes.maketrans(b":", b" ")


def _parsed(
    text: bytes, schema: Mapping[str, type[pl.DataType]], wanted: list[str], separator: str, ragged: bool
) -> pl.DataFrame:
    # Polars takes the columns from the first line, so it must have them all.
    names = separator.join(schema).encode() + b"\n"
    return pl.read_csv(
        io.BytesIO(names + text),
        separator=separator,
        quote_char=None,
        schema=schema,
        columns=wanted,
    )


def _bad_line(
    path: Path,
    columns: Mapping[str, type[pl.DataType] | None],
    separator: str,
    ragged: bool,
    first: int,
    data: bytes,
) -> MoetraceError | None:
    """Find the line that Polars refuses: its own message hardly helps to find the place."""
    kinds = list(columns.values())
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), first):
        text = (line.translate(_SPACES) if separator == " " else line).removesuffix(b"\r")
        fields = text.split(separator.encode(), len(kinds))
        if line and (len(fields) > len(kinds) or not all(map(_fits, fields, kinds))):
            shown = line[:_SHOWN_BYTES].decode(errors="replace")
            return MoetraceError(f"{path}: line {number} can't be read as CSV of {len(kinds)} columns: {shown!r}.")
        if not ragged and len(fields) < len(kinds):
            return MoetraceError(f"{path}: line {number} is incomplete.")
    return None


def _fits(field: bytes, kind: type[pl.DataType] | None) -> bool:
    if kind in (None, pl.String) or not field:
        return True
    try:
        return abs(int(field)) < _LARGEST[kind] if kind in _LARGEST else float(field) is not None
    except ValueError:
        return False


def numbers(table: pl.DataFrame) -> dict[str, np.ndarray]:
    """The columns of a table without nulls as arrays."""
    return {name: table[name].to_numpy() for name in table.columns}
