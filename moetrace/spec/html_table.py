"""Tables for notebooks, in which nothing that a stranger's file says is markup."""

from collections.abc import Iterable, Sequence
from html import escape

from moetrace.spec.errors import printable

MOST_ROWS = 50


def html_table(headings: Sequence[str], rows: Iterable[Sequence[object]], below: str = "") -> str:
    """Return a table as HTML.

    Args:
        headings: one a column.
        rows: values of each row; None is shown as `-`, a number with four digits, and right-aligned.
        below: a line under the table, of plain text.

    Returns:
        The markup. If there are more than 50 rows it has the first 50, and says so.
    """
    rows = list(rows)
    names = [heading.replace("-\n", "-") for heading in headings]  # as tables of text break `speed-up`
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:MOST_ROWS])
    more = [f"{len(rows) - MOST_ROWS:,} more rows"] if len(rows) > MOST_ROWS else []
    under = "".join(f"<p>{_text(line)}</p>" for line in [*more, *([below] if below else [])])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{under}"


def _cell(value: object) -> str:
    if isinstance(value, float) and not isinstance(value, bool):
        shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return f'<td style="text-align:right">{shown}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td style="text-align:right">{value:,}</td>'
    return f"<td>{'-' if value is None else _text(str(value))}</td>"


def _text(text: str) -> str:
    return escape(printable(" ".join(text.split())))
