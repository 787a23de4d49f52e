"""`plan`: as a plan's file says, one copy of each expert."""

import numpy as np

from moetrace.engine.placement import Placing, unit_of_expert
from moetrace.spec.choices import Placement
from moetrace.spec.errors import UsageError
from moetrace.spec.plan import load_plan


def as_planned(placing: Placing) -> np.ndarray:
    """Read the plan; raise UsageError if it has copies of experts, which this tier does not know."""
    assert placing.plan is not None
    plan = load_plan(placing.plan, placing.layer_index, placing.experts, placing.units, placing.model)
    if plan[0].size > placing.experts:
        raise UsageError(
            f"Policy {placing.policy}: {placing.plan} has {plan[0].size} slots for {placing.experts} experts; a replay "
            "has one copy of each (`moetrace analyze balance --placement eplb --redundant 0 --export` makes such a "
            "plan, where units can share the experts equally; else take ep-lpt)."
        )
    return unit_of_expert(plan)


RECORD = Placement(
    name="plan",
    meaning="each expert whole on the unit that a plan's file says",
    hook=as_planned,
    parameters=("plan",),
    list_order=60,
)
