"""The layer at hand: what the engine knows of it, and what a policy's hook is shown."""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.machine import FIRST_HOME, GPU_DEVICE, Machine
from moetrace.engine.state import ACTIVE, GROUP, OWN, View, records
from moetrace.engine.tiers.tier_records import Tiers
from moetrace.jit.compile import kernel


class LayerScratch(NamedTuple):
    """The known values of the current layer."""

    active: Any  # ACTIVE [E]
    groups: Any  # GROUP [groups]
    load: np.ndarray  # int64 [E]
    plan: np.ndarray  # uint8 [E]
    own: Any  # OWN [L], of every layer; kept from step to step
    own_at: np.ndarray  # int64 [L]: address of each


@kernel
def view_of(step, layer, steps, machine, setting, scratch, pool):
    """Return what hooks may read of a step and layer; ``pool`` is the age of the layer's, and whether it is full."""
    return View(
        step,
        steps.phase[step - steps.first],
        steps.rows[step - steps.first],
        setting.slots,
        machine.share,
        machine.work[0].row_bytes * machine.link[0].s_per_byte,
        machine.link[0].latency_s,
        setting.alpha,
        setting.half_life,
        setting.most_count,
        pool[0],
        machine.device[GPU_DEVICE].layer_s,
        machine.device[FIRST_HOME].layer_s,
        setting.gpu_rows,
        machine.device[GPU_DEVICE].fetched_s,
        machine.device[FIRST_HOME].fetched_s,
        pool[1],
        scratch.active,
        scratch.groups,
        scratch.own_at[layer],
    )


def new_scratch(machine: Machine, tiers: Tiers | None = None) -> LayerScratch:
    """Return room for a layer's active experts; ``tiers``: further parts of the machine, which a dispatch may read."""
    layers, experts = machine.home.shape
    own, active = records(layers, OWN), records(experts, ACTIVE)
    active["cpu_s"] = np.inf
    own["term_at"] = 0 if tiers is None else tiers.term.ctypes.data
    return LayerScratch(
        active=active,
        groups=records(len(machine.device) - FIRST_HOME, GROUP),
        load=np.zeros(experts, np.int64),
        plan=np.zeros(experts, np.uint8),
        own=own,
        own_at=own.ctypes.data + OWN.itemsize * np.arange(layers),
    )
