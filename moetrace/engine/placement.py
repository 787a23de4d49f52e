"""Where experts live in the NDP tier: the group of units that holds each expert of each layer."""

from typing import NamedTuple

import numpy as np

from moetrace.spec.choices import find
from moetrace.spec.model import Model
from moetrace.spec.policy import PolicySpec
from moetrace.spec.policy_files import load_loads


class Placing(NamedTuple):
    """The arguments of a placement's hook; it returns int64 [layers, experts], each expert's group of units."""

    policy: str  # whose placement it is, for errors
    layer_index: np.ndarray  # int64 [layers]: place of each MoE layer among all layers
    experts: int
    units: int  # at least 1
    share: int  # units in a group; group i is the units i*share to (i+1)*share - 1
    loads: np.ndarray | None  # float64 [layers, experts]
    plan: str | None  # path of a plan's file
    model: Model | None = None  # knows which number each MoE layer has
    layout: str | None = None  # path of a layout's file


def place_experts(
    policy: PolicySpec, layer_index: np.ndarray, experts: int, units: int, model: Model | None = None
) -> np.ndarray:
    """Return where a policy has the experts of the MoE layers at ``layer_index``, as `group_of_expert` does.

    Raises MoetraceError if the file of loads or of a plan is wrong; UsageError if units cannot have equally many
    experts (``eplb``), or if a plan has copies of experts, which this tier does not know.
    """
    layers, share = len(layer_index), policy.group_size(units) if units else 1
    loads = load_loads(policy.loads, layers, experts) if policy.loads else None
    placing = Placing(policy.name, layer_index, experts, units, share, loads, policy.plan, model, policy.layout)
    return _place(policy.placement, placing)


def group_of_expert(
    placement: str, layers: int, experts: int, units: int, share: int, loads: np.ndarray | None = None
) -> np.ndarray:
    """Return int64 [layers, experts]: the group of ``share`` units that holds each expert.

    Group ``i`` is the units ``i*share`` to ``(i+1)*share - 1``.
    ``placement`` is any but ``plan``; ``loads`` float64 [L, E] is for ``ep-lpt`` and ``eplb`` (timing model, section
    5). Without units there is one group that nobody uses.
    """
    return _place(placement, Placing(placement, np.arange(layers), experts, units, share, loads, None))


def _place(placement: str, placing: Placing) -> np.ndarray:
    if not placing.units:
        return np.zeros((len(placing.layer_index), placing.experts), np.int64)
    return find("placement", placement).hook(placing)


def round_robin(placing: Placing) -> np.ndarray:
    """Place experts on groups one by one, in the order of ids: ``ep``, ``tp`` and ``tp:g``."""
    groups = np.arange(placing.experts) % max(placing.units // placing.share, 1)
    return np.tile(groups, (len(placing.layer_index), 1))


def unit_of_expert(plan: np.ndarray) -> np.ndarray:
    """Turn int [L, units, slots], each expert in one slot, into int64 [L, E]."""
    layers, units, slots = plan.shape
    units_of_experts = np.empty((layers, units * slots), np.int64)
    np.put_along_axis(units_of_experts, plan.reshape(layers, -1).astype(np.int64), np.arange(units * slots) // slots, 1)
    return units_of_experts
