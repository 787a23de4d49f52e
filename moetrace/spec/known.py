"""How well the constants of a system are known: measured, calibrated with an error, from a data sheet, fitted to
published speeds of whole engines, or assumed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Known = Literal["measured", "data sheet", "published", "assumed"]
_WORDS = {
    "measured": "measured",
    "data sheet": "from data sheets",
    "published": "from data sheets, published speeds and assumptions",
    "assumed": "from data sheets and assumptions",
}


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well fitted constants of a part predict what they were not fitted to.

    Attributes:
        source: The table of measured times.
        points: Number of times.
        shapes: Number of shapes of experts, or of sizes of copies.
        median_error: Median of |predicted / measured - 1| on shapes that were not fitted.
        p90_error: 90th percentile of the same.
    """

    source: str
    points: Annotated[int, Meta(ge=1)]
    shapes: Annotated[int, Meta(ge=2)]
    median_error: Annotated[float, Meta(ge=0, le=1e6)]
    p90_error: Annotated[float, Meta(ge=0, le=1e6)]


def how_known(
    known: Known | None, calibration: Mapping[str, Calibration] | None, parts: Sequence[str] = ()
) -> str | None:
    """Say in a few words how well a system's constants are known; None if it does not say.

    Those of `parts`, as `cpu`, that are not calibrated are named.
    """
    others = ", ".join(part for part in parts if part not in (calibration or {}))
    words = [
        f"{part.replace('_', ' ')} calibrated (error {fit.median_error:.1%} in the median, {fit.p90_error:.1%} at p90)"
        for part, fit in (calibration or {}).items()
    ]
    if known is not None:
        of = f"{others} " if others else "the rest " if words else ""
        words.append(f"{of}{_WORDS[known]}{'' if words else ', not calibrated'}")
    return ", ".join(words) or None


def known_unlike(systems: Iterable[tuple[str, Known | None, Mapping[str, Calibration] | None]]) -> str | None:
    """Say which of the systems that are compared are calibrated, if others are not; None if they are alike.

    Args:
        systems: Name, `known` and `calibration` of each.
    """
    fitted: dict[str, None] = {}
    others: dict[str, None] = {}
    for name, known, calibration in systems:
        (fitted if calibration or known == "measured" else others)[name] = None
    if not fitted or not others:
        return None
    return (
        f"Constants of {_names(fitted)} are calibrated, those of {_names(others)} are not: peaks of data sheets make a "
        "machine look faster than it is."
    )


def _names(names: Iterable[str]) -> str:
    first, *more = names
    return f"{', '.join([first, *more[:3]])}{f' and {len(more) - 3} more' if len(more) > 3 else ''}"
