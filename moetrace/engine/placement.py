"""Where experts live in the NDP tier: the group of units that holds each expert of each layer."""

import numpy as np

from moetrace.engine.compile import kernel


def group_of_expert(
    placement: str, layers: int, experts: int, units: int, share: int, loads: np.ndarray | None = None
) -> np.ndarray:
    """Return int64 [layers, experts]: the group of ``share`` units that holds each expert.

    Group ``i`` is the units ``i*share`` to ``(i+1)*share - 1``. ``placement`` is ``ep``, ``ep-block``, ``ep-lpt``
    (by ``loads`` float64 [L, E]), ``tp`` or ``tp:g`` (timing model, section 5). Without units there is one group that
    nobody uses.
    """
    expert = np.arange(experts)
    if placement == "ep-lpt" and units:
        assert loads is not None
        return np.stack([_longest_first(load, units) for load in loads])
    groups = expert * units // experts if placement == "ep-block" else expert % max(units // share, 1)
    return np.tile(groups, (layers, 1))


def _longest_first(load: np.ndarray, units: int) -> np.ndarray:
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
