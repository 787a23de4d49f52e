"""Repeats of one time: their median, and how much they scatter."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Repeats on an idle machine lie within a few percent; above this the machine did something else beside.
MOST_SCATTER = 0.25


class Repeated(NamedTuple):
    """The median of some times, and the distance of their quartiles as a share of it."""

    seconds: float
    scatter: float


def repeated(times_s: Sequence[float]) -> Repeated:
    """Summarise at least two times."""
    low, median, high = statistics.quantiles(times_s, n=4, method="inclusive")
    return Repeated(median, (high - low) / median)


def doubts_of_repeats(part: str, scatters: Sequence[float]) -> list[str]:
    """Say in a sentence if the repeats of a part's times differ much."""
    middle = statistics.median(scatters)
    if middle <= MOST_SCATTER:
        return []
    return [
        f"Repeats of the same time differ much on the {part}: their quartiles lie {middle:.0%} of the median apart "
        "(in the median over its times); measure again while nothing else runs."
    ]
