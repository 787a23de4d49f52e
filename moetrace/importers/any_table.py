"""Any table whose columns are named: Parquet, CSV or JSON lines with a row for each choice, cell or token.

Columns by meaning (`--columns layer=...,token=...,experts=...`): `experts` is one id (a row is a choice), a list of
ids (a row is a cell: one token in one layer), a list of such lists (a row is a token, its layers counted from 0), or
several columns (`e0+e1`, `e*`). `layer`, `token` (any number of the token), `request`, `step` and `position` are
whole numbers, `request` may be a text, `phase` is 0, 1, prefill or decode. A null or -1 is no choice. Without `layer`,
the last number of a file's name is its layer. Without `token` and `position`, the n-th row of a layer is the n-th
token.

A file is read twice, some MiB at a time: which tokens there are, then their choices.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from moetrace.importers.captured import MAX_WEIGHT, SPARSEST, Capture, Hints
from moetrace.importers.columns import (
    OWN_COLUMNS,
    known_columns,
    layer_of_name,
    named_columns,
    says_layer,
    shown_names,
    without_ids,
)
from moetrace.importers.npz import FACTS
from moetrace.importers.reading.cells import Cells, File, cells_of, token_keys
from moetrace.importers.reading.own_parquet import KEY, ToldByFooter, told_by_footer
from moetrace.importers.reading.placeholders import Placeholders, advice
from moetrace.importers.reading.spool import Spool
from moetrace.importers.reading.tabular import PARQUET, holds_layers, open_table
from moetrace.spec.errors import MoetraceError, UsageError, counted
from moetrace.trace.schema import MAX_LAYERS, MAX_ROWS, PREFETCHED, check_sizes, expert_dtype

_HEADER = re.compile(rb'^[\s"]*[A-Za-z_][\w" ]*(?:[,;\t]["\w ]+)+\s*$')
_MERGE_ROWS = 1 << 22


class _FirstReading(NamedTuple):
    """Findings of the first reading."""

    tokens: pl.DataFrame  # BY_ROW columns of each token, in the order of the trace
    layer_index: np.ndarray
    top_k: int
    choices: int
    uneven: bool  # whether a cell may have fewer experts than top_k


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes may be such a table; of a text, by the names of its columns."""
    if first.startswith(PARQUET):
        return True
    line = first.split(b"\n", 1)[0].strip()
    if line.startswith(b"{"):
        names = [text.decode(errors="replace") for text in re.findall(rb'"(\w+)"\s*:', line[:4096])]
    elif _HEADER.match(line[:4096]):
        separator = max(b",;\t".decode(), key=line.decode(errors="replace").count)
        names = [text.strip(' "') for text in line.decode(errors="replace").split(separator)]
    else:
        return False
    known = known_columns(names)
    by_token = re.search(rb'":\s*\[\s*\[', line[:4096]) is not None  # a list of lists, of all layers
    named = says_layer(name) is not None  # of a table of one layer, its name tells
    return known is not None and ("layer" in known or by_token or named) and len(known) + named + by_token > 2


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture a file; one of all files if each is a layer."""
    files = [_file(path, hints) for path in sources]
    if len({file.layer is None for file in files}) > 1:
        raise MoetraceError(f"{sources[0]} and others do not both have a column of layers: import them separately.")
    if len({len(file.columns.get("scores", [])) for file in files}) > 1:
        raise MoetraceError(f"{sources[0]} and others do not have the same experts: import them separately.")
    if files[0].layer is None:
        return [_read([file], hints) for file in files]
    files.sort(key=lambda file: file.layer or 0)
    for one, other in pairwise(files):
        if one.layer == other.layer:
            raise MoetraceError(f"{one.table.path} and {other.table.path} are of the same layer, {one.layer}.")
        if differ := sorted(set(one.columns) ^ set(other.columns)):
            raise MoetraceError(f"{one.table.path} and {other.table.path} do not both have a column of {differ[0]}.")
    return [_read(files, hints)]


def _file(path: Path, hints: Hints) -> File:
    table = open_table(path)
    told = None
    if hints.columns:
        columns = named_columns(path, table.names, hints.columns)
    elif (known := known_columns(table.names)) is None:
        way = f"name them with --columns; it has {shown_names(table.names)}{without_ids(table.names)}"
        raise UsageError(f"{path} does not say which column holds experts: {way}.")
    else:
        columns = known
        if table.sizes is not None and set(table.names) >= OWN_COLUMNS:
            told = told_by_footer(path, table.sizes.texts.get(KEY.encode()))
    by_token = len(columns.get("experts", [])) == 1 and holds_layers(table, columns["experts"][0])
    layer = None if "layer" in columns or by_token else layer_of_name(path.stem)
    if "scores" in columns and (layer := says_layer(path.stem)) is not None:  # layer_id is 0 in each of such files
        columns = {meaning: of for meaning, of in columns.items() if meaning != "layer"}
    return File(table, columns, layer, told)


def _read(files: list[File], hints: Hints) -> Capture:
    where = files[0].table.path
    told = files[0].told
    scores = files[0].columns.get("scores", [])
    num_experts = told.num_experts if told else len(scores) or hints.need("num_experts", where)
    found = _first_reading(files, hints)
    if told:
        found = _as_told(where, found, told)
    tokens, layers = found.tokens, found.layer_index.size
    check_sizes(str(where), num_experts, found.top_k, layers, tokens.height, 1)
    if tokens.height * layers * found.top_k > SPARSEST * found.choices + 2**16:
        shape = (tokens.height, layers, found.top_k)
        raise MoetraceError(f"{where}: {found.choices} choices are too few for {shape} (tokens, layers, slots).")
    kinds = (("gates", "gates"), ("gates", "scores"), ("recorded", "resident"))
    optional = tuple(name for name, of in kinds if of in files[0].columns)
    spool = Spool(hints, num_experts, layers, found.top_k, optional)
    spool.grow(tokens.height)
    keys, placeholders = _Keys(tokens), Placeholders(num_experts, hints)
    for file in files:
        writer = _Filler(file, found, keys, spool, placeholders)
        for cells in cells_of(file, hints):
            writer.fill(cells)
    by_row = {name: tokens[name].to_numpy() for name in tokens.columns}
    request = by_row.get("request", np.zeros(tokens.height, np.int64))
    facts: dict[str, Any] = {
        "format": "any-table",
        "columns": {
            name: f"{of[0]} to {of[-1]}" if name == "scores" else "+".join(of) for name, of in files[0].columns.items()
        },
    }
    facts |= placeholders.told(str(where))
    if told:
        facts |= {key: text[:300] for key, text in told.facts.items() if key in FACTS}
    if files[0].layer is not None:
        facts["layers"] = "one a file, numbered by its name"
        last = files[-1].layer
        which = f"layers {files[0].layer} to {last}, by their names" if len(files) > 1 else f"layer {last}, by its name"
        hints.note(f"{where}: took {counted(len(files), 'file')} as {which}.")
    if "position" not in by_row:
        facts["positions"] = "counted within each request"
    token_id = ("token",) if "token_id" in by_row else ()
    step_rows = None
    if "step" in by_row:
        begins = np.flatnonzero(np.r_[True, by_row["step"][1:] != by_row["step"][:-1]])
        step_rows = np.diff(np.r_[begins, tokens.height])

    def parts() -> Iterator[dict[str, np.ndarray]]:
        done = 0
        for part in spool.parts():
            stop = done + len(part["experts"])
            yield dict(part) | ({"token": by_row["token_id"][done:stop]} if token_id else {})
            done = stop

    return Capture(
        model=told.model[:200] if told else "",
        num_experts=num_experts,
        top_k=found.top_k,
        layer_index=found.layer_index,
        expert_bytes=told.sizes if told else None,
        request=request,
        position=by_row.get("position", _counted(request)),
        phase=by_row.get("phase", np.zeros(tokens.height)).astype(np.uint8),
        optional=(*optional, *token_id),
        facts=facts,
        parts=parts,
        sources=tuple(file.table.path for file in files),
        step_rows=step_rows,
        layer_experts=np.array(told.layer_experts, np.uint16) if told and told.layer_experts else None,
    )


def _as_told(where: Path, found: _FirstReading, told: ToldByFooter) -> _FirstReading:
    """Findings of the first reading, with the layers and slots in which nothing was chosen."""
    layers = np.array(told.layer_index, np.int64)
    if found.top_k > told.top_k or not np.isin(found.layer_index, layers).all():
        raise MoetraceError(f"{where} holds layers or slots that its footer does not know: it is damaged.")
    return found._replace(layer_index=layers, top_k=told.top_k)


def _first_reading(files: list[File], hints: Hints) -> _FirstReading:
    """The tokens and layers in the table, and the number of experts in a cell."""
    where = files[0].table.path
    parts: list[pl.DataFrame] = []
    key: list[str] = []
    layers = np.zeros(0, np.int64)
    top_k = choices = held = 0
    slots: list[int] = []  # the first one of each block
    for file in files:
        before = choices
        for cells in cells_of(file, hints, light=True):
            key = token_keys(cells.rows)
            arrays = [cells.rows[name] for name in key]
            begins = np.ones(cells.layer.size, bool)
            begins[1:] = np.logical_or.reduce([array[1:] != array[:-1] for array in arrays])
            part = pl.DataFrame({name: array[begins] for name, array in cells.rows.items()})
            parts.append(part if _increases(part, key) else part.unique(key, keep="first", maintain_order=True))
            held += parts[-1].height
            layers = np.union1d(layers, np.flatnonzero(np.bincount(cells.layer)))
            choices += int(cells.length.sum())
            most = int(cells.length.max(initial=0))
            if "slot" in cells.values:
                most = int(cells.values["slot"].max(initial=-1)) + 1
                slots.append(int(cells.values["slot"].min(initial=most)))
            top_k = max(top_k, most)
            if held > _MERGE_ROWS:
                parts = [pl.concat(parts).unique(key, keep="first", maintain_order=True)]
                held = parts[0].height // 2
        if (sizes := file.table.sizes) is not None and "experts" in file.columns:
            # The length of a list was taken from the first one: others may be shorter.
            choices = min(choices, before + sum(sizes.values.get(name, choices) for name in file.columns["experts"]))
    if not choices or not top_k:
        raise MoetraceError(f"{where} holds no choice of an expert.")
    if slots and min(slots) > 0 and files[0].told is None:
        raise MoetraceError(
            f"{where}: no choice has the slot 0, from which slots count: take {min(slots)} from each, or name only "
            f"the other columns with --columns, as the choices of a cell stand together."
        )
    said = hints.top_k if "top_k" not in hints.from_model else None
    if top_k > max(said or 0, 65535) or layers.size > MAX_LAYERS:
        raise MoetraceError(f"{where}: a token has {top_k:,} experts in a layer, and there are {layers.size:,} layers.")
    tokens = pl.concat(parts)
    if not _increases(tokens, key):
        tokens = tokens.unique(key, keep="first", maintain_order=True)
    if "step" in tokens.columns:
        tokens = tokens.sort("step", maintain_order=True)
    if tokens.height > MAX_ROWS:
        raise MoetraceError(f"{where} has more tokens than a trace may have rows.")
    uneven = said is not None or any({"slot", "scores"} & set(file.columns) for file in files)
    return _FirstReading(tokens, layers, max(top_k, said or 0), choices, uneven)


def _increases(rows: pl.DataFrame, key: list[str]) -> bool:
    """Whether each row is greater than the one before, by the columns of `key`, so that none stands twice."""
    more, equal = np.zeros(max(0, rows.height - 1), bool), True
    for column in (rows[name].to_numpy() for name in key):
        more |= equal & (column[1:] > column[:-1])
        equal &= column[1:] == column[:-1]
    return bool(more.all())


class _Keys:
    """Rows of the trace by the columns that identify tokens."""

    def __init__(self, tokens: pl.DataFrame) -> None:
        self.names = token_keys(tokens.columns)
        columns = [tokens[name].to_numpy() for name in self.names]
        # Numbers as they are if their ranges allow, else their ranks.
        spans = [int(column.max()) - int(column.min()) + 1 for column in columns]
        self.known = [
            None if span < 1 << 20 else np.unique(column) for span, column in zip(spans, columns, strict=True)
        ]
        if len(columns) == 1:
            self.known = [None]
        self.low = [int(column.min()) for column in columns]
        sizes = [span if known is None else known.size for span, known in zip(spans, self.known, strict=True)]
        self.factors = [int(np.prod(sizes[at + 1 :], dtype=object)) for at in range(len(sizes))]
        if sizes[0] * self.factors[0] >= 1 << 63:
            raise MoetraceError(f"the columns {', '.join(self.names)} have too many values to identify tokens.")
        packed = self._packed(columns)
        self.order = np.argsort(packed, kind="stable")
        self.sorted = packed[self.order]

    def rows(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Rows of the trace of tokens that the first reading has seen, int64 [cells]."""
        packed = self._packed([columns[name] for name in self.names])
        begins = np.flatnonzero(np.r_[True, packed[1:] != packed[:-1]])
        at = np.searchsorted(self.sorted, packed[begins])
        return np.repeat(self.order[at], np.diff(np.r_[begins, packed.size]))

    def _packed(self, columns: list[np.ndarray]) -> np.ndarray:
        total = np.zeros(columns[0].size, np.int64)
        for column, low, known, factor in zip(columns, self.low, self.known, self.factors, strict=True):
            total += (column - low if known is None else np.searchsorted(known, column)) * factor
        return total


class _Filler:
    """Puts the choices of a file into the spool."""

    def __init__(self, file: File, found: _FirstReading, keys: _Keys, spool: Spool, placeholders: Placeholders) -> None:
        self.file, self.found, self.keys, self.spool, self.placeholders = file, found, keys, spool, placeholders
        self.last = -1  # the last cell, as long as they come in increasing order

    def fill(self, cells: Cells) -> None:
        """Put some cells. Raises MoetraceError for a cell that is there already, or an id that is no expert."""
        values = self._checked(cells)
        row = self.keys.rows(cells.rows)
        layer = np.searchsorted(self.found.layer_index, cells.layer)
        cell = row * self.found.layer_index.size + layer
        if cell[0] <= self.last or not (cell[1:] > cell[:-1]).all():
            self._check_new(cells, cell, row, layer)
        self.last = max(self.last, int(cell.max()))
        k, slot = self.found.top_k, cells.values.get("slot")
        uneven = cells.length > k if self.found.uneven else cells.length != k
        if uneven.any():
            at = int(np.argmax(uneven))
            raise MoetraceError(
                f"{self.file.table.path}: a token has {cells.length[at]} experts in layer {cells.layer[at]}, but {k} "
                f"in another layer or row: give --top-k, if some may be left out, or the column of their slots "
                f"(slot=COLUMN)."
            )
        if (cells.length == k).all() and (slot is None or (slot.reshape(-1, k) == np.arange(k)).all()):
            whole = {name: array.reshape(-1, k) for name, array in values.items()}
            if cell[-1] - cell[0] == cell.size - 1 and (np.diff(cell) == 1).all():
                self.spool.fill(int(cell[0]), **whole)
            else:
                self.spool.put(row, layer, **whole)
            return
        if slot is None:
            slot = np.arange(cells.length.sum()) - np.repeat(np.cumsum(cells.length) - cells.length, cells.length)
        self.spool.scatter(np.repeat(row, cells.length), np.repeat(layer, cells.length), slot, **values)

    def _check_new(self, cells: Cells, cell: np.ndarray, row: np.ndarray, layer: np.ndarray) -> None:
        """Cells come in any order: each may come once, unless slots tell its parts apart."""
        there = self.spool.take(row, layer) != self.placeholders.absent
        if "slot" in cells.values:
            at = np.repeat(np.arange(cell.size), cells.length)
            slot = cells.values["slot"]
            place = cell[at] * self.found.top_k + slot
            taken = there[at, slot]
            twice = taken.any() or np.unique(place).size < place.size
            which = int(at[np.argmax(taken)]) if taken.any() else int(at[_first_copy(place)]) if twice else 0
        else:
            twice = there.any() or np.unique(cell).size < cell.size
            which = int(np.argmax(there.any(1))) if there.any() else _first_copy(cell) if twice else 0
        if twice:
            named = ", ".join(f"{name} {cells.rows[name][which]}" for name in self.keys.names)
            raise MoetraceError(
                f"{self.file.table.path}: two rows hold the same cell (layer {cells.layer[which]}, {named}): name the "
                f"columns that identify tokens (request, step, token)."
            )

    def _checked(self, cells: Cells) -> dict[str, np.ndarray]:
        where, experts = self.file.table.path, self.placeholders.num_experts
        k = self.found.top_k if (cells.length == self.found.top_k).all() else 1
        ids, negative, wrong = self.placeholders.checked(cells.values["experts"].reshape(-1, k))
        if wrong is not None:
            near, expert = cells.first + _row_of(cells, wrong[0] * k + wrong[1]), int(ids[wrong])
            raise MoetraceError(
                f"{where}: near row {near}, expert {expert} is not 0 to {experts - 1}{advice(expert, experts)}."
            )
        narrow = ids.astype(expert_dtype(experts)).ravel()
        if negative:
            narrow[ids.ravel() < 0] = self.placeholders.absent
        values = {"experts": narrow}
        if (gates := cells.values.get("gates")) is not None:
            if (np.abs(gates) > MAX_WEIGHT).any():
                raise MoetraceError(f"{where}: near row {cells.first}, a gate is beyond {MAX_WEIGHT:g}.")
            values["gates"] = gates.astype(np.float16)
        if (recorded := cells.values.get("recorded")) is not None:
            if recorded.min(initial=0) < 0 or recorded.max(initial=0) > PREFETCHED:
                raise MoetraceError(f"{where}: near row {cells.first}, a recorded residency is not 0, 1 or 2.")
            values["recorded"] = recorded.astype(np.uint8)
        if (slot := cells.values.get("slot")) is not None and slot.min(initial=0) < 0:
            raise MoetraceError(f"{where}: near row {cells.first}, a slot is negative.")
        return values


def _counted(request: np.ndarray) -> np.ndarray:
    """Positions that count up within each request."""
    order = np.argsort(request, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(request[order]) != 0])
    position = np.empty(request.size, np.int64)
    position[order] = np.arange(request.size) - np.repeat(starts, np.diff(np.r_[starts, request.size]))
    return position


def _first_copy(keys: np.ndarray) -> int:
    """Where the first key stands that stands more than once."""
    order = np.argsort(keys, kind="stable")
    again = order[1:][np.diff(keys[order]) == 0]
    return int(again.min())


def _row_of(cells: Cells, at: int) -> int:
    return int(np.searchsorted(np.cumsum(cells.length), at, side="right"))
