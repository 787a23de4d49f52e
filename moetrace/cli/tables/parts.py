"""Wide tables, in parts that fit the terminal's width: each begins with the same columns."""

from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from moetrace.cli.tables.output import widest, width_of

# Between two columns.
_GAP = 2


class TextColumn(NamedTuple):
    """A column of texts."""

    heading: str
    cells: list[str]
    right: bool = True

    @property
    def lines(self) -> list[str]:
        """All that it prints."""
        return [self.heading, *self.cells]


def print_parts(console: Console, keys: Sequence[TextColumn], groups: Sequence[Sequence[TextColumn]]) -> None:
    """Print `keys` and beside them groups of columns, which stay together, as long as they fit the console's width.

    A part has one group at least; where that is wider, the terminal breaks the lines.
    """
    parts: list[list[TextColumn]] = []
    for group in groups:
        if parts and _width([*parts[-1], *group]) <= console.width:
            parts[-1] += group
        else:
            parts.append([*keys, *group])
    width = console.width
    for number, part in enumerate(parts):
        if number:
            console.print()
        console.width = max(width, _width(part))  # in less, rich leaves out columns
        console.print(_table(part), crop=False, no_wrap=True)
    console.width = width


def _width(columns: Sequence[TextColumn]) -> int:
    return width_of([column.lines for column in columns], _GAP)


def _table(columns: list[TextColumn]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for column in columns:
        justify = "right" if column.right else "left"
        width = widest(column.lines)
        table.add_column(column.heading, justify=justify, vertical="bottom", no_wrap=True, min_width=width)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    return table
