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
    layers, experts = state.cells.shape
    slots = state.cache.capacity
    held = slots // experts if policy.gpu_layers is None else policy.gpu_layers
    if held > layers:
        raise UsageError(f"Policy {policy.name}: gpu_layers is {held}, but the model has {layers} MoE layers.")
    if held * experts > slots:
        raise UsageError(
            f"Policy {policy.name}: gpu_layers = {held} are {held * experts} experts, but the GPU has {slots} slots: "
            f"give gpu_layers = {slots // experts} at most."
        )
    first = 0 if policy.gpu_layers_end == "first" else layers - held
    keep_for_good(state.cells, state.cache, np.arange(first * experts, (first + held) * experts))


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
