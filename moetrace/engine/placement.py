"""Where experts live in the NDP tier: the group of units that holds each expert of each layer."""

import numpy as np

from moetrace.engine.eplb import eplb_plan
from moetrace.jit.compile import kernel
from moetrace.spec.errors import UsageError
from moetrace.spec.plan import load_plan
from moetrace.spec.policy import PolicySpec, load_loads


def place_experts(policy: PolicySpec, layer_index: np.ndarray, experts: int, units: int) -> np.ndarray:
    """Return where a policy has the experts of the MoE layers at ``layer_index``, as `group_of_expert` does.

    Raises MoetraceError if the file of loads or of a plan is wrong; UsageError if units cannot have equally many
    experts (``eplb``), or if a plan has copies of experts, which this tier does not know.
    """
    layers, share = len(layer_index), policy.group_size(units) if units else 1
    if policy.placement == "plan" and units:
        assert policy.plan is not None
        plan = load_plan(policy.plan, layer_index, experts, units)
        if plan[0].size > experts:
            raise UsageError(
                f"Policy {policy.name}: {policy.plan} has {plan[0].size} slots for {experts} experts; a replay has one "
                "copy of each (`moetrace analyze balance --placement eplb --redundant 0 --export` makes such a plan, "
                "where units can share the experts equally; else take ep-lpt)."
            )
        return _unit_of_expert(plan)
    if policy.placement == "eplb" and units and experts % units:
        raise UsageError(
            f"Policy {policy.name}: placement eplb gives units equally many experts, but {units} units cannot share "
            f"{experts}; take ep-lpt."
        )
    loads = load_loads(policy.loads, layers, experts) if policy.loads else None
    return group_of_expert(policy.placement, layers, experts, units, share, loads)


def group_of_expert(
    placement: str, layers: int, experts: int, units: int, share: int, loads: np.ndarray | None = None
) -> np.ndarray:
    """Return int64 [layers, experts]: the group of ``share`` units that holds each expert.

    Group ``i`` is the units ``i*share`` to ``(i+1)*share - 1``.
    ``placement`` is ``ep``, ``ep-block``, ``ep-lpt`` or ``eplb`` (by ``loads`` float64 [L, E]; for ``eplb`` units
    divide experts), ``tp`` or ``tp:g`` (timing model, section 5). Without units there is one group that nobody uses.
    """
    expert = np.arange(experts)
    if placement == "ep-lpt" and units:
        assert loads is not None
        return np.stack([_longest_first(load, units) for load in loads])
    if placement == "eplb" and units:
        assert loads is not None
        return _unit_of_expert(eplb_plan(loads, experts, units).reshape(layers, units, -1))
    groups = expert * units // experts if placement == "ep-block" else expert % max(units // share, 1)
    return np.tile(groups, (layers, 1))


def _unit_of_expert(plan: np.ndarray) -> np.ndarray:
    """Turn int [L, units, slots], each expert in one slot, into int64 [L, E]."""
    layers, units, slots = plan.shape
    unit_of_expert = np.empty((layers, units * slots), np.int64)
    np.put_along_axis(unit_of_expert, plan.reshape(layers, -1).astype(np.int64), np.arange(units * slots) // slots, 1)
    return unit_of_expert


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
