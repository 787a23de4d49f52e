"""What a trace is replayed through, and whether the two go together; loads nothing that compiles."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moetrace.spec.errors import UsageError
from moetrace.spec.model import Model, check_shape
from moetrace.spec.participants import idle_cpu
from moetrace.spec.policy import PolicySpec
from moetrace.spec.system import System, check_fits, gpu_slots
from moetrace.trace.format import Trace


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Policies on a machine. A dispatch or residency that is a key of ``hooks`` is that function.

    ``slots``: experts that the GPU can hold; by default as many as its memory has room for. ``window``: steps of which
    everything that was done is noted.
    """

    model: Model
    system: System
    policies: Sequence[PolicySpec]
    slots: int | None = None
    ignore_capacity: bool = False
    hooks: Mapping[str, Callable] = field(default_factory=dict)
    window: range | None = None


def check_setup(trace: Trace, setup: Setup) -> tuple[int, list[str]]:
    """Return the slots that a setup has for a trace, and sentences about what may not be meant so; reads no ids.

    Raises UsageError if trace, model and system do not go together.
    """
    model, system = setup.model, setup.system
    check_shape(trace.shown, trace.layers, trace.num_experts, model)
    warnings = []
    if trace.top_k != model.top_k:
        warnings.append(
            f"the trace has {trace.top_k} experts a token and layer, {model.name} {model.top_k}: fewer or more work."
        )
    weight_bytes = weight_bytes_of(trace, model)
    check_fits(model, system, weight_bytes, setup.ignore_capacity)
    fitting = gpu_slots(model, system, weight_bytes)
    slots = _slots(model, system, setup.slots, fitting)
    if slots > fitting:
        warnings.append(f"{slots} slots are more than the {fitting} experts that fit the GPU of {system.name}.")
    warnings += [note for policy in setup.policies if (note := idle_cpu(policy, system))]
    return slots, warnings


def weight_bytes_of(trace: Trace, model: Model) -> np.ndarray:
    """Return the bytes of each expert, float64 [layers, experts]: the trace's own, else the model's."""
    if trace.expert_bytes is None:
        return model.expert_bytes()
    own = np.asarray(trace.expert_bytes, np.float64)
    return np.broadcast_to(own.reshape(trace.layers, -1), (trace.layers, trace.num_experts)).copy()


def _slots(model: Model, system: System, slots: int | None, fitting: int) -> int:
    everything = model.moe_layers * model.experts
    if slots is None:
        return fitting
    if slots < 0:
        raise UsageError(f"slots wants a number of experts of at least 0, got {slots}.")
    if system.link is None and slots < everything:
        raise UsageError(f"System {system.name} has no link, so all {everything} experts are resident: drop --slots.")
    return min(slots, everything)
