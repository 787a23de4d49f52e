"""`eplb`: EPLB's global policy without copies, equally many experts on each unit."""

import numpy as np

from moetrace.engine.eplb import eplb_plan
from moetrace.engine.placement import Placing, unit_of_expert
from moetrace.spec.choices import Placement
from moetrace.spec.errors import UsageError


def equally_many(placing: Placing) -> np.ndarray:
    """Place experts by the kernel of `moetrace analyze balance`; raise UsageError if units cannot have equally many."""
    experts, units = placing.experts, placing.units
    if experts % units:
        raise UsageError(
            f"Policy {placing.policy}: placement eplb gives units equally many experts, but {units} units cannot share "
            f"{experts}; take ep-lpt."
        )
    assert placing.loads is not None
    return unit_of_expert(eplb_plan(placing.loads, experts, units).reshape(len(placing.layer_index), units, -1))


RECORD = Placement(
    name="eplb",
    meaning="each expert whole on one unit, equally many on each, longest load first",
    hook=equally_many,
    parameters=("loads",),
    planner="moetrace.analyze.balance.plans:EPLB",
    list_order=40,
)
