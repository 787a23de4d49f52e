"""The cells of a table: the choices of one token in one layer, for any content of a table's row."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from moetrace.importers.captured import Hints
from moetrace.importers.columns import layer_of_name
from moetrace.importers.reading.own_parquet import ToldByFooter
from moetrace.importers.reading.passes import half
from moetrace.importers.reading.tabular import TableFile, blocks, first_row
from moetrace.spec.errors import MoetraceError, UsageError, printable
from moetrace.trace.schema import MAX_LAYERS

BY_ROW = ("request", "step", "token", "position", "phase", "token_id")
_NARROW = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32)
_PHASES = {"prefill": 0, "prompt": 0, "decode": 1, "generate": 1, "0": 0, "1": 1}


def token_keys(names: Collection[str]) -> list[str]:
    """The columns of each row that identify tokens; a position does if nothing else numbers tokens."""
    return [name for name in ("request", "step", "token" if "token" in names else "position") if name in names]


class File(NamedTuple):
    """A file and the columns that are read of it, by meaning; `layer` if its name says it, `told` if it is our own."""

    table: TableFile
    columns: dict[str, list[str]]
    layer: int | None
    told: ToldByFooter | None = None


class Cells(NamedTuple):
    """Cells of some rows of a file: their ids stand one after another."""

    first: int  # row of the file
    rows: dict[str, np.ndarray]  # int64 [cells] of each of BY_ROW that there is
    layer: np.ndarray  # int64 [cells]
    length: np.ndarray  # int64 [cells]
    values: dict[str, np.ndarray]  # [choices]: experts, and gates, recorded and slot if there are any


def cells_of(file: File, hints: Hints, *, light: bool = False) -> Iterator[Cells]:
    """The cells of a file; those whose rows follow one another are one, however the file is cut into pieces.

    `light` cells lack gates and recorded residencies; where a row of Parquet is a cell or a choice, ids too, and a cell
    is believed to have as many as the first row.
    """
    ids = True
    if light:
        beside = set(file.columns) - {"experts", "gates", "resident", "scores"}
        lists = _list_length(file) if file.table.kind == "parquet" and beside else None
        ids = lists is None or "slot" in file.columns
        left_out = ("gates", "resident", "experts") if lists or not ids else ("gates", "resident")
        columns = {meaning: of for meaning, of in file.columns.items() if meaning not in left_out}
        file = file._replace(columns=columns)
        if lists:
            yield from _keys_of(file, hints, lists)
            return
    wanted = [(meaning, name) for meaning, names in file.columns.items() for name in names]
    counted: dict[int, int] = {}  # rows of each layer so far, where nothing numbers tokens
    held: Cells | None = None
    for first, table in blocks(file.table, wanted, half(hints)):
        if not table.height:
            continue
        cells = _parsed(file, first, table, counted) if ids else _keys_of_choices(file, first, table, counted)
        if cells is None:
            continue
        if ids and not _is_choices(file, table):
            yield _wide(cells)
            continue
        # The last cell may go on in the next piece.
        whole, held = _grouped(_joined(held, cells) if held else cells)
        if whole.layer.size:
            yield _wide(whole)
    if held is not None:
        yield _wide(Cells(held.first, _first(held.rows), held.layer[:1], np.array([held.layer.size]), held.values))


def _list_length(file: File) -> int | None:
    """Ids of the first list of the column of experts; 0 if a row is a choice, None if neither."""
    if "scores" in file.columns:
        return None
    if len(file.columns["experts"]) > 1:
        return len(file.columns["experts"])
    name = file.columns["experts"][0]
    table = first_row(file.table, name)
    kind = table.schema[name]
    if not isinstance(kind, pl.List | pl.Array):
        return 0
    if isinstance(kind.inner, pl.List | pl.Array) or not table.height:
        return None
    return int(_choices(file.table.path, table, [name], "experts")[1][0]) or None


def _keys_of_choices(file: File, first: int, table: pl.DataFrame, counted: dict[int, int]) -> Cells:
    """The cells of a table of a row a choice, each of one choice, without their ids."""
    rows, layer = _rows(file, first, table, counted, choices=True)
    return Cells(first, rows, layer, np.ones(layer.size, np.int64), {})


def _keys_of(file: File, hints: Hints, length: int) -> Iterator[Cells]:
    """The cells of a table of lists without their ids, each taken for `length` long."""
    wanted = [(meaning, name) for meaning, names in file.columns.items() for name in names]
    counted: dict[int, int] = {}
    for first, table in blocks(file.table, wanted, half(hints)):
        if table.height:
            rows, layer = _rows(file, first, table, counted, choices=False)
            yield _wide(Cells(first, rows, layer, np.full(layer.size, length), {}))


def _is_choices(file: File, table: pl.DataFrame) -> bool:
    names = file.columns.get("experts", [])
    return len(names) == 1 and not isinstance(table.schema[names[0]], pl.List | pl.Array)


def _parsed(file: File, first: int, table: pl.DataFrame, counted: dict[int, int]) -> Cells | None:
    """The cells of some rows; each choice is a cell of its own where a row is a choice."""
    where = file.table.path
    if "scores" in file.columns:
        rows, layer = _rows(file, first, table, counted, choices=False)
        length, values = _scored(where, first, table, file.columns["scores"])
        return Cells(first, rows, layer, length, values)
    ids, length, outer = _choices(where, table, file.columns["experts"], "experts")
    values = {"experts": ids}
    for meaning, name in (("gates", "gates"), ("resident", "recorded"), ("slot", "slot")):
        if meaning in file.columns:
            array, its_length, _ = _choices(where, table, file.columns[meaning], meaning)
            if array.size != ids.size or not np.array_equal(its_length, length):
                raise MoetraceError(f"{where}: near row {first}, {meaning} and experts differ in number.")
            values[name] = array.astype(np.int64) if name == "slot" else array
    if outer is None:
        rows, layer = _rows(file, first, table, counted, _is_choices(file, table))
        return Cells(first, rows, layer, length, values)
    rows = {name: np.repeat(array, outer) for name, array in _by_row(file, first, table).items()}
    layer = np.arange(length.size) - np.repeat(np.cumsum(outer) - outer, outer)
    if "token" not in rows and "position" not in rows:
        start = counted.get(0, 0)
        rows["token"] = np.repeat(np.arange(start, start + outer.size), outer)
        counted[0] = start + outer.size
    return Cells(first, rows, layer, length, values) if length.size else None


def _scored(where: Path, first: int, table: pl.DataFrame, names: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """How many experts each row chose, and which with their scores, the greatest first, the lower id among equals."""
    scores = np.stack([_flat(where, table[name], "gates") for name in names], axis=1)
    wrong = ~(scores >= 0)
    if wrong.any():
        row, expert = np.argwhere(wrong)[0].tolist()
        raise MoetraceError(f"{where}: row {first + row}: {names[expert]} is {scores[row, expert]}, and no score.")
    length = np.count_nonzero(scores, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    kept = np.arange(len(names)) < length[:, None]
    return length, {"experts": order[kept], "gates": np.take_along_axis(scores, order, axis=1)[kept]}


def _by_row(file: File, first: int, table: pl.DataFrame) -> dict[str, np.ndarray]:
    where, columns = file.table.path, file.columns
    return {name: _numbers(where, first, table[columns[name][0]], name) for name in BY_ROW if name in columns}


def _rows(
    file: File, first: int, table: pl.DataFrame, counted: dict[int, int], choices: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The fields of each row about its token, and its layer."""
    where, rows = file.table.path, _by_row(file, first, table)
    if "layer" in file.columns:
        layer = _numbers(where, first, table[file.columns["layer"][0]], "layer")
        if layer.min() < 0 or layer.max() >= MAX_LAYERS:
            at = int(np.argmax((layer < 0) | (layer >= MAX_LAYERS)))
            raise MoetraceError(
                f"{where}: row {first + at} is of layer {layer[at]}, but must be of 0 to {MAX_LAYERS - 1}."
            )
    elif file.layer is not None:
        layer = np.full(table.height, file.layer)
    else:
        raise UsageError(f"{where} does not say the layer: name its column with --columns layer=COLUMN.")
    if "token" not in rows and "position" not in rows:
        if choices:
            raise UsageError(f"{where} has a row a choice, so name the column of the tokens: --columns token=COLUMN.")
        rows["token"] = _occurrence(layer, counted)
    return rows, layer


def _choices(
    where: Path, table: pl.DataFrame, names: list[str], meaning: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """All values of a column or of several in order, how many each cell has, and cells a row if a row has several."""
    columns = [table[name] for name in names]
    outer = None
    if len(columns) > 1:
        flat = np.stack([_flat(where, column, meaning) for column in columns], axis=1)
        return flat.ravel(), np.full(table.height, len(columns)), None
    column = columns[0]
    if isinstance(column.dtype, pl.Array):
        if column.dtype.inner.is_numeric() and not column.null_count():
            flat = pl.Series(column.name, column.to_numpy().ravel(), column.dtype.inner)
            return _flat(where, flat, meaning), np.full(column.len(), column.dtype.size), None
        column = column.arr.to_list()
    if isinstance(column.dtype, pl.List) and isinstance(column.dtype.inner, pl.List | pl.Array):
        outer = _lengths(where, column, meaning)
        column = column.filter(pl.Series(outer > 0)).explode()
        if isinstance(column.dtype, pl.Array):
            column = column.arr.to_list()
    if isinstance(column.dtype, pl.List):
        if column.null_count():  # no choice, in all slots
            most = int(column.list.len().fill_null(0).to_numpy().max(initial=0))
            column = column.fill_null(pl.Series([[None] * most], dtype=column.dtype))
        length = _lengths(where, column, meaning)
        column = column.filter(pl.Series(length > 0)).explode()
    else:
        length = np.ones(column.len(), np.int64)
    return _flat(where, column, meaning), length, outer


def _lengths(where: Path, column: pl.Series, meaning: str) -> np.ndarray:
    length = column.list.len()
    if length.null_count():
        raise MoetraceError(f"{where}: a row has no list of {meaning}.")
    return length.to_numpy().astype(np.int64)


def _flat(where: Path, column: pl.Series, meaning: str) -> np.ndarray:
    kind = column.dtype
    if meaning == "gates":
        if not kind.is_numeric() and kind != pl.Null:
            raise MoetraceError(f"{where}: the column {column.name} holds {kind}, but gates must be numbers.")
        return column.cast(pl.Float32).fill_null(float("nan")).to_numpy()
    column = _whole(column)
    if not column.dtype.is_integer():
        raise MoetraceError(f"{where}: the column {column.name} holds {kind}, but {meaning} must be whole numbers.")
    if kind in (pl.Int128, pl.UInt128):
        column = _narrow(where, column)
    if column.null_count():
        column = column.cast(pl.Int64, strict=False).fill_null(-1)
    return column.to_numpy()


def _whole(column: pl.Series) -> pl.Series:
    """Floats and texts that are whole numbers, as pandas writes them beside missing ones, as Int64; NaN is null."""
    if column.dtype.is_float():
        column = column.fill_nan(None)
        clean = column.drop_nulls()
        if ((clean == clean.round()) & (clean.abs() <= 2**53)).all():
            return column.cast(pl.Int64)
    elif column.dtype == pl.String:
        numbers = column.cast(pl.Int64, strict=False)
        if numbers.null_count() == column.null_count():
            return numbers
    return column


def _narrow(where: Path, column: pl.Series) -> pl.Series:
    numbers = column.cast(pl.Int64, strict=False)
    if numbers.null_count() > column.null_count():
        raise MoetraceError(f"{where}: the column {column.name} holds a number of 2^63 or more.")
    return numbers


def _numbers(where: Path, first: int, column: pl.Series, meaning: str) -> np.ndarray:
    """A column of integers; texts of phases are 0 and 1, those of requests are distinguished by hash."""
    if column.dtype.is_float():
        column = _whole(column)
    if column.null_count():
        at = column.is_null().arg_max() or 0
        raise MoetraceError(f"{where}: row {first + at} has no {meaning}.")
    kind = column.dtype
    if isinstance(kind, pl.String | pl.Categorical | pl.Enum):
        if meaning == "request":
            return (column.cast(pl.String).hash(0).to_numpy() >> np.uint64(1)).astype(np.int64)
        if meaning == "layer":
            column = _layers_of(where, first, column.cast(pl.String))
            kind = column.dtype
        if meaning == "phase":
            named = column.cast(pl.String).str.to_lowercase().replace_strict(_PHASES, default=None)
            if named.null_count():
                at = named.is_null().arg_max() or 0
                text = printable(str(column[at])[:40])
                raise MoetraceError(f"{where}: row {first + at} has the phase {text!r}, but must be prefill or decode.")
            column, kind = named, named.dtype
    if not kind.is_integer() and kind != pl.Boolean:
        raise MoetraceError(f"{where}: the column {column.name} holds {kind}, but {meaning} must be whole numbers.")
    array = (column if kind in _NARROW else _narrow(where, column)).to_numpy()
    if meaning == "phase" and array.size and (array.min() < 0 or array.max() > 1):
        raise MoetraceError(f"{where}: near row {first}, a phase is not 0 or 1.")
    return array


def _layers_of(where: Path, first: int, names: pl.Series) -> pl.Series:
    """The numbers of layers by their names, such as model.layers.3.mlp: after the word layer, or the last one."""
    numbers = {name: layer_of_name(name) for name in names.unique().to_list()}
    if None in numbers.values():
        at = names.is_in([name for name, number in numbers.items() if number is None]).arg_max() or 0
        shown = printable(names[at][:40])
        raise MoetraceError(f"{where}: row {first + at} has the layer {shown!r}, whose name has no number.")
    return names.replace_strict(numbers, return_dtype=pl.Int64)


def _occurrence(layer: np.ndarray, counted: dict[int, int]) -> np.ndarray:
    """For each row, how many rows of its layer came before."""
    order = np.argsort(layer, kind="stable")
    kinds, starts, counts = np.unique(layer[order], return_index=True, return_counts=True)
    base = np.array([counted.get(one, 0) for one in kinds.tolist()])
    number = np.empty(layer.size, np.int64)
    number[order] = np.arange(layer.size) - np.repeat(starts - base, counts)
    counted.update(zip(kinds.tolist(), (base + counts).tolist(), strict=True))
    return number


def _grouped(cells: Cells) -> tuple[Cells, Cells]:
    """Join neighbouring rows, a choice each, that are of one cell; the rows of the last cell stay as they are."""
    keys = [cells.layer, *(cells.rows[name] for name in token_keys(cells.rows))]
    begins = np.ones(cells.layer.size, bool)
    begins[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    starts = np.flatnonzero(begins)
    first, last = starts[:-1], int(starts[-1])
    rows = {name: array[first] for name, array in cells.rows.items()}
    values = {name: array[:last] for name, array in cells.values.items()}
    rest = ({name: array[last:] for name, array in part.items()} for part in (cells.rows, cells.values))
    held_rows, held_values = rest
    return (
        Cells(cells.first, rows, cells.layer[first], np.diff(starts), values),
        Cells(cells.first, held_rows, cells.layer[last:], cells.length[last:], held_values),
    )


def _joined(one: Cells, other: Cells) -> Cells:
    def both(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.concatenate([a[name], b[name]]) for name in b}

    layer, length = (np.concatenate([getattr(one, name), getattr(other, name)]) for name in ("layer", "length"))
    return Cells(one.first, both(one.rows, other.rows), layer, length, both(one.values, other.values))


def _first(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array[:1] for name, array in arrays.items()}


def _wide(cells: Cells) -> Cells:
    """The cells with int64 in `rows` and `layer`, so that arithmetic on them does not wrap."""
    rows = {name: array.astype(np.int64, copy=False) for name, array in cells.rows.items()}
    return cells._replace(rows=rows, layer=cells.layer.astype(np.int64, copy=False))
