"""The steps that a timeline covers."""

from collections.abc import Sequence
from typing import SupportsIndex

from moetrace.spec.errors import UsageError

FIRST_STEPS = 16  # of a timeline without a window

Window = bool | slice | Sequence[SupportsIndex | None]


def window_of(timeline: Window, steps: int, warnings: list[str]) -> range | None:
    """Return the steps that a timeline covers, of a trace with `steps` steps, or None. `True` is the first ones.

    A window is `(A, B)` or `slice(A, B)`, from A up to B without it, as in Python: None is an end of the trace, and a
    negative number counts from its end. Raises UsageError if it is no window, is reversed, or lies outside the trace.
    """
    if timeline is False:
        return None
    if timeline is True:
        if steps > FIRST_STEPS:
            warnings.append(
                f"the timeline covers the first {FIRST_STEPS} of {steps:,} steps; --window A:B chooses others."
            )
        return range(min(FIRST_STEPS, steps))
    if isinstance(timeline, slice) and timeline.step not in (None, 1):
        raise UsageError(f"A timeline's window holds every step from A up to B, got one in {timeline.step!r}.")
    try:
        first, stop = (timeline.start, timeline.stop) if isinstance(timeline, slice) else timeline
        window = range(steps)[slice(first, stop)]
    except (TypeError, ValueError):
        raise UsageError(f"A timeline's window is a pair of step numbers, (A, B), got {timeline!r}.") from None
    if not window:
        text = f"{'' if first is None else first}:{'' if stop is None else stop}"
        raise UsageError(
            f"The window {text} holds none of the trace's {steps:,} steps: A:B is from step A up to step B, without it."
        )
    return window
