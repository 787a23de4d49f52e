"""Plans as engines are to load them: which expert is in each slot of each unit, from a trace's loads or from a file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from moetrace.analyze.balance.plan_files import plan_bytes, read_plan
from moetrace.analyze.balance.plans import Plan, Tier, check_tier
from moetrace.analyze.balance.units import plan_for_next
from moetrace.spec import list_presets, load_model
from moetrace.spec.errors import UsageError
from moetrace.trace.format import Trace


class PlanChoice(NamedTuple):
    """The plan to write.

    Attributes:
        units: Number of units that hold experts.
        redundant: Slots beyond one for each expert. By default the fewest that EPLB can do with.
        plan: A plan's file, to be written in another form. By default EPLB's plan for the loads of the trace.
        phase: The steps whose choices are the loads.
    """

    units: int
    redundant: int | None = None
    plan: str | os.PathLike[str] | None = None
    phase: str = "all"


def write_plan(trace: Trace, file: IO[bytes], progress: Callable[[int], object], choice: PlanChoice, form: str) -> None:
    """Write the plan to `file` as `plan_bytes` does for `form`."""
    plan = _plan(trace, choice)
    file.write(plan_bytes(plan, trace.layer_index, trace.num_experts, form))
    progress(trace.rows)


def _plan(trace: Trace, choice: PlanChoice) -> Plan:
    tier = Tier(choice.units, choice.redundant)
    check_tier(tier)
    if choice.plan is None:
        return plan_for_next(trace, "eplb", tier, 0, choice.phase)
    if choice.redundant is not None or choice.phase != "all":
        raise UsageError("--plan FILE is the plan itself: give no --redundant and no --phase.")
    model = load_model(trace.model) if trace.model in list_presets("models") else None
    return read_plan(Path(choice.plan), trace.layer_index, trace.num_experts, choice.units, model)
