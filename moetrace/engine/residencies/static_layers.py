"""`static-layers`: the GPU keeps all experts of some layers, from the start (llama.cpp's `--n-cpu-moe`)."""

from typing import TYPE_CHECKING

import numpy as np

from moetrace.engine.residency import keep_for_good
from moetrace.spec.choices import BY_TOUCH, Residency
from moetrace.spec.errors import UsageError
from moetrace.spec.policy import PolicySpec

if TYPE_CHECKING:
    from moetrace.engine.decoded import Decoded
    from moetrace.engine.replay import State


def hold_layers(policy: PolicySpec, state: "State", decoded: "Decoded") -> None:
    """Put whole layers into the cache: `gpu_layers`, else as many as it holds; raise UsageError if they do not fit."""
    layers, slots = len(state.cells), int(state.cache.capacity)
    exists = state.queue.weight_bytes.reshape(state.cells.shape) > 0  # layers may have fewer experts than others
    order = np.arange(layers) if policy.gpu_layers_end == "first" else np.arange(layers)[::-1]
    needed = np.r_[0, np.cumsum(np.count_nonzero(exists, axis=1)[order])]  # slots of so many layers
    fitting = int(np.searchsorted(needed, slots, side="right")) - 1
    held = fitting if policy.gpu_layers is None else policy.gpu_layers
    if held > layers:
        raise UsageError(f"Policy {policy.name}: gpu_layers is {held}, but the model has {layers} MoE layers.")
    if held > fitting:
        raise UsageError(
            f"Policy {policy.name}: gpu_layers = {held} are {needed[held]} experts, but the GPU has {slots} slots: "
            f"give gpu_layers = {fitting} at most."
        )
    kept = np.zeros_like(exists)
    kept[order[:held]] = exists[order[:held]]
    keep_for_good(state.cells, state.cache, np.flatnonzero(kept))


RECORD = Residency(
    name="static-layers",
    meaning="the GPU keeps all experts of the last layers, or the first",
    parameters=("gpu_layers", "gpu_layers_end"),
    order=BY_TOUCH,
    admits=False,
    begin=hold_layers,
    starts_full=True,
    shares_slots=True,
    list_order=22,
)
