"""Where experts live in the NDP tier: the group of units that holds each expert of each layer."""

import numpy as np


def group_of_expert(placement: str, layers: int, experts: int, units: int, loads: np.ndarray | None = None):
    """Return ``(group_of_expert[layer, expert] int64, share)``: ``share`` units hold each expert of a group.

    Group ``i`` is the units ``i*share`` to ``(i+1)*share - 1``. ``placement`` is ``ep``, ``ep-block``, ``ep-lpt``
    (by ``loads`` float64 [L, E]), ``tp`` or ``tp:g`` with g a divisor of ``units`` (timing model, section 5). Without
    units there is one group that nobody uses.
    """
    expert = np.arange(experts)
    if units == 0:
        return np.zeros((layers, experts), np.int64), 1
    if placement == "ep-lpt":
        assert loads is not None
        return np.stack([_longest_first(load, units) for load in loads]), 1
    if placement == "ep":
        groups, share = expert % units, 1
    elif placement == "ep-block":
        groups, share = expert * units // experts, 1
    else:
        share = units if placement == "tp" else int(placement.removeprefix("tp:"))
        groups = expert % (units // share)
    return np.tile(groups, (layers, 1)), share


def _longest_first(load: np.ndarray, units: int) -> np.ndarray:
    unit_of_expert = np.empty(len(load), np.int64)
    total = np.zeros(units)
    for expert in np.argsort(-load, kind="stable"):
        unit = int(np.argmin(total))
        unit_of_expert[expert] = unit
        total[unit] += load[expert]
    return unit_of_expert
