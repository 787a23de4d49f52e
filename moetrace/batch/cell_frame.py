"""All cells as one frame, with marks: cells that no other beats in both latency and cost, and mere bounds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from moetrace.batch.candidates import knows_future
from moetrace.batch.cell import Cell
from moetrace.batch.grid_labels import shown_label
from moetrace.batch.slo import Slo, worst_miss
from moetrace.results.record import COSTS
from moetrace.results.summary import summary_frame
from moetrace.spec import check_fits
from moetrace.spec.errors import UsageError

_LABELS = ("trace", "model", "system", "policy", "slots")


def axes_of(cell: Cell) -> dict[str, Any]:
    """The labels of a cell: trace, model, system, policy, slots, and each other axis by its path."""
    labels: dict[str, Any] = dict(cell.point.labels)
    if cell.setup is not None and cell.inputs is not None:
        labels = {"model": cell.setup.model.name} | labels | {"slots": cell.inputs["slots"]}
    elif isinstance(labels.get("slots"), str):  # 25%: how many that would have been, the cell did not come to know
        labels["slots"] = None
    return {kind: labels.pop(kind, None) for kind in _LABELS} | labels


def cell_frame(
    cells: Sequence[Cell], found: Mapping[str, Mapping[str, Any]], pareto: str, slos: Sequence[Slo] = ()
) -> pl.DataFrame:
    """Return one row a cell: name, hash, labels, error, marks, figures, costs, and whether it is on the Pareto front.

    The marks are `oracle` (the policy knows the future), `fits` (the GPU's memory holds dense weights and slots, and
    the units all experts) and, with limits, `slo_miss` (the share by which it misses one, null where that is
    undefined). The front is of `total_s` against the column `pareto`, among the cells of one trace, batch and model
    that could run and keep the limits. `speedup` is against the first cell that differs in nothing but the policy, None
    if that failed.
    """
    rows = []
    for cell in cells:
        good = cell.error is None and cell.key is not None
        rows.append({"name": cell.name, "cell": cell.key if good else None} | axes_of(cell) | {"error": cell.error})
    names = dict.fromkeys(name for row in rows for name in row if name != "error")
    frame = pl.DataFrame({name: _column([row.get(name) for row in rows], name) for name in [*names, "error"]})
    good = [row["cell"] for row in rows]
    oracle = [None if cell.setup is None else knows_future(cell.policy) for cell in cells]
    fitting = [fits(cell, found[key]) if key else None for cell, key in zip(cells, good, strict=True)]
    frame = frame.with_columns(pl.Series("oracle", oracle, pl.Boolean), pl.Series("fits", fitting, pl.Boolean))
    if slos:
        misses = [worst_miss(slos, found[key]["result"]["policies"][0]) if key else math.inf for key in good]
        misses = [None if math.isinf(miss) else miss for miss in misses]
        frame = frame.with_columns(pl.Series("slo_miss", misses, pl.Float64))
    policies = [found[key]["result"]["policies"][0] if key else None for key in good]
    known = [policy for policy in policies if policy]
    if known:
        figures = summary_frame(known).drop("name")
        places = pl.Series([i for i, policy in enumerate(policies) if policy], dtype=pl.UInt32)
        frame = frame.with_row_index("_at").join(
            figures.with_columns(places.alias("_at")), on="_at", how="left", maintain_order="left"
        )
        frame = frame.drop("_at")
    for cost in COSTS:
        values = [found[key]["costs"][cost] if key else None for key in good]
        frame = frame.with_columns(pl.Series(cost, values, dtype=pl.Float64))
    if not known:
        return frame.with_columns(pl.lit(None, pl.Boolean).alias("pareto"))
    return frame.with_columns(speedups(cells, frame, ("policy",)), pareto_marks(frame, pareto))


def _column(values: list[Any], name: str) -> pl.Series:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int} and name != "cell":
        return pl.Series(values, dtype=pl.Int64 if kinds else pl.String)
    if kinds <= {int, float}:
        return pl.Series([None if value is None else float(value) for value in values], dtype=pl.Float64)
    if kinds == {bool}:
        return pl.Series(values, dtype=pl.Boolean)
    return pl.Series([None if value is None else str(value) for value in values], dtype=pl.String)


def fits(cell: Cell, found: Mapping[str, Any]) -> bool:
    """Whether a machine has room for what a cell replays on it: dense weights and slots, and experts in the units."""
    assert cell.setup is not None
    setup, system = cell.setup, cell.setup.system
    room = (system.gpu.memory_gb - system.gpu.reserve_gb) * 1e9
    if found["costs"]["gpu_memory_bytes"] > room * (1 + 1e-12):
        return False
    if not setup.ignore_capacity:
        return True
    try:
        check_fits(setup.model, system, setup.model.expert_bytes())
    except UsageError:
        return False
    return True


def speedups(cells: Sequence[Cell], frame: pl.DataFrame, fields: Sequence[str], value: str | None = None) -> pl.Series:
    """Return for each cell the time of the one that differs in nothing but `fields` / its own; None if that failed.

    The other is the one whose label of the first field is `value`, by default the first.
    """
    base: dict[tuple, float | None] = {}
    keys = []
    for cell, seconds in zip(cells, frame["total_s"], strict=True):
        # Cells are matched by the labels that were asked for: a failed cell may lack the derived ones.
        others = tuple((axis, label) for axis, label in cell.point.labels.items() if axis not in fields)
        keys.append(others)
        if value is None or shown_label(cell.point.labels[fields[0]]) == value:
            base.setdefault(others, seconds)
    pairs = [(base.get(others), seconds) for others, seconds in zip(keys, frame["total_s"], strict=True)]
    return pl.Series("speedup", [a / b if a and b else None for a, b in pairs], dtype=pl.Float64)


def pareto_marks(frame: pl.DataFrame, cost: str) -> pl.Series:
    """Return for each cell whether no other of its trace and model beats it in both `total_s` and `cost`.

    None for a cell without a time. A cell that knows the future, does not fit or misses a limit is not on the front and
    beats nobody; of equal cells only the first is on it.
    """
    marks: list[bool | None] = [None] * len(frame)
    groups: dict[tuple, list[tuple[float, float, int]]] = {}
    of = [name for name in ("trace", "batch", "model") if name in frame.columns]
    for at, row in enumerate(frame.iter_rows(named=True)):
        if row["total_s"] is not None:
            marks[at] = False
            if row.get(cost) is not None and _counts(row):
                groups.setdefault(tuple(row[name] for name in of), []).append((row["total_s"], row[cost], at))
    for members in groups.values():
        best = (float("inf"), float("inf"))
        for seconds, spent, at in sorted(members):
            if spent < best[1]:
                best = (seconds, spent)
                marks[at] = True
    return pl.Series("pareto", marks, dtype=pl.Boolean)


def _counts(row: Mapping[str, Any]) -> bool:
    """Whether a cell could run, without knowing the future, and keeps the limits."""
    return not row.get("oracle") and row.get("fits") is not False and row.get("slo_miss", 0.0) == 0.0
