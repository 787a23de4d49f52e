"""`gate`: the figures of a folder against a committed baseline, and a verdict on each cell."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrace.batch.baseline import Baseline, make_baseline, read_baseline, write_baseline
from moetrace.batch.identity import identity
from moetrace.batch.metrics import Tolerances, check_metrics, default_metrics
from moetrace.batch.verdict import VERDICTS, Judged, Moved, judge
from moetrace.results.folder import ResultFolder, read_cells
from moetrace.results.optional_figures import need_of
from moetrace.results.record import GATE_SCHEMA, METRICS, is_absent
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.forks import refuse_if_forked
from moetrace.spec.named import nearest

if TYPE_CHECKING:
    import polars as pl

# Worse is what a gate is for; missing, because a cell that is gone can't get worse; changed, because figures of other
# inputs say nothing about the cell that the baseline holds.
FAIL_ON = ("worse", "missing", "changed")


@dataclass(frozen=True, repr=False)
class Gate:
    """The findings of a gate.

    Attributes:
        cells: Every cell with its verdict, in the folder's order; then those that the folder lacks.
        fail_on: The verdicts that fail the gate.
        notes: Sentences that are not verdicts on a cell.
        updated: Whether the baseline was replaced; then nothing fails.
        dropped: Cells that the replaced baseline had and the new one lacks, or has without figures.
    """

    cells: tuple[Judged, ...]
    fail_on: tuple[str, ...]
    notes: tuple[str, ...]
    updated: bool = False
    dropped: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Gate {'passed' if self.passed else 'failed'}: {self.counted()}; .frame and .metrics are frames>"

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the cells that fail it."""
        return () if self.updated else tuple(cell.name for cell in self.cells if cell.verdict in self.fail_on)

    @property
    def passed(self) -> bool:
        """Whether no cell fails it."""
        return not self.failed

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many cells have each verdict."""
        found = Counter(cell.verdict for cell in self.cells)
        return {verdict: found[verdict] for verdict in VERDICTS}

    @cached_property
    def moved(self) -> tuple[Judged, ...]:
        """The cells that are not the same, the gravest first."""
        moved = (cell for cell in self.cells if cell.verdict != "same")
        return tuple(sorted(moved, key=lambda cell: VERDICTS.index(cell.verdict)))

    def counted(self) -> str:
        """`12 cells: 1 worse, 11 same`."""
        parts = [f"{count} {verdict}" for verdict, count in self.counts.items() if count]
        return f"{len(self.cells):,} cell{'' if len(self.cells) == 1 else 's'}: {', '.join(parts)}"

    @cached_property
    def frame(self) -> "pl.DataFrame":
        """One row a cell: `cell`, `verdict`, `failed`, `inputs` (kinds that changed, by commas), `why`."""
        import polars as pl

        failed = {*self.failed}
        rows = [(one.name, one.verdict, one.name in failed, ",".join(one.inputs), one.why) for one in self.cells]
        names = {"cell": pl.String, "verdict": pl.String, "failed": pl.Boolean, "inputs": pl.String, "why": pl.String}
        return pl.DataFrame(rows, schema=names, orient="row")

    @cached_property
    def metrics(self) -> "pl.DataFrame":
        """One row a cell and metric: what `rows` gives, without cells that have no figures."""
        import polars as pl

        names = ["cell", "cell_verdict", *_MOVED]
        texts = {"cell", "cell_verdict", "metric", "unit", "verdict"}
        schema = {name: pl.String if name in texts else pl.Float64 for name in names}
        return pl.DataFrame([row for row in self.rows() if row["metric"] is not None], schema=schema)

    def rows(self) -> list[dict[str, Any]]:
        """One row a cell and metric, one without a metric for a cell without figures."""
        found = []
        for cell in self.cells:
            for moved in cell.metrics or (None,):
                figures = _row(moved) if moved else dict.fromkeys(_MOVED)
                found.append({"cell": cell.name, "cell_verdict": cell.verdict} | figures)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        cells = [
            {
                "name": cell.name,
                "verdict": cell.verdict,
                "inputs": list(cell.inputs),
                "why": cell.why,
                "metrics": [_row(moved) for moved in cell.metrics],
            }
            for cell in self.cells
        ]
        return {
            "schema": GATE_SCHEMA,
            "passed": self.passed,
            "updated": self.updated,
            "fail_on": list(self.fail_on),
            "counts": self.counts,
            "failed": list(self.failed),
            "dropped": list(self.dropped),
            "notes": list(self.notes),
            "cells": cells,
        }


def gate(
    folder: str | os.PathLike[str],
    baseline: str | os.PathLike[str],
    *,
    tolerance: str | Iterable[str] = (),
    metrics: Sequence[str] | None = None,
    fail_on: str | Iterable[str] = FAIL_ON,
    update: bool = False,
) -> Gate:
    """Compare the figures of a folder with a baseline, or accept them as the new baseline.

    docs/gate.md defines the verdicts, and says why figures can be compared to the last bit.

    Args:
        folder: A folder that `sweep` or `replay` wrote.
        baseline: The JSON file; `update` makes it if it does not exist.
        tolerance: How far metrics may move: `0.5%` for all, `total_s=0.1%` for one, `total_s=0.002` for one in its own
            unit; one text or several. By default as far as rounding moves them (1e-9 of the baseline).
        metrics: The metrics that are compared. By default those of the baseline; for a new one what docs/gate.md names,
            as far as a cell has it.
        fail_on: The verdicts that fail the gate. "any" is all except "same".
        update: Write the folder's figures to `baseline`, whether they are better or worse.

    Returns:
        A verdict on each cell, and whether the gate passed.

    Raises:
        UsageError: A value is wrong or unknown, or the baseline is of another trace.
        MoetraceError: A file cannot be read or written, or is damaged.

    Examples:
        >>> import moetrace as mt
        >>> result = mt.replay("traces/tiny-olmoe.h5", slots=48)
        >>> result.write("results")
        >>> accepted = mt.gate("results", "baseline.json", update=True)
        >>> mt.gate("results", "baseline.json", tolerance="0.5%").counted()
        '2 cells: 2 same'
    """
    refuse_if_forked()
    folder, path = Path(folder), Path(baseline)
    if not isinstance(tolerance, Iterable):
        raise UsageError(f"tolerance is a text as 0.5% or several, got {tolerance!r}.")
    tolerances = Tolerances([tolerance] if isinstance(tolerance, str) else tolerance)
    verdicts = _checked_verdicts(fail_on)
    asked = None if metrics is None else check_metrics([metrics] if isinstance(metrics, str) else metrics)
    if asked == ():
        raise UsageError("A gate needs at least one metric.")
    found = read_cells(folder)
    old = _read(path, update, folder)
    compared = asked or old.metrics or default_metrics(cell.figures for cell in found.cells if cell.error is None)
    _check_accounts(folder, found, compared)
    if not update:
        _check_metrics_there(path, old, compared)
        _check_same_trace(folder, path, found, old)
    judged = tuple(judge(found, old, tolerances, compared, str(folder)))
    if not update:
        return Gate(judged, verdicts, _notes(found, old, judged))
    new = make_baseline(found, compared, str(folder), old)
    if all(cell.failed for cell in new.cells.values()):
        raise MoetraceError(f"{folder}: every cell failed, so there is nothing to accept: {path} is as it was.")
    write_baseline(path, new)
    return Gate(judged, verdicts, (), True, _dropped(old, new))


_MOVED = ("metric", "unit", "baseline", "value", "change", "relative", "allowed", "verdict")


def _dropped(old: Baseline, new: Baseline) -> tuple[str, ...]:
    lost = (name for name, cell in old.cells.items() if name not in new.cells or new.cells[name].failed > cell.failed)
    return tuple(sorted(lost))


def _row(moved: Moved) -> dict[str, Any]:
    return {"unit": METRICS[moved.metric].sign, **{key: getattr(moved, key) for key in _MOVED if key != "unit"}}


def _checked_verdicts(names: str | Iterable[str]) -> tuple[str, ...]:
    if names == "any":
        return VERDICTS[:-1]
    wanted = {names} if isinstance(names, str) else {*names}
    for name in sorted(wanted):
        if name not in VERDICTS or name == "same":
            known = VERDICTS[:-1]
            raise UsageError(f"{name!r} is no verdict to fail on{nearest(name, list(known))}: {', '.join(known)} are.")
    if not wanted:  # as of a variable that is not set
        raise UsageError(f"A gate that fails on no verdict gates nothing: name some of {', '.join(VERDICTS[:-1])}.")
    return tuple(verdict for verdict in VERDICTS if verdict in wanted)


def _read(path: Path, update: bool, folder: Path) -> Baseline:
    if not path.exists():
        if not update:
            raise MoetraceError(f"There is no file {path}: --update makes it from what {folder} holds.")
        return Baseline("", None, {}, {})
    return read_baseline(path)


def _check_metrics_there(path: Path, baseline: Baseline, wanted: Sequence[str]) -> None:
    if not baseline.cells:
        raise MoetraceError(f"{path} holds no cell, so it gates nothing: --update puts them in.")
    for name, cell in baseline.cells.items():
        lacking = [metric for metric in wanted if metric not in cell.metrics and not cell.failed]
        if lacking:
            raise UsageError(
                f"{path}: {name} has no {lacking[0]}, but {', '.join(cell.metrics)}: --update with --metric puts it in."
            )


def _check_accounts(folder: Path, found: ResultFolder, wanted: Sequence[str]) -> None:
    """Raise a UsageError if no cell of the folder has a figure of some replays that is to be compared."""
    good = [cell.figures for cell in found.cells if cell.error is None]
    for metric in wanted:
        need = need_of(metric)
        if need is not None and good and all(is_absent(metric, figures) for figures in good):
            raise UsageError(
                f"{folder}: no cell has {metric}, as no {need.what}: {need.add}, or compare other metrics."
            )


def _check_same_trace(folder: Path, path: Path, found: ResultFolder, baseline: Baseline) -> None:
    """Raise a UsageError if no trace of the folder is one of the baseline: there is nothing to compare."""
    here = {identity(cell.inputs["trace"]): cell.trace for cell in found.cells if "trace" in cell.inputs}
    there = {cell.inputs.get("trace") for cell in baseline.cells.values() if not cell.failed}
    if here and there and not there & here.keys():
        one, other = next(iter(here.items())), next(iter(there))
        raise UsageError(
            f"{path} is a baseline of another trace: it is of {_trace(other, baseline.specs.get(str(other)))}, "
            f"{folder} of {_trace(*one)}. Compare with that trace's baseline, or accept this one with --update."
        )


def _trace(identity: str | int | None, facts: dict[str, Any] | None) -> str:
    known = facts or {}
    rows = known.get("rows")
    what = [str(known.get("model", "")), f"{rows:,} rows" if isinstance(rows, int) else "", str(identity)]
    return f"{what[0][:100]} ({', '.join(part for part in what[1:] if part)})".strip()


def _notes(found: ResultFolder, baseline: Baseline, judged: Sequence[Judged]) -> tuple[str, ...]:
    notes = []
    failing = sum(cell.verdict == "same" and cell.failed for cell in judged)
    if failing:
        notes.append(f"of the cells that are the same, {failing:,} failed, as when the baseline was made.")
    if all(cell.verdict in ("same", "new") for cell in judged):
        if found.moetrace != baseline.moetrace:
            notes.append(f"moetrace {baseline.moetrace} -> {found.moetrace} moved no figure.")
        elif found.engine and baseline.engine and found.engine != baseline.engine:
            notes.append("the engine's code changed since the baseline, and moved no figure.")
    return tuple(notes)
