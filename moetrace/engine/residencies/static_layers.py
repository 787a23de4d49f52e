"""`static-layers`: the GPU keeps all experts of some layers, from the start (llama.cpp's `--n-cpu-moe`)."""

from typing import TYPE_CHECKING

import numpy as np

from moetrace.engine.residency import keep_for_good
from moetrace.engine.static_room import room_of
from moetrace.engine.static_set import StaticRoom
from moetrace.spec.choices import BY_TOUCH, Residency
from moetrace.spec.errors import UsageError
from moetrace.spec.policy import PolicySpec

if TYPE_CHECKING:
    from moetrace.engine.decoded import Decoded
    from moetrace.engine.replay import State


def whole_layers(policy: PolicySpec, room: StaticRoom) -> np.ndarray:
    """Return whole layers: `gpu_layers`, else as many as the cache holds; raise UsageError if they do not fit."""
    exists, slots = room.exists, int(room.capacity[0])
    layers = len(exists)
    order = np.arange(layers) if policy.gpu_layers_end == "first" else np.arange(layers)[::-1]
    needed = np.r_[0, np.cumsum(np.count_nonzero(exists, axis=1)[order])]  # slots of the first 0, 1, 2, ... layers
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
    return np.flatnonzero(kept)


def hold_layers(policy: PolicySpec, state: "State", decoded: "Decoded") -> None:
    """Put the layers into the cache."""
    keep_for_good(state.cells, state.cache, whole_layers(policy, room_of(state, decoded, counts=False)))


RECORD = Residency(
    name="static-layers",
    meaning="the GPU keeps all experts of the last layers, or the first",
    parameters=("gpu_layers", "gpu_layers_end"),
    order=BY_TOUCH,
    admits=False,
    begin=hold_layers,
    keeps=whole_layers,
    starts_full=True,
    shares_slots=True,
    list_order=22,
)
