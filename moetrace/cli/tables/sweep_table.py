"""The table of `moetrace sweep`: a row a cell, the axes that vary and what they lead to."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

from moetrace.cli.tables.figure_columns import SOME_HAVE, better, column_names, is_shown, text_column
from moetrace.cli.tables.output import figure, stdout_console
from moetrace.cli.tables.parts import TextColumn, print_parts
from moetrace.results.figure_text import digits
from moetrace.results.record import COLUMNS, FRONTS
from moetrace.spec.errors import UsageError

# Columns shown by default; a column that is zero or undefined in all cells is left out.
_SHOWN = (
    *("total_s", "speedup", "tokens_per_s", "ttft_s_p50", "tpot_s_p50", "tpot_s_p99", "itl_s_p50", "itl_s_p99"),
    *("hit_rate", "gpu_memory_bytes", "link_bytes", "price", *SOME_HAVE),
)
_AGAINST = {name: COLUMNS[name].label for name in FRONTS} | {"link_bytes": "bytes over the link"}
# The section that a system needs for a front against these.
_TABLES = {"energy_j": "[energy]", "price_usd": "a [price]", "price": "a [price]"}


class Shown(NamedTuple):
    """The shown part of a sweep.

    Attributes:
        columns: Figures, as a frame has them; empty for the usual ones.
        sort: The figure by which cells are sorted, the better first; None keeps the grid's order.
        top: How many cells; None for all.
        baseline: The reference of speed-ups, in words.
    """

    columns: Sequence[str] = ()
    sort: str | None = None
    top: int | None = None
    baseline: str = "the first policy"

    def of(self, cells: pl.DataFrame) -> pl.DataFrame:
        """Return the cells that are shown, in their order; those without the figure come last."""
        if self.sort is not None and self.sort in cells.columns:
            more = better(self.sort) == "higher"
            cells = cells.sort(self.sort, descending=more, nulls_last=True, maintain_order=True)
        return cells if self.top is None else cells[: self.top]


def view_of(columns: str | None, sort: str | None, top: int | None, baseline: str | None) -> Shown:
    """Read what the options of a command ask for. Raises UsageError for a figure that there is not."""
    chosen = column_names(columns.split(","), "--columns") if columns is not None else []
    by = column_names([sort], "--sort")[0] if sort is not None else None
    if by is not None and better(by) is None:
        raise UsageError(f"--sort {sort}: neither less nor more of it is better, so there is no order.")
    axis, _, value = (baseline or "").partition("=")
    words = f"{axis} {value}" if value else f"the first {axis or 'policy'}"
    return Shown(chosen, by, top, words)


def print_sweep(cells: pl.DataFrame, pareto: str, notes: list[str], view: Shown = Shown()) -> None:  # noqa: B008  immutable
    """Print the frame of a sweep as a table on stdout, and `notes` under it; `*` marks the Pareto front."""
    everything, cells = cells, view.of(cells)
    axes = everything.columns[2 : everything.columns.index("error")]
    varying = [axis for axis in axes if everything[axis].drop_nulls().n_unique() > 1] or ["policy"]
    keys = [TextColumn("", [_mark(row) for row in cells.iter_rows(named=True)], right=False)]
    for axis in varying:
        # A field's name is enough unless two axes end alike.
        heading = (
            axis.rpartition(".")[2] if sum(a.rpartition(".")[2] == axis.rpartition(".")[2] for a in axes) == 1 else axis
        )
        values = [figure(value) for value in cells[axis]]
        if axis == "slots":  # a cell that failed before its experts were counted has its 25% only in its name
            values = [
                _named_slots(name) if value == "-" else value for name, value in zip(cells["name"], values, strict=True)
            ]
        keys.append(TextColumn(heading, values, cells[axis].dtype.is_numeric()))
    names = [*view.columns] or [name for name in _SHOWN if is_shown(cells, name)]
    groups = [[text_column(cells, name)] for name in names if name in cells.columns]
    if "slo_miss" in cells.columns:
        groups.insert(0, [TextColumn("misses\n%", [_missed(value) for value in cells["slo_miss"]])])
    console = stdout_console()
    print_parts(console, keys, groups or [[]])
    console.print()
    if view.top is not None and len(cells) < len(everything):
        console.print(f"{len(cells):,} of {len(everything):,} cells.")
    for line in [*_legend(everything, axes, varying, pareto, view), *notes]:
        console.print(line)


def _mark(row: dict) -> str:
    """`*` on the front, `o` of an oracle, `!` of what does not fit."""
    beyond = "!" if row["fits"] is False else ""
    return f"o{beyond}" if row["oracle"] else beyond or ("*" if row["pareto"] else "")


def _missed(miss: float | None) -> str:
    return "-" if miss is None else digits([100 * miss], 1)[0] if miss else "kept"


def _named_slots(name: str) -> str:
    found = re.search(r"/slots=([^/]*)", name)
    return found[1] if found else "-"


def _legend(cells: pl.DataFrame, axes: list[str], varying: list[str], pareto: str, view: Shown) -> list[str]:
    constant = {axis: cells[axis].drop_nulls() for axis in axes if axis not in varying}
    same = [f"{axis} {figure(known[0])}" for axis, known in constant.items() if len(known)]
    lines = [f"In all cells: {', '.join(same)}."] if same else []
    if "total_s" not in cells.columns:
        return lines
    against = _AGAINST[pareto]
    of = ["trace"] if "trace" in varying or "model" in varying else []
    of += ["batch"] if "batch" in varying else []
    many = f" of its {' and '.join(of)}" if of else ""
    front = f"* Pareto front: no other cell{many} beats it in total time or {against} without losing in the other."
    if (table := _TABLES.get(pareto)) and (pareto not in cells.columns or cells[pareto].is_null().all()):
        front = f"No system lists {table}, so there is no front: give it one, or take another --pareto."
    if len(cells) > 1 and is_shown(cells, "speedup"):
        front += f" Speed-ups are against {view.baseline}, all else equal."
    if is_shown(cells, "gate_mass_dropped"):
        front += (
            " Gates lost: what rows go without on a relaxed link. No time counts that, so a cell that loses more may "
            "look better; a limit is --slo 'gate_mass_dropped<=1%'."
        )
    if "slo_miss" in cells.columns:
        front += " Cells that miss a limit are not on it."
    if cells["oracle"].any():
        front += " o knows the future: a bound, and nothing that an engine can run."
    if not cells["fits"].all():
        front += " ! does not fit the machine, and is priced as if it did."
    return [*lines, front]
