"""How commands print: one `--format` for whatever is a table, on stdout."""

import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moetrace.spec.errors import counted, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moetrace.trace import Trace

_PIPED_WIDTH = 160  # what a pager or a file can take

format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="How to print: a table to read, or JSON or CSV with every digit.",
)


def print_json(value: object) -> None:
    """Print a value as JSON; it must not hold NaN or infinities, which JSON does not have."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def said_of(path: Path, trace: "Trace") -> str:
    """Return in a line what a trace file that was just written holds."""
    return (
        f"{path}: {printable(trace.model)}, {counted(trace.rows, 'row')} in {counted(trace.steps, 'step')}, "
        f"{path.stat().st_size / 1e6:,.1f} MB."
    )


def print_rows(headers: Mapping[str, str], rows: Sequence[Mapping[str, Any]], form: str) -> None:
    """Print rows as a table, JSON or CSV; `headers` maps each column's key (for JSON and CSV) to its table heading."""
    if form == "json":
        print_json([{key: row.get(key) for key in headers} for row in rows])
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(headers)
        writer.writerows([row.get(key) for key in headers] for row in rows)
    else:
        _print_table(headers, rows)


def figure(value: object) -> str:
    """A value for people: four digits of a number with a fraction, `-` for none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e12:
        return f"{value:.0f}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)


def stdout_console() -> "Console":
    """Return a rich console that prints what it is given, and leaves a broken pipe to `main`.

    Rich takes 80 columns where there is no terminal, and would fold a piped table to that.
    """
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    columns = os.environ.get("COLUMNS", "")
    stated = int(columns) if columns.isdecimal() and int(columns) > 0 else None
    width = stated or (None if sys.stdout.isatty() else _PIPED_WIDTH)
    return Plain(width=width, highlight=False, markup=False, emoji=False)


def width_of(columns: Sequence[Sequence[str]], gap: int) -> int:
    """Return how wide a table of these columns of cells is, `gap` between two."""
    return sum(map(widest, columns)) + gap * (len(columns) - 1)


def widest(column: Sequence[str]) -> int:
    """Return the length of the longest line of a column's cells."""
    return max(len(line) for cell in column for line in cell.split("\n"))


def widen(console: "Console", table: "Table") -> None:
    """Give a console the width that a table takes at least: in less, rich leaves out columns."""
    from rich.measure import Measurement

    unlimited = console.options.update(max_width=10_000)
    console.width = max(console.width, Measurement.get(console, unlimited, table).minimum)


def _print_table(headers: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    console = stdout_console()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column, (key, header) in enumerate(headers.items()):
        cells = [figure(row.get(key)) for row in rows]
        figures = all(isinstance(row.get(key), int | float | None) for row in rows)
        whole = figures or column == 0
        width = max(
            len(text) for cell in (*cells, header) for text in (cell.split("\n") if whole else cell.split() or [""])
        )
        table.add_column(header, justify="right" if figures else "left", min_width=width, no_wrap=whole)
    for row in rows:
        table.add_row(*(figure(row.get(key)) for key in headers))
    # Lines may wrap in a narrow terminal; words and figures stay whole, even if the terminal then breaks the line.
    widen(console, table)
    console.print(table)
