"""`ep-block`: equal runs of successive experts on each unit."""

import numpy as np

from moetrace.engine.placement import Placing
from moetrace.spec.choices import Placement


def in_blocks(placing: Placing) -> np.ndarray:
    """Cut the ids into one run of successive ids for each unit."""
    groups = np.arange(placing.experts) * placing.units // placing.experts
    return np.tile(groups, (len(placing.layer_index), 1))


RECORD = Placement(
    name="ep-block",
    meaning="each expert whole on one unit, equal blocks of ids",
    hook=in_blocks,
    planner="moetrace.analyze.balance.plans:ONE_COPY",
    list_order=20,
)
