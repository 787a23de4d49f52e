"""The phase of steps that a command is asked to print."""

from typing import TYPE_CHECKING

from moetrace.spec.errors import MoetraceError

if TYPE_CHECKING:
    from moetrace.trace import Trace


def check_phase(trace: "Trace", phase: str | None) -> None:
    """Raise MoetraceError if a trace has no step of `phase`; None and "all" are any."""
    from moetrace.trace.schema import PHASE_NAMES

    if phase not in (None, "all") and not (trace.phase == PHASE_NAMES.index(phase)).any():
        raise MoetraceError(f"{trace.path} has no {phase} steps: leave out --phase.")
