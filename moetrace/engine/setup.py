"""What a trace is replayed through, and whether the two go together; loads nothing that compiles."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moetrace.spec.budget import slots_of
from moetrace.spec.choices import Residency, find
from moetrace.spec.errors import MoetraceError, UsageError, counted
from moetrace.spec.fits import check_fits, gpu_slots, gpu_space_bytes
from moetrace.spec.model import Model, check_shape
from moetrace.spec.participants import idle_cpu
from moetrace.spec.policy import PolicySpec
from moetrace.spec.system import System
from moetrace.trace.format import Trace

# Layers x experts of a replay, which keeps some 200 bytes of each for a policy. Models have 23,000 at most; a file may
# claim anything.
MAX_CELLS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Policies on a machine. A dispatch or residency that is a key of ``hooks`` is that function.

    ``slots``: experts that the GPU can hold, as `moetrace.spec.budget` reads them; by default as many as its memory has
    room for. ``window``: steps of which everything that was done is noted.
    """

    model: Model
    system: System
    policies: Sequence[PolicySpec]
    slots: int | str | None = None
    ignore_capacity: bool = False
    hooks: Mapping[str, Callable] = field(default_factory=dict)
    window: range | None = None


def check_setup(trace: Trace, setup: Setup) -> tuple[int, list[str]]:
    """Return the slots that a setup has for a trace, and sentences about what may not be meant so; reads no ids.

    Raises UsageError if trace, model and system do not go together, MoetraceError if they have too many experts.
    """
    model, system = setup.model, setup.system
    if trace.layers * trace.num_experts > MAX_CELLS:
        raise MoetraceError(
            f"{trace.shown} has {trace.layers} x {trace.num_experts} experts; a replay takes {MAX_CELLS:,} at most."
        )
    check_shape(trace.shown, trace.layers, trace.num_experts, model)
    warnings = []
    if trace.top_k != model.most_top_k:
        warnings.append(
            f"the trace has {trace.top_k} experts a token and layer, {model.name} {model.most_top_k}: "
            "fewer or more work."
        )
    weight_bytes = weight_bytes_of(trace, model)
    check_fits(model, system, weight_bytes, setup.ignore_capacity)
    fitting = gpu_slots(model, system, weight_bytes)
    slots = fitting
    if setup.slots is not None:
        slots = _asked(system, slots_of(setup.slots, weight_bytes[model.has_expert]), model.all_experts)
    if slots > fitting:
        warnings.append(_too_many(setup, slots, fitting, weight_bytes))
    warnings += [note for policy in setup.policies if (note := idle_cpu(policy, system))]
    warnings += [
        f"policy {policy.name} foretells {trace.layers - 1} layers ahead, and not {policy.ahead_layers} "
        f"(ahead_layers): the trace has {counted(trace.layers, 'MoE layer')}."
        for policy in setup.policies
        if policy.ahead_layers is not None and policy.ahead_layers >= trace.layers
    ]
    if system.link is not None and slots >= model.all_experts and (note := _empty_start(setup)):
        warnings.append(note)
    return slots, warnings


def unneeded_units(trace: Trace, setup: Setup) -> str | None:
    """Say in one sentence that all experts fit the GPU of a machine with NDP units, which then need not run any.

    None if they do not, or if the setup says how many the GPU may hold, or if there are no units.
    """
    model, system = setup.model, setup.system
    fitting = gpu_slots(model, system, weight_bytes_of(trace, model))
    if system.ndp is None or setup.slots is not None or fitting < model.all_experts:
        return None
    return (
        f"all {fitting} experts fit the GPU of {system.name}, and policy resident would keep them there: "
        "compare with it, or give the GPU fewer slots."
    )


def _empty_start(setup: Setup) -> str | None:
    """Say in one sentence which policies have all experts on the GPU from the start, where all fit; None if alike."""
    full, empty = [], []
    for policy in setup.policies:
        residency: Residency | None = find("residency", policy.residency)
        if residency is not None and (residency.starts_full or residency.admits):
            (full if residency.starts_full else empty).append(policy.name)
    if not full or not empty:
        return None
    return (
        f"all experts fit the GPU: with {' and '.join(full)} they are there from the start, while "
        f"{' and '.join(empty)} first has to fetch each of them once."
    )


def check_ids_of(model: Model, rows: np.ndarray) -> MoetraceError | None:
    """Return why the ids of a trace cannot be those of a model whose layers have different numbers of experts, or None.

    ``rows`` int64 [layers, experts]: rows that chose each id. Ids of other models were checked when they were read.
    """
    if isinstance(model.experts, int):
        return None
    wrong = np.argwhere((rows > 0) & ~model.has_expert)
    if not len(wrong):
        return None
    layer, expert = wrong[0]
    return MoetraceError(
        f"The trace chooses expert {expert} in MoE layer {layer}, but that layer of {model.name} has "
        f"{model.layer_experts[layer]} experts: name the right model with --model."
    )


def weight_bytes_of(trace: Trace, model: Model) -> np.ndarray:
    """Return the bytes of each expert, float64 [layers, experts]: the trace's own, else the model's."""
    if trace.expert_bytes is None:
        return model.expert_bytes()
    own = np.asarray(trace.expert_bytes, np.float64)
    return np.broadcast_to(own.reshape(trace.layers, -1), (trace.layers, trace.num_experts)).copy()


def _too_many(setup: Setup, slots: int, fitting: int, weight_bytes: np.ndarray) -> str:
    model, system = setup.model, setup.system
    everything = slots == model.all_experts
    need_gb = float(np.sum(weight_bytes) if everything else slots * np.max(weight_bytes)) / 1e9
    have_gb = max(gpu_space_bytes(model, system), 0.0) / 1e9
    return (
        f"{slots} slots take {need_gb:.1f} GB, {need_gb - have_gb:.1f} GB more than the GPU of {system.name} has left "
        f"for experts, and are priced as if they fit: give slots = {fitting} at most, or raise system.gpu.memory_gb."
    )


def _asked(system: System, slots: int, everything: int) -> int:
    if system.link is None and slots < everything:
        raise UsageError(f"System {system.name} has no link, so all {everything} experts are resident: drop --slots.")
    return min(slots, everything)
