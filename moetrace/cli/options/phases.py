"""Options: the steps that a command prints, and the layers that share a cache."""

from typing import TYPE_CHECKING

import click

from moetrace.spec.errors import MoetraceError

if TYPE_CHECKING:
    from moetrace.trace import Trace


scope_option = click.option(
    "--scope",
    type=click.Choice(["global", "layer"]),
    default="global",
    show_default=True,
    help="One cache that all layers share, or one of an equal part for each layer.",
)


def check_phase(trace: "Trace", phase: str | None) -> None:
    """Raise MoetraceError if a trace has no step of `phase`; None and "all" are any."""
    from moetrace.trace.schema import PHASE_NAMES

    if phase not in (None, "all") and not (trace.phase == PHASE_NAMES.index(phase)).any():
        raise MoetraceError(f"{trace.shown} has no {phase} steps: leave out --phase.")
