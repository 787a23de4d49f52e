"""The record of a figure: its unit, meaning and direction. `results.record` lists the figures."""

from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=1 << 62)]  # JSON knows no limit, a column does

# Units in printed figures: factor and sign.
SHOWN_UNITS = {"s": (1e3, "ms"), "bytes": (1e-9, "GB"), "share": (100.0, "%")}


class Figure(NamedTuple):
    """The meaning of a number in a file.

    Attributes:
        unit: seconds, bytes, 1/s, a share of 1, joules, USD, USD an hour, a plain ratio, or how many.
        meaning: one line of Markdown.
        better: which of two values is better; None if neither is.
        label: its name in a report, without the unit; a figure without one is not in the report's table.
        heading: its name over a column of the terminal's tables, without the unit; "" if no table has it.
            For a spread, tables add the name of each part except the median.
        gated: whether a baseline may hold it.
    """

    unit: Literal["s", "bytes", "1/s", "share", "J", "USD", "USD/h", "ratio", "count"]
    meaning: str
    better: Literal["lower", "higher"] | None = None
    label: str = ""
    heading: str = ""
    gated: bool = True

    @property
    def sign(self) -> str:
        """The unit as files for other tools have it: nothing for a ratio or a count."""
        return "" if self.unit in ("ratio", "count") else self.unit

    @property
    def shown(self) -> tuple[float, str]:
        """Factor and sign of the unit that people are shown: ms, GB, %."""
        return SHOWN_UNITS.get(self.unit, (1.0, self.sign))

    @property
    def column(self) -> str:
        """Its heading with the unit that people are shown, on two lines."""
        return self.column_in(self.shown[1])

    def column_in(self, sign: str) -> str:
        """Return its heading with a unit, on two lines."""
        between = " " if "\n" in self.heading else "\n"
        return f"{self.heading}{between}{sign}".rstrip()


class Spread(msgspec.Struct):
    """Mean, quantiles and maximum; None where nothing is defined."""

    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None
    max: float | None
