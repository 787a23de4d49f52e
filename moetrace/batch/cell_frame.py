"""All cells as one frame, with the ones marked that no other beats in both latency and cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from moetrace.batch.cell import Cell
from moetrace.results.record import COSTS
from moetrace.results.summary import summary_frame

_LABELS = ("trace", "model", "system", "policy", "slots")


def axes_of(cell: Cell) -> dict[str, Any]:
    """The labels of a cell: trace, model, system, policy, slots, and each other axis by its path."""
    labels: dict[str, Any] = dict(cell.point.labels)
    if cell.setup is not None and cell.inputs is not None:
        labels = {"model": cell.setup.model.name} | labels | {"slots": cell.inputs["slots"]}
    elif isinstance(labels.get("slots"), str):  # 25%: how many that would have been, the cell did not come to know
        labels["slots"] = None
    return {kind: labels.pop(kind, None) for kind in _LABELS} | labels


def cell_frame(cells: Sequence[Cell], found: Mapping[str, Mapping[str, Any]], pareto: str) -> pl.DataFrame:
    """Return one row a cell: name, hash, labels, error, figures, costs, and whether it is on the Pareto front.

    The front is of `total_s` against the column `pareto`, among the cells of one trace and model. `speedup` is against
    the first cell that differs in nothing but the policy, None if that failed.
    """
    rows = []
    for cell in cells:
        good = cell.error is None and cell.key is not None
        rows.append({"name": cell.name, "cell": cell.key if good else None} | axes_of(cell) | {"error": cell.error})
    names = dict.fromkeys(name for row in rows for name in row if name != "error")
    frame = pl.DataFrame({name: _column([row.get(name) for row in rows], name) for name in [*names, "error"]})
    good = [row["cell"] for row in rows]
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
    return frame.with_columns(_speedups(cells, frame), pareto_marks(frame, pareto))


def _column(values: list[Any], name: str) -> pl.Series:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int} and name != "cell":
        return pl.Series(values, dtype=pl.Int64 if kinds else pl.String)
    if kinds <= {int, float}:
        return pl.Series([None if value is None else float(value) for value in values], dtype=pl.Float64)
    if kinds == {bool}:
        return pl.Series(values, dtype=pl.Boolean)
    return pl.Series([None if value is None else str(value) for value in values], dtype=pl.String)


def _speedups(cells: Sequence[Cell], frame: pl.DataFrame) -> pl.Series:
    first: dict[tuple, float | None] = {}
    speedups = []
    for cell, seconds in zip(cells, frame["total_s"], strict=True):
        # By what was asked for: of a cell that failed, what that led to may not be known.
        others = tuple((axis, label) for axis, label in cell.point.labels.items() if axis != "policy")
        base = first.setdefault(others, seconds)
        speedups.append(base / seconds if base and seconds else None)
    return pl.Series("speedup", speedups, dtype=pl.Float64)


def pareto_marks(frame: pl.DataFrame, cost: str) -> pl.Series:
    """Return for each cell whether no other of its trace and model beats it in both `total_s` and `cost`.

    None for a cell without a time.
    """
    marks: list[bool | None] = [None] * len(frame)
    groups: dict[tuple, list[tuple[float, float, int]]] = {}
    for at, (trace, model, seconds, spent) in enumerate(frame.select("trace", "model", "total_s", cost).iter_rows()):
        if seconds is not None:
            marks[at] = False
            if spent is not None:
                groups.setdefault((trace, model), []).append((seconds, spent, at))
    for members in groups.values():
        best = (float("inf"), float("inf"))
        for seconds, spent, at in sorted(members):
            if spent < best[1] or (seconds, spent) == best:
                best = (seconds, spent)
                marks[at] = True
    return pl.Series("pareto", marks, dtype=pl.Boolean)
