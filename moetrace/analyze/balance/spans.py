"""The steps that plans are made from, those that they are judged on, and when they are re-made."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moetrace.analyze.balance.loads import steps_of_phase
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.format import Trace
from moetrace.trace.schema import PHASE_NAMES

MAX_INTERVALS = 64


@dataclass(frozen=True)
class Span:
    """The steps that plans are made from, and those that they are judged on; a window of 0 holds no steps back."""

    steps: np.ndarray  # int64, of the trace: those that are looked at
    window: int
    intervals: tuple[int, ...]  # new plans are made after these numbers of judged steps

    @property
    def judged(self) -> np.ndarray:
        """The steps that plans are judged on, of the trace."""
        return self.steps[self.window :]

    @property
    def latest(self) -> np.ndarray:
        """The steps that the next plan is made from, of the trace: the last of them, or all without a window."""
        return self.steps[-self.window :] if self.window else self.steps

    def rebalances(self, interval: int) -> np.ndarray:
        """The judged steps, of the trace, before which plans are re-made."""
        return self.judged[interval::interval]


def span_of(trace: Trace, phase: str, window: int | None, interval: int | Sequence[int] | None) -> Span:
    """Choose the steps; raise UsageError or MoetraceError if that leaves nothing to plan from or to judge."""
    if phase not in ("all", *PHASE_NAMES):
        raise UsageError(f"phase is {phase!r}: give all, {', '.join(PHASE_NAMES)}.")
    steps = steps_of_phase(trace, phase)
    which = "" if phase == "all" else f"{phase} "
    if not steps.size:
        raise MoetraceError(f"{trace.shown} has no {which}steps.")
    window = steps.size // 2 if window is None else window
    if not 0 <= window < steps.size:
        raise UsageError(f"the window is {window} steps: give 0 to {steps.size - 1}, less than the {which}steps.")
    if window == 0 and interval is not None:
        raise UsageError("the interval is between plans made from a window, which has no steps: give no interval.")
    if interval is None:
        interval = -(-(steps.size - window) // 8)
    intervals = tuple(dict.fromkeys(interval if isinstance(interval, Sequence) else [interval]))
    if not intervals or len(intervals) > MAX_INTERVALS:
        raise UsageError(f"there are {len(intervals)} intervals: give 1 to {MAX_INTERVALS}.")
    if min(intervals) < 1:
        raise UsageError(f"the interval is {min(intervals)} steps: give 1 or more.")
    return Span(steps, window, intervals)
