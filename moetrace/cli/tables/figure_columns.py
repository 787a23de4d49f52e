"""Columns of figures in tables of many cells: which there are, and how each is written."""

from collections.abc import Iterable, Sequence

import polars as pl

from moetrace.cli.tables.parts import TextColumn
from moetrace.results.record import COLUMNS
from moetrace.spec.errors import UsageError, printable
from moetrace.spec.named import nearest

# How a number is written in the unit that people are shown; of other figures by their unit.
_FORMS = {
    "total_s": "{:,.1f}",
    "ttft_s_p50": "{:,.2f}",
    "price_usd": "{:,.3g}",
    "remote_usd": "{:,.3g}",
    "energy_per_token_j": "{:,.3f}",
    "gpu_memory_bytes": "{:,.2f}",
}
_BY_UNIT = {"s": "{:,.3f}", "bytes": "{:,.1f}", "1/s": "{:,.1f}", "share": "{:.1f}"}
_BY_UNIT |= {"J": "{:,.1f}", "USD": "{:,.2f}", "USD/h": "{:,.2f}"}
_BY_UNIT |= {"ratio": "{:.2f}x", "count": "{:,.0f}"}


def column_names(names: Iterable[str], option: str) -> list[str]:
    """Return figures as a frame has them, without repetitions: `tpot_s_p99` of `tpot_s.p99`.

    Raises UsageError, which begins with `option`, if there is no such figure.
    """
    found = []
    for name in names:
        column = name.strip().replace(".", "_")
        if column not in COLUMNS:
            near = nearest(column, [*COLUMNS])
            raise UsageError(
                f"{option}: {printable(name[:100])!r} is no figure{near}; docs/results.md lists them, as total_s and "
                "tpot_s.p99."
            )
        found.append(column)
    return list(dict.fromkeys(found))


def better(name: str) -> str | None:
    """Return which of two values of a column is better: lower or higher; None if neither is."""
    return COLUMNS[name].better


def text_column(frame: pl.DataFrame, name: str) -> TextColumn:
    """Return a figure of each row as people are shown it, `-` where it is undefined."""
    figure = COLUMNS[name]
    factor, _ = figure.shown
    form = _FORMS.get(name, _BY_UNIT[figure.unit])
    values: Sequence[float | None] = frame[name].to_list()
    texts = ["-" if value is None else form.format(factor * value + 0.0) for value in values]
    return TextColumn(figure.column if figure.heading else _heading(name), texts)


def _heading(name: str) -> str:
    """The heading of a figure that no other table has: its name, and the unit that people are shown."""
    _, sign = COLUMNS[name].shown
    return f"{name.replace('_s_', ' ').replace('_', ' ').removesuffix(' bytes').removesuffix(' s')}\n{sign}".rstrip()


def is_shown(frame: pl.DataFrame, name: str) -> bool:
    """Whether a row has a value of a figure that is not zero."""
    return name in frame.columns and any(frame[name].drop_nulls())
