"""One cell against its baseline: what moved, which way, and what can have moved it."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moetrace.batch.baseline import Baseline, BaselineCell, Input
from moetrace.batch.identity import identity
from moetrace.batch.metrics import Tolerances, value_of
from moetrace.results.folder import ResultCell, ResultFolder
from moetrace.results.record import METRICS

Verdict = Literal["worse", "missing", "changed", "better", "new", "same"]
# The gravest first, as they are shown.
VERDICTS: tuple[Verdict, ...] = ("worse", "missing", "changed", "better", "new", "same")
_SHOWN_FIELDS = 3
_LONGEST_VALUE = 40
_DIGEST = re.compile("[0-9a-f]{64}")


class Moved(NamedTuple):
    """A metric of a cell, beside its baseline; `allowed` is how far it may be from there, in its unit."""

    metric: str
    baseline: float | None
    value: float | None
    allowed: float | None
    verdict: Literal["worse", "changed", "better", "same"]

    @property
    def change(self) -> float | None:
        """Value less baseline, None where one is undefined."""
        return None if self.value is None or self.baseline is None else self.value - self.baseline

    @property
    def relative(self) -> float | None:
        """Change over the baseline's size, None where that is undefined or zero."""
        share = self.change / abs(self.baseline) if self.change is not None and self.baseline else math.nan
        return share if math.isfinite(share) else None


class Judged(NamedTuple):
    """A cell with its verdict, the kinds of its inputs that changed, every gated metric, and why; or that it failed."""

    name: str
    verdict: Verdict
    inputs: tuple[str, ...]
    metrics: tuple[Moved, ...]
    why: str
    failed: bool = False  # in the folder: it has no figures


def judge(
    folder: ResultFolder, baseline: Baseline, tolerances: Tolerances, metrics: tuple[str, ...], where: str
) -> list[Judged]:
    """Judge every cell of the folder, in its order, and then the baseline's cells that it lacks.

    `metrics` are those that are compared, where the baseline has them. `where` names the folder in an error. Raises
    MoetraceError if a cell lacks a metric or holds something else in its place.
    """
    found = []
    code = _code_change(folder, baseline)
    for cell in folder.cells:
        was = baseline.cells.get(cell.name)
        if cell.error is not None:
            verdict: Verdict = "new" if was is None else "same" if was.failed else "missing"
            found.append(Judged(cell.name, verdict, (), (), f"it failed: {cell.error.rstrip('.')}", True))
        elif was is None or was.failed:
            found.append(_new(cell, metrics, where, "it failed before" if was else "not in the baseline"))
        else:
            found.append(_compared(cell, was, baseline.specs, tolerances, metrics, where, code))
    there = {cell.name for cell in folder.cells}
    gone = sorted(baseline.cells.keys() - there)
    return found + [Judged(name, "missing", (), (), "only in the baseline") for name in gone]


def _new(cell: ResultCell, metrics: tuple[str, ...], where: str, why: str) -> Judged:
    values = [(name, value_of(cell.figures, name, f"{where}: the cell {cell.name}")) for name in metrics]
    moved = tuple(Moved(name, None, value, None, "same") for name, value in values)
    return Judged(cell.name, "new", (), moved, why)


def _compared(
    cell: ResultCell,
    was: BaselineCell,
    specs: Mapping[str, Mapping[str, Any]],
    tolerances: Tolerances,
    metrics: tuple[str, ...],
    where: str,
    code: str,
) -> Judged:
    now = {kind: identity(value) for kind, value in cell.inputs.items()}
    kinds = tuple(kind for kind in _kinds(now, was.inputs) if now.get(kind) != was.inputs.get(kind))
    moved = tuple(
        _moved(name, was.metrics[name], value_of(cell.figures, name, f"{where}: the cell {cell.name}"), tolerances)
        for name in metrics
        if name in was.metrics
    )
    verdicts: list[Verdict] = ["same", *(one.verdict for one in moved)]
    verdict = min(verdicts, key=VERDICTS.index)
    if kinds and verdict != "worse":
        verdict = "changed"
    why = ""
    if kinds:
        why = "; ".join(_input_change(kind, cell, was.inputs.get(kind), now.get(kind), specs) for kind in kinds)
    elif verdict != "same":
        why = code
    return Judged(cell.name, verdict, kinds, moved, why)


def _moved(name: str, baseline: float | None, value: float | None, tolerances: Tolerances) -> Moved:
    if baseline is None or value is None:
        return Moved(name, baseline, value, None, "same" if baseline == value else "changed")
    allowed = tolerances.of(name, baseline)
    if abs(value - baseline) <= allowed:
        return Moved(name, baseline, value, allowed, "same")
    better = METRICS[name].better
    if better is None:
        return Moved(name, baseline, value, allowed, "changed")
    return Moved(name, baseline, value, allowed, "better" if (value < baseline) == (better == "lower") else "worse")


def _kinds(now: Mapping[str, Input], was: Mapping[str, Input]) -> list[str]:
    first = ("trace", "model", "system", "policy", "slots")
    return [*first, *sorted((now.keys() | was.keys()) - {*first})]


def _code_change(folder: ResultFolder, baseline: Baseline) -> str:
    """Why figures moved whose inputs are the same: only code is left."""
    if folder.moetrace != baseline.moetrace:
        return f"only the code changed: moetrace {baseline.moetrace} -> {folder.moetrace}"
    if folder.engine and baseline.engine and folder.engine != baseline.engine:
        return f"only the code changed: the engine, {baseline.engine[:12]} -> {folder.engine[:12]}"
    where = "outside the engine " if folder.engine and baseline.engine else ""
    return f"no recorded input changed: code {where}did, or this machine computes otherwise"


def _input_change(kind: str, cell: ResultCell, was: Input, now: Input, specs: Mapping[str, Mapping[str, Any]]) -> str:
    """`system changed: link.bandwidth_gb_s 55 -> 50`, or the part of that which is known."""
    old, new = specs.get(str(was)), cell.inputs.get(kind)
    if kind == "trace":
        new = cell.trace
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        before, after = dict(_leaves(old)), dict(_leaves(new))
        fields = [key for key in {**before, **after} if key != "name" and before.get(key) != after.get(key)]
        names = {key: _file_of(key, cell) if kind == "files" else key for key in fields}
        said = [f"{names[key]} {_value(before.get(key))} -> {_value(after.get(key))}" for key in fields]
        if len(said) > _SHOWN_FIELDS:
            said = [*said[:_SHOWN_FIELDS], f"and {len(said) - _SHOWN_FIELDS} more"]
        if said:
            return f"{kind} changed: {', '.join(said)}"
    return f"{kind} changed: {_value(was)} -> {_value(now)}"


def _file_of(field: str, cell: ResultCell) -> str:
    """`idea.py (policy.dispatch)`: the file that a field of a spec names; the field alone if that is not known."""
    kind, _, name = field.partition(".")
    given = dict(_leaves(cell.inputs.get(kind))).get(name)
    file = Path(str(given).rpartition(":")[0] or str(given)).name if isinstance(given, str) else ""
    return f"{file} ({field})" if "." in file else field


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _value(value: object) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value[:12]
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
