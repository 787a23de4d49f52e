"""Columns of figures in tables of many cells: which there are, and how each is written."""

from collections.abc import Iterable, Sequence

import polars as pl

from moetrace.cli.tables.parts import TextColumn
from moetrace.results.figure_text import digits, shown_unit
from moetrace.results.record import COLUMNS
from moetrace.spec.errors import UsageError, printable
from moetrace.spec.named import nearest

# Digits behind the point, at least, in the unit that people are shown; of other figures by their unit.
_PLACES = {"total_s": 1, "ttft_s_p50": 2, "energy_per_token_j": 3, "gpu_memory_bytes": 2}
_BY_UNIT = {"s": 3, "bytes": 1, "1/s": 1, "share": 1, "J": 1, "USD": 2, "USD/h": 2, "ratio": 2, "count": 0}


# Figures that only some machines or policies have, in tables where nobody chooses and one is not zero.
SOME_HAVE = (
    *("gate_mass_dropped", "resent_bytes", "host_hit_rate", "disk_bytes", "moved_bytes", "evict_s"),
    *("remote_s", "remote_usd", "cold_s", "energy_j", "energy_per_token_j", "price_usd", "usd_per_million_tokens"),
    *("in_time", "mean_frequency"),
)


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


def text_column(frame: pl.DataFrame, name: str, title: str = "") -> TextColumn:
    """Return a figure of each row as people are shown it, `-` where it is undefined; `title`: another name for it."""
    figure = COLUMNS[name]
    values: Sequence[float | None] = frame[name].to_list()
    factor, sign = shown_unit(figure, values)
    scaled = [None if value is None else factor * value for value in values]
    texts = digits(scaled, _PLACES.get(name, _BY_UNIT[figure.unit]), 1 if figure.unit == "count" else 2)
    if figure.unit == "ratio":
        texts = _factors(texts)
    if title:
        return TextColumn(f"{title}\n{sign}".rstrip(), texts)
    return TextColumn(figure.column_in(sign) if figure.heading else _heading(name, sign), texts)


def ratio_column(frame: pl.DataFrame, name: str, heading: str) -> TextColumn:
    """Return a column of ratios that is no figure of a result, `-` where it is undefined."""
    return TextColumn(heading, _factors(digits(frame[name].to_list(), 2)))


def _factors(texts: Iterable[str]) -> list[str]:
    return [text if text == "-" else f"{text}x" for text in texts]


def _heading(name: str, sign: str) -> str:
    """The heading of a figure that no other table has: its name, and the unit."""
    return f"{name.replace('_s_', ' ').replace('_', ' ').removesuffix(' bytes').removesuffix(' s')}\n{sign}".rstrip()


def is_shown(frame: pl.DataFrame, name: str) -> bool:
    """Whether a row has a value of a figure that is not zero."""
    return name in frame.columns and any(frame[name].drop_nulls())
