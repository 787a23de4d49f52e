"""How figures are written for people: digits and units with which a value that is not zero never reads as zero."""

import math
from collections.abc import Iterable, Sequence

from moetrace.results.figure import Figure

# Smaller units of what people are shown in ms and GB: the size from which each is taken, factor and sign.
_UNITS = {
    "s": ((1e-5, 1e3, "ms"), (1e-8, 1e6, "µs"), (0.0, 1e9, "ns")),
    "bytes": ((1e7, 1e-9, "GB"), (1e4, 1e-6, "MB"), (10.0, 1e-3, "kB"), (0.0, 1.0, "B")),
}
_ROUNDING = 1e-12  # of a time: what sums in another order may differ by
_MOST_PLACES = 9
_MORE_PLACES = 3  # that the smallest value of a column may add


def shown_unit(figure: Figure, values: Iterable[float | None]) -> tuple[float, str]:
    """Return factor and sign of the unit that suits the largest of some values: ms and GB, or the next smaller ones."""
    largest = _largest(values)
    if largest == 0.0:
        return figure.shown
    units = _UNITS.get(figure.unit, ())
    return next(((factor, sign) for least, factor, sign in units if largest >= least), figure.shown)


def digits(values: Sequence[float | None], places: int = 0, significant: int = 2, signed: bool = False) -> list[str]:
    """Return the values of a column, all with the same number of digits after the point; `-` where undefined.

    Args:
        values: In the unit of the column.
        places: Digits behind the point, at least.
        significant: Digits of the largest value, at least.
        signed: Whether a value above zero has a plus.

    A nonzero value shows a nonzero digit: the column gets up to three more places for it, and smaller values are
    written as 2e-07.
    """
    known = [abs(value) for value in values if value]
    if known:
        places = max(places, significant - 1 - _exponent(max(known)))
        places = min(places, _MOST_PLACES)
        hidden = [value for value in known if not round(value, places)]
        more = [-_exponent(value) for value in hidden]
        places = max((each for each in more if each <= min(places + _MORE_PLACES, _MOST_PLACES)), default=places)
    sign = "+" if signed else ""
    return ["-" if value is None else _text(value, places, sign) for value in values]


def amount(value: float, figure: Figure, places: int = 1) -> str:
    """Return one value with its unit, for a sentence: `2.3 GB`, `41 kB`, `0.0021 USD`."""
    factor, sign = shown_unit(figure, [value])
    return f"{digits([factor * value], places)[0]} {sign}".rstrip()


def beyond(seconds: float, yardstick_s: float) -> float:
    """Return by how much a time is above a yardstick; 0.0 where they differ only by rounding."""
    over_s = seconds - yardstick_s
    return over_s if abs(over_s) > _ROUNDING * abs(seconds) else 0.0


def percent(share: float, places: int = 1) -> str:
    """Return a share in percent, for a sentence: `3.4 %`."""
    return f"{digits([100 * share], places, 1)[0]} %"


def _text(value: float, places: int, sign: str) -> str:
    if value and not round(value, places):
        return f"{value:{sign}.0e}"
    return f"{round(value, places) + 0.0:{sign},.{places}f}"  # adding zero turns -0.0 into 0.0


def _exponent(value: float) -> int:
    return math.floor(math.log10(value))


def _largest(values: Iterable[float | None]) -> float:
    return max((abs(value) for value in values if value is not None), default=0.0)
