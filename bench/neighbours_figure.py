"""A figure of docs/related-systems.md, and how it is written (neighbours.py writes the page)."""

from collections.abc import Sequence
from typing import NamedTuple

import moetrace as mt

EXACT, SHAPE, PLAUSIBLE, SHOWN = "exact", "direction", "plausible", ""


class Figure(NamedTuple):
    """Something that a paper says, or that follows from its text, beside what comes out here."""

    what: str
    paper: str
    here: str
    judged: str
    holds: bool | None  # None: shown, not judged
    why: str = ""


def numbers(values: Sequence[float], form: str = "{:.2f}", unit: str = "") -> str:
    return " / ".join(form.format(value) for value in values) + unit


def span(values: Sequence[float], form: str = "{:.2f}x") -> str:
    return f"{form.format(min(values))} to {form.format(max(values))}"


def close(what: str, paper: Sequence[float], here: Sequence[float], within: float, form: str, **more: str) -> Figure:
    """Figures that lie within a share of the paper's."""
    holds = all(abs(one / other - 1) <= within for one, other in zip(here, paper, strict=True))
    unit, why = more.get("unit", ""), more.get("why", "")
    judged = f"within {100 * within:g} %"
    return Figure(what, numbers(paper, form, unit), numbers(here, form, unit), judged, holds, why)


def summary(trace: mt.Trace, policies: Sequence, system: object, **options: object) -> dict[str, dict]:
    """Rows of a replay's summary by policy."""
    frame = mt.replay(trace, system=system, policies=policies, **options).summary
    return {row["name"]: row for row in frame.to_dicts()}
