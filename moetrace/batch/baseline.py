"""The committed figures that a gate compares with: one JSON file, sorted, a few lines a cell: its diffs read well."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from moetrace.batch.identity import identity
from moetrace.batch.metrics import ROUNDING, check_metrics, value_of
from moetrace.results.folder import ResultCell, ResultFolder
from moetrace.results.read_json import convert_strict, explained, read_strict_json
from moetrace.results.record import BASELINE_SCHEMA, METRICS
from moetrace.spec.errors import MoetraceError
from moetrace.trace.atomic import whole_file

_MOST_CELLS = 100_000
_LONGEST_NAME = 4096

Input = str | int | bool | None


class BaselineCell(msgspec.Struct, forbid_unknown_fields=True):
    """A cell as it was accepted: its inputs, each as `identity` gives it, and figures by metric; or that it failed."""

    inputs: dict[str, Input]
    metrics: dict[str, float | None]
    failed: bool = False


class Baseline(msgspec.Struct, forbid_unknown_fields=True):
    """The accepted figures: the code's version and each cell by name; `specs` are models, systems etc. by identity."""

    moetrace: str
    engine: str | None
    cells: dict[str, BaselineCell]
    specs: dict[str, dict[str, Any]]
    schema: str = BASELINE_SCHEMA

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that a cell has, in the order of METRICS."""
        found = {name for cell in self.cells.values() for name in cell.metrics}
        return tuple(name for name in METRICS if name in found)


class _UncheckedBaseline(msgspec.Struct, forbid_unknown_fields=True):
    schema: str
    moetrace: str
    engine: str | None
    cells: dict[str, Any]
    specs: dict[str, dict[str, Any]]


def read_baseline(path: Path) -> Baseline:
    """Read and check a baseline. Raises MoetraceError, with the path of the wrong value, if it is no baseline."""
    raw = read_strict_json(path)
    stated = raw.get("schema") if isinstance(raw, dict) else None
    if stated != BASELINE_SCHEMA:
        raise MoetraceError(f"{path} is no baseline: schema wants {BASELINE_SCHEMA!r}, got {str(stated)[:100]!r}.")
    found = convert_strict(path, raw, _UncheckedBaseline)
    if len(found.cells) > _MOST_CELLS:
        raise MoetraceError(f"{path}: cells has {len(found.cells):,} of them, but {_MOST_CELLS:,} is the most.")
    cells = {name: _cell(path, name, cell) for name, cell in found.cells.items()}
    return Baseline(found.moetrace, found.engine, cells, found.specs)


def make_baseline(folder: ResultFolder, metrics: Iterable[str], where: str, old: Baseline | None) -> Baseline:
    """Return what accepts the figures of every cell of `folder`, or that it failed; `where` names it in an error.

    Figures that differ from `old` only by rounding keep its digits: an update on another machine leaves no trace.
    """
    wanted = check_metrics(metrics)
    cells, specs = {}, {}
    for cell in folder.cells:
        if cell.error is not None:
            cells[cell.name] = BaselineCell({}, {}, failed=True)
            continue
        was = old.cells.get(cell.name) if old else None
        cells[cell.name] = _accepted(cell, wanted, where, was)
        specs |= spec_table(cell)
    return Baseline(folder.moetrace, folder.engine, cells, specs)


def spec_table(cell: ResultCell) -> dict[str, dict[str, Any]]:
    """Return the inputs that are more than a number, by their identity; of a trace, the fields that identify it."""
    return {
        str(identity(value)): cell.trace if kind == "trace" else dict(value)
        for kind, value in cell.inputs.items()
        if kind == "trace" or isinstance(value, Mapping)
    }


def write_baseline(path: Path, baseline: Baseline) -> bool:
    """Write it, whole or not at all; return whether that changed anything. Raises MoetraceError if it cannot be."""
    text = to_text(baseline).encode()
    if path.is_file() and path.stat().st_size == len(text) and path.read_bytes() == text:
        return False
    with whole_file(path) as output:
        output.write(text)
    return True


def to_text(baseline: Baseline) -> str:
    """Return the file's text: sorted, a line for each spec, and floats with the digits that give them back."""
    cells = [f"    {_json(name)}: {{\n{_cell_text(cell)}}}" for name, cell in sorted(baseline.cells.items())]
    specs = [f"    {_json(key)}: {_json(spec)}" for key, spec in sorted(baseline.specs.items())]
    parts = [
        f'  "schema": {_json(BASELINE_SCHEMA)}',
        f'  "moetrace": {_json(baseline.moetrace)}',
        f'  "engine": {_json(baseline.engine)}',
        _block("cells", cells),
        _block("specs", specs),
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _cell_text(cell: BaselineCell) -> str:
    parts = [f'"inputs": {_json(cell.inputs)}', f'"metrics": {_json(_short(cell.metrics))}']
    return ",\n".join(f"      {part}" for part in [*parts, *(['"failed": true'] if cell.failed else [])])


def _accepted(cell: ResultCell, metrics: Iterable[str], where: str, was: BaselineCell | None) -> BaselineCell:
    figures = {name: value_of(cell.figures, name, f"{where}: the cell {cell.name}") for name in metrics}
    if was is not None:
        for name, value in figures.items():
            old = was.metrics.get(name)
            if value is not None and old is not None and abs(value - old) <= ROUNDING * abs(old):
                figures[name] = old
    return BaselineCell({kind: identity(value) for kind, value in cell.inputs.items()}, figures)


def _cell(path: Path, name: str, raw: object) -> BaselineCell:
    """Check one cell; what msgspec would call `cells[...]` gets its name."""
    if not name or len(name) > _LONGEST_NAME:
        raise MoetraceError(f"{path}: the name of a cell wants 1 to {_LONGEST_NAME} characters.")
    at = f"cells.{name}"
    try:
        cell = msgspec.convert(raw, BaselineCell)
    except msgspec.ValidationError as error:
        bad = _bad_metric(raw)
        raise MoetraceError(
            f"{path}: {at}.metrics.{bad} wants a number or null." if bad else f"{path}: {explained(error, at)}."
        ) from None
    if not (cell.metrics or cell.failed):
        raise MoetraceError(f"{path}: {at}.metrics is empty.")
    check_metrics(cell.metrics, f"{path}: {at}.metrics: ")
    for metric, value in cell.metrics.items():
        if value is not None and not 0 <= value < 1e300:
            raise MoetraceError(f"{path}: {at}.metrics.{metric} wants a finite number that is not negative.")
    return cell


def _bad_metric(raw: object) -> str | None:
    metrics = raw.get("metrics") if isinstance(raw, dict) else None
    if not isinstance(metrics, dict):
        return None
    plain = (int, float, type(None))
    return next(
        (key for key, value in metrics.items() if isinstance(value, bool) or not isinstance(value, plain)), None
    )


def _short(metrics: Mapping[str, float | None]) -> dict[str, float | int | None]:
    """Whole numbers without a point: `347326119936`, which read back is the same."""
    whole = {name: int(value) for name, value in metrics.items() if value is not None and _is_whole(value)}
    return {**metrics, **whole}


def _is_whole(value: float) -> bool:
    return value.is_integer() and abs(value) < 2**53


def _block(name: str, lines: list[str]) -> str:
    return f'  "{name}": {{\n' + ",\n".join(lines) + "\n  }" if lines else f'  "{name}": {{}}'


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
