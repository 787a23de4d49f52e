"""The table of `moetrace sweep`: a row a cell, the axes that vary and what they lead to."""

import re

import polars as pl

from moetrace.cli.tables.output import figure, stdout_console
from moetrace.cli.tables.parts import TextColumn, print_parts
from moetrace.results.record import COLUMNS, COSTS

# Columns of the frame, and how a number of each is written in the unit that people are shown; those that are zero or
# undefined in all cells are left out.
_FORMS = {
    "total_s": "{:,.1f}",
    "speedup": "{:.2f}x",
    "ttft_s_p50": "{:,.2f}",
    "tpot_s_p50": "{:,.3f}",
    "itl_s_p50": "{:,.3f}",
    "itl_s_p99": "{:,.3f}",
    "tokens_per_s": "{:,.1f}",
    "hit_rate": "{:.1f}",
    "gpu_memory_bytes": "{:,.2f}",
    "link_bytes": "{:,.1f}",
    "price": "{:,.0f}",
}
_AGAINST = {"gpu_memory_bytes": COSTS["gpu_memory_bytes"].label, "link_bytes": "bytes over the link"}


def print_sweep(cells: pl.DataFrame, pareto: str, notes: list[str]) -> None:
    """Print the frame of a sweep as a table on stdout, and `notes` under it; `*` marks the Pareto front."""
    axes = cells.columns[2 : cells.columns.index("error")]
    varying = [axis for axis in axes if cells[axis].drop_nulls().n_unique() > 1] or ["policy"]
    keys = [TextColumn("", ["*" if on else "" for on in cells["pareto"]], right=False)]
    for axis in varying:
        # A field's name is enough unless two axes end alike.
        heading = (
            axis.rpartition(".")[2] if sum(a.rpartition(".")[2] == axis.rpartition(".")[2] for a in axes) == 1 else axis
        )
        values = [figure(value) for value in cells[axis]]
        if axis == "slots":  # 25%, of a cell that failed before its experts were counted, stands in its name alone
            values = [
                _named_slots(name) if value == "-" else value for name, value in zip(cells["name"], values, strict=True)
            ]
        keys.append(TextColumn(heading, values, cells[axis].dtype.is_numeric()))
    figures = []
    for name, form in _FORMS.items():
        if name in cells.columns and any(cells[name].drop_nulls()):
            factor, _ = COLUMNS[name].shown
            texts = ["-" if value is None else form.format(factor * value) for value in cells[name]]
            figures.append([TextColumn(COLUMNS[name].column, texts)])
    console = stdout_console()
    print_parts(console, keys, figures or [[]])
    console.print()
    for line in [*_legend(cells, axes, varying, pareto), *notes]:
        console.print(line)


def _named_slots(name: str) -> str:
    found = re.search(r"/slots=([^/]*)", name)
    return found[1] if found else "-"


def _legend(cells: pl.DataFrame, axes: list[str], varying: list[str], pareto: str) -> list[str]:
    constant = {axis: cells[axis].drop_nulls() for axis in axes if axis not in varying}
    same = [f"{axis} {figure(known[0])}" for axis, known in constant.items() if len(known)]
    lines = [f"In all cells: {', '.join(same)}."] if same else []
    if "total_s" not in cells.columns:
        return lines
    against = _AGAINST.get(pareto, "price")
    many = " of its trace" if "trace" in varying or "model" in varying else ""
    front = f"* Pareto front: no other cell{many} beats it in total time or {against} without losing in the other."
    if pareto == "price" and cells["price"].is_null().all():
        front = "No system lists a [price], so there is no front: give it one, or take another --pareto."
    if "policy" in varying:
        front += " Speed-ups are against the first policy, all else equal."
    return [*lines, front]
