"""The grid of a sweep: a TOML file whose lists are axes, and the points that they span."""

import contextlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
import numpy as np

from moetrace.batch.grid_labels import SOURCES, labels_of, part_of_name, placed, shown_label
from moetrace.batch.slo import Slo, parse_slos
from moetrace.results.record import FRONTS
from moetrace.spec import default_policies, load_system
from moetrace.spec.budget import check_slots
from moetrace.spec.errors import MoetraceError, UsageError, printable
from moetrace.spec.load import Loaded, convert, field_names, read_toml
from moetrace.spec.model import Model
from moetrace.spec.named import nearest
from moetrace.spec.policy import PolicySpec
from moetrace.spec.system import System

KINDS = ("trace", "batch", "model", "system", "policy", "slots")
MAX_POINTS = 100_000
_SYSTEM = "edge-ndp"  # where none is given
_SPECS: dict[str, type[msgspec.Struct]] = {"model": Model, "system": System, "policy": PolicySpec}


class _GridFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields that the file may have; every list is an axis, except that of `slo`."""

    trace: str | list[str] | None = None
    model: str | list[str] | None = None
    system: str | list[str] | None = None
    policy: str | list[str] | None = None
    slots: int | str | list[int | str] | None = None
    batch: int | list[int] | None = None
    set: dict[str, Any] = {}
    zip: list[dict[str, Any]] = []
    exclude: list[dict[str, Any]] = []
    ignore_capacity: bool = False
    pareto: str = "gpu_memory_bytes"
    slo: str | list[str] = []
    search: dict[str, Any] | None = None


class Axis(NamedTuple):
    """Fields that change together (one, unless they are zipped), and the values that they take in turn."""

    fields: tuple[str, ...]
    values: list[tuple[Any, ...]]
    listed: bool  # False: a constant, which no name mentions


class Point(NamedTuple):
    """One combination of values, from which a cell is resolved. Files are absolute."""

    name: str  # the labels of its axes, joined by "/"
    values: dict[str, Any]  # of every field that is given
    labels: dict[str, str | int | float | bool]  # of every axis, and of trace, system and policy


class Space(NamedTuple):
    """The axes of a sweep, before any combination of their values is made."""

    where: str
    folder: Path  # that relative paths are seen from
    axes: list[Axis]
    labels: dict[str, list[Any]]  # of the values of each field, in their axis' order
    excluded: list[dict[str, list[Any]]]  # a point that has all that one of these names, by label or value, is left out
    ignore_capacity: bool
    pareto: str
    search: dict[str, Any] | None  # the table of that name
    is_file: bool = False  # it was read from one
    slos: tuple[Slo, ...] = ()

    @property
    def size(self) -> int:
        """How many combinations there are."""
        return math.prod(len(axis.values) for axis in self.axes)

    @property
    def listed(self) -> dict[str, list[Any]]:
        """Label of each value, for the fields of axes that are lists."""
        fields = [field for axis in self.axes if axis.listed for field in axis.fields]
        return {field: list(dict.fromkeys(self.labels[field])) for field in fields}

    def allows(self, point: Point) -> bool:
        """Whether no exclusion describes a point."""
        return not any(
            all(point.labels.get(field) in values or point.values.get(field) in values for field, values in one.items())
            for one in self.excluded
        )

    def point(self, row: Sequence[int], also: Mapping[str, int | float] | None = None) -> Point:
        """The combination that takes value `row[i]` of axis i, and beside them `also`, by field."""
        values: dict[str, Any] = {}
        labels: dict[str, Any] = {}
        for axis, at in zip(self.axes, row, strict=True):
            for field, value in zip(axis.fields, axis.values[at], strict=True):
                values[field] = placed(field, value, self.folder)
                if axis.listed or field in SOURCES:
                    labels[field] = self.labels[field][at]
        values.update(also or {})
        labels.update(also or {})
        return Point("/".join(part_of_name(field, label) for field, label in labels.items()), values, labels)


class Grid(NamedTuple):
    """A sweep as it was asked for."""

    where: str
    axes: dict[str, list[Any]]  # label of each value, for the axes that are lists
    points: list[Point]
    ignore_capacity: bool
    pareto: str
    is_file: bool = False  # it was read from one
    slos: tuple[Slo, ...] = ()
    zipped: tuple[tuple[str, ...], ...] = ()  # fields that change together

    def check_axis(self, axis: str, value: str | None) -> None:
        """Raise UsageError if there is no such axis, or it has no such value, written as in the names of cells."""
        if axis not in self.axes:
            known = ", ".join(self.axes) or "none, as nothing is a list"
            raise UsageError(
                f"{printable(axis[:100])!r} is no axis of the sweep{nearest(axis, [*self.axes])}; its axes are {known}."
            )
        labels = [shown_label(label) for label in self.axes[axis]]
        if value is not None and value not in labels:
            near = nearest(value, labels)
            raise UsageError(f"{axis} is never {printable(value[:100])!r}{near}; its values are {', '.join(labels)}.")


def load_grid(source: str | os.PathLike[str] | Mapping[str, Any]) -> Grid:
    """Read a sweep from a TOML file, whose relative paths are seen from beside it, or from a mapping of the same form.

    Raises
    ------
    UsageError
        An unknown field, an axis that is empty or there twice, zipped axes of unequal length, too many points.
    MoetraceError
        A file that cannot be read or is not TOML.
    """
    space = load_space(source)
    where = space.where
    if space.search is not None:
        raise UsageError(f"{where} has a [search] table: search with --search, or leave the table out.")
    if space.size > MAX_POINTS:
        raise UsageError(f"{where} spans {space.size:,} cells, and a sweep has at most {MAX_POINTS:,}: split it.")
    rows = itertools.product(*(range(len(axis.values)) for axis in space.axes))
    points = [point for point in map(space.point, rows) if space.allows(point)]
    if not points:
        raise UsageError(f"{where}: exclude leaves no cell.")
    twice = [name for name, times in Counter(point.name for point in points).items() if times > 1]
    if twice:
        raise UsageError(f"{where} names {twice[0]} more than once: each value of an axis, or row of a zip, wants one.")
    zipped = tuple(axis.fields for axis in space.axes if len(axis.fields) > 1)
    facts = space.ignore_capacity, space.pareto, space.is_file, space.slos
    return Grid(where, space.listed, points, *facts, zipped)


def load_space(source: str | os.PathLike[str] | Mapping[str, Any]) -> Space:
    """Read the axes of a sweep. Raises as `load_grid` does."""
    if not isinstance(source, str | os.PathLike | Mapping):
        raise UsageError(f"A sweep is the path of a TOML file or a mapping, got {type(source).__name__}.")
    if isinstance(source, Mapping):
        folder, where = Path.cwd(), "the sweep"
        raw = {key: _plain(value) for key, value in source.items()}
    else:
        folder, where = Path(source).absolute().parent, str(source)
        raw = read_toml(os.fspath(source))
    sweep = convert(Loaded(raw, where), _GridFile)
    if sweep.pareto not in FRONTS:
        near = nearest(sweep.pareto, list(FRONTS))
        raise UsageError(f"{where}: pareto wants one of {', '.join(FRONTS)}{near}, got {sweep.pareto!r}.")
    axes = _axes(sweep, folder, where)
    _check_once(axes, where)
    labels = {field: labels_of(field, values) for axis in axes for field, values in _columns(axis)}
    excluded = _exclusions(sweep.exclude, labels, folder, where)
    facts = sweep.ignore_capacity, sweep.pareto, sweep.search, not isinstance(source, Mapping)
    return Space(where, folder, axes, labels, excluded, *facts, parse_slos(sweep.slo, f"{where}: "))


def _plain(value: Any) -> Any:
    """Return Python's values as those of TOML: paths, tuples, ranges, NumPy's numbers and arrays."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _axes(sweep: _GridFile, folder: Path, where: str) -> list[Axis]:
    """Every field as an axis, constants too: trace, model, system, policy, slots, then the others as they come."""
    zipped = [_zip(table, f"{where}, zip {number}") for number, table in enumerate(sweep.zip, 1)]
    in_zip = {field for axis in zipped for field in axis.fields}
    given = {kind: getattr(sweep, kind) for kind in KINDS}
    if given["system"] is None and "system" not in in_zip:
        given["system"] = _SYSTEM
    if given["policy"] is None and "policy" not in in_zip:
        given["policy"] = _default_policies(given["system"], zipped, folder, where)
    if given["trace"] is None and "trace" not in in_zip:
        raise UsageError(f'{where}: trace is missing: name the file, as in trace = "trace.h5".')
    single = [_axis(kind, value, where) for kind, value in given.items() if value is not None]
    single += [_axis(field, value, where) for field, value in flat_paths(sweep.set, "set", where).items()]
    order = {kind: rank for rank, kind in enumerate(KINDS)}
    return sorted([*single, *zipped], key=lambda axis: min(order.get(field, len(KINDS)) for field in axis.fields))


def _default_policies(systems: Any, zipped: list[Axis], folder: Path, where: str) -> list[str]:
    """Return the policies that suit every system of the sweep; raise UsageError if no policy does."""
    named = [systems] if isinstance(systems, str) else [*(systems or [])]
    named += [value for axis in zipped for field, values in _columns(axis) if field == "system" for value in values]
    found = set()
    for system in named:
        with contextlib.suppress(MoetraceError):  # what is wrong with a system is said of its cells
            found.add(default_policies(load_system(placed("system", system, folder))))
    if len(found) > 1:
        raise UsageError(f"{where}: policy is missing, and its systems have no defaults in common: name some policies.")
    return list(found.pop() if found else default_policies(load_system(_SYSTEM)))


def _axis(field: str, value: Any, where: str) -> Axis:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UsageError(f"{where}: {field} is an empty list, so there is no cell: give it a value, or leave it out.")
    for each in values:
        _check_value(field, each, where)
    return Axis((field,), [(each,) for each in values], isinstance(value, list))


def _zip(table: dict[str, Any], where: str) -> Axis:
    given = _flat_table(table, where)
    if len(given) < 2:
        raise UsageError(f"{where} wants two axes or more that change together, got {len(given)}.")
    axes = [_axis(field, value, where) for field, value in given.items()]
    for axis in axes:
        if not axis.listed:
            raise UsageError(f"{where}: {axis.fields[0]} wants a list, as long as the others.")
        if len(axis.values) != len(axes[0].values):
            raise UsageError(
                f"{where}: {axes[0].fields[0]} has {len(axes[0].values)} values and {axis.fields[0]} "
                f"{len(axis.values)}, but zipped axes must be of equal length."
            )
    rows = [tuple(value for (value,) in row) for row in zip(*(axis.values for axis in axes), strict=True)]
    return Axis(tuple(given), rows, True)


def _flat_table(table: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a table of `zip` or `exclude`: trace, model, system, policy, slots, and fields under `set`."""
    for key in table:
        if key not in (*KINDS, "set"):
            raise UsageError(f"{where}: {key} is unknown{nearest(key, [*KINDS, 'set'])}; known are {_either()}.")
    inner = table.get("set", {})
    if not isinstance(inner, dict):
        raise UsageError(f"{where}: set wants a table, as in set.system.ndp.units = [2, 4].")
    return {key: value for key, value in table.items() if key != "set"} | flat_paths(inner, "set", where)


def _either() -> str:
    return ", ".join((*KINDS, "set"))


def flat_paths(table: Mapping[str, Any], prefix: str, where: str) -> dict[str, Any]:
    """Paths like `system.ndp.units` of the values in nested tables, each known to be the path of a field."""
    found: dict[str, Any] = {}

    def walk(inner: Mapping[str, Any], path: str, levels: int) -> None:
        if levels == 0:
            raise UsageError(f"{where}: {prefix} has tables that lie too deep in each other.")
        for key, value in inner.items():
            at = f"{path}.{key}" if path else str(key)
            if isinstance(value, Mapping):
                walk(value, at, levels - 1)
            elif at in found:
                _twice(at, where)
            else:
                _check_path(at, where)
                found[at] = value

    walk(table, "", 16)
    return found


def _check_path(path: str, where: str) -> None:
    """Raise unless `path` is that of a field: model.FIELD, system.TABLE.FIELD, policy.FIELD or policy.NAME.FIELD."""
    kind, _, field = path.partition(".")
    if kind not in _SPECS or not field or not all(field.split(".")):
        near = nearest(kind, list(_SPECS))
        raise UsageError(
            f"{where}: set wants model.FIELD, system.FIELD or policy.FIELD, got {printable(path)!r}{near}."
        )
    if kind == "policy":
        field = field.rpartition(".")[2]
    known = field_names(_SPECS[kind])
    if field not in known:
        near = nearest(field, known)
        raise UsageError(f"{where}: {printable(path)} is no field of a {kind}{near}; known are {', '.join(known)}.")


def _check_value(field: str, value: Any, where: str) -> None:
    if field == "slots":
        legal, wants = isinstance(value, int | str) and not isinstance(value, bool), "whole numbers, shares or memory"
        if legal:
            _check_slots(value, where)
    elif field == "batch":
        legal, wants = isinstance(value, int) and not isinstance(value, bool) and value >= 1, "whole numbers from 1"
    elif field in SOURCES:
        legal, wants = isinstance(value, str) and bool(value.strip()), "texts"
    else:
        legal, wants = isinstance(value, str | int | float | bool | list), "numbers, texts, true or false"
    if not legal:
        raise UsageError(f"{where}: {field} wants {wants}, got {printable(repr(value)[:100])}.")


def _check_slots(slots: int | str, where: str) -> None:
    try:
        check_slots(slots)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _check_once(axes: list[Axis], where: str) -> None:
    fields = Counter(field for axis in axes for field in axis.fields)
    for field, times in fields.items():
        if times > 1:
            _twice(field, where)


def _twice(field: str, where: str) -> NoReturn:
    raise UsageError(f"{where}: {printable(field)} is given twice: keep one of them.")


def _columns(axis: Axis) -> Iterator[tuple[str, list[Any]]]:
    """Each field of an axis, with its values."""
    for at, field in enumerate(axis.fields):
        yield field, [row[at] for row in axis.values]


def _exclusions(
    tables: list[dict[str, Any]], known: Mapping[str, Any], folder: Path, where: str
) -> list[dict[str, list[Any]]]:
    """For each table of `exclude`, the values of each field, as given and, for a file, as its path."""
    found = []
    for number, table in enumerate(tables, 1):
        at = f"{where}, exclude {number}"
        wanted = _flat_table(table, at)
        for field in wanted:
            if field not in known:
                raise UsageError(f"{at}: {printable(field)} is nothing that this sweep gives.")
        found.append(
            {
                field: [
                    one
                    for value in (values if isinstance(values, list) else [values])
                    for one in (value, placed(field, value, folder))
                ]
                for field, values in wanted.items()
            }
        )
    return found
