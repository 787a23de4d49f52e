"""How commands print: one `--format` for all tables, on stdout."""

import csv
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moetrace.spec.errors import UsageError, counted, harmless, inert, printable

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console
    from rich.table import Table

    from moetrace.trace import Trace

_PIPED_WIDTH = 160  # what a pager or a file can take

# Text that a spreadsheet takes for a formula begins so; a tab or a line's end only hides such a sign.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_SAFE_CSV = "moetrace.safe_csv"


def safe_csv_option(command: Callable) -> Callable:
    """Give a command that has a `--format` (parameter `form`) the option `--safe-csv`, which `print_csv` knows of."""

    @click.option(
        "--safe-csv",
        is_flag=True,
        help="With --format csv: put an apostrophe before texts that a spreadsheet would take for formulas.",
    )
    @functools.wraps(command)
    def with_option(*arguments: Any, safe_csv: bool, **options: Any) -> Any:
        if safe_csv and options["form"] != "csv":
            raise UsageError("--safe-csv goes with --format csv.")
        click.get_current_context().meta[_SAFE_CSV] = safe_csv
        return command(*arguments, **options)

    return with_option


def format_option(command: Callable) -> Callable:
    """Give a command the options `--format` (parameter `form`) and `--safe-csv`."""
    return _format_option(command, (), "or JSON or CSV with every digit.")


def format_option_with(form: str, meaning: str) -> Callable[[Callable], Callable]:
    """Return `format_option` with one more form."""
    return lambda command: _format_option(command, (form,), f"JSON or CSV with every digit, or {meaning}.")


def _format_option(command: Callable, more: tuple[str, ...], rest: str) -> Callable:
    return click.option(
        "--format",
        "form",
        type=click.Choice(["table", "json", "csv", *more]),
        default="table",
        show_default=True,
        help=f"How to print: a table to read, {rest}",
    )(safe_csv_option(command))


def say(line: str) -> None:
    """Print a line on stderr; control characters in strangers' names are escaped."""
    click.echo(harmless(line), err=True)


def print_text(text: str) -> None:
    """Print lines on stdout in which strangers' names, `printable` already, may stand."""
    click.echo(inert(text))


def print_json(value: object) -> None:
    """Print a value as JSON; it must not hold NaN or infinities, which JSON does not have."""
    encoded = json.dumps(value, indent=2, allow_nan=False)
    click.echo(encoded.replace("##", "\\u0023#"))  # the same value, but no `##vso[...]` to a CI log


def print_csv(frame: "pl.DataFrame") -> None:
    """Print a frame as CSV."""
    sys.stdout.write(csv_of(frame))


def csv_of(frame: "pl.DataFrame") -> str:
    """Return a frame as CSV; its texts are made printable, and with `--safe-csv` none is a formula."""
    import polars as pl

    shown = _csv_text()
    is_text = [pl.col(name) for name, kind in frame.schema.items() if kind == pl.String]
    frame = frame.with_columns(each.map_elements(shown, return_dtype=pl.String) for each in is_text)
    return inert(frame.rename(printable).write_csv())


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
        text, shown = io.StringIO(), _csv_text()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(headers)
        for row in rows:
            values = [row.get(key) for key in headers]
            writer.writerow([shown(value) if isinstance(value, str) else value for value in values])
        sys.stdout.write(inert(text.getvalue()))
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
    return printable(str(value))


class _Inert:
    """Stdout, on which no line is a command to a CI log; it is the console's that sees where a table folds a text."""

    def write(self, text: str) -> int:
        return sys.stdout.write(inert(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


def stdout_console() -> "Console":
    """Return a rich console that prints what it is given, and leaves a broken pipe to `main`.

    Rich takes 80 columns where there is no terminal, and would fold a piped table to that.
    """
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

        def render_str(self, text: str, **style: Any) -> Text:
            # `text` is a printed text or a cell. Line ends are kept: they are ours.
            return super().render_str("\n".join(map(printable, text.split("\n"))), **style)

    columns = os.environ.get("COLUMNS", "")
    stated = int(columns) if columns.isdecimal() and int(columns) > 0 else None
    width = stated or (None if sys.stdout.isatty() else _PIPED_WIDTH)
    file: Any = _Inert()
    # With a height, rich does not take 80 columns where TERM is dumb.
    return Plain(file=file, width=width, height=25, highlight=False, markup=False, emoji=False)


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


def _csv_text() -> Callable[[str], str]:
    """Return what makes the text of a cell printable, and with the running command's `--safe-csv` no formula.

    The option is read here: Polars may call that in a thread, where click knows of no command.
    """
    context = click.get_current_context(silent=True)
    is_safe = context is not None and context.meta.get(_SAFE_CSV, False)
    return lambda text: f"'{printable(text)}" if is_safe and text.startswith(_FORMULA) else printable(text)


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
