"""`ep-lpt`: by given loads, the longest first onto the least loaded unit, any number of experts on each."""

import numpy as np

from moetrace.engine.placement import Placing
from moetrace.jit.compile import kernel
from moetrace.spec.choices import Placement


def longest_first(placing: Placing) -> np.ndarray:
    """Place each layer by its own loads."""
    assert placing.loads is not None
    return np.stack([_place_layer(load, placing.units) for load in placing.loads])


def _place_layer(load: np.ndarray, units: int) -> np.ndarray:
    unit_of_expert = np.empty(len(load), np.int64)
    order = np.argsort(-load, kind="stable")
    _onto_least_loaded(np.ascontiguousarray(load, np.float64), order, np.zeros(units), unit_of_expert)
    return unit_of_expert


@kernel(inline=False)
def _onto_least_loaded(load, order, total, unit_of_expert):
    """Give experts in ``order`` to the unit of least ``total`` (zeros at first), the lower one on a tie."""
    for expert in order:
        unit = 0
        for other in range(1, total.size):
            if total[other] < total[unit]:
                unit = other
        unit_of_expert[expert] = unit
        total[unit] += load[expert]  # absurd loads: infinity is the most loaded


RECORD = Placement(
    name="ep-lpt",
    meaning="each expert whole on one unit, longest load first",
    hook=longest_first,
    parameters=("loads",),
    planner="moetrace.analyze.balance.plans:ONE_COPY",
    list_order=30,
)
