"""Whether a model fits a machine, and how many experts the GPU has room for."""

import numpy as np
from msgspec import UNSET

from moetrace.spec.errors import UsageError
from moetrace.spec.model import Model
from moetrace.spec.system import System

_QUANTIZED_BITS = (8.5, 6.5, 4.5, 3.5, 2.5)  # about what Q8, Q6, Q4, Q3 and Q2 files take for a weight


def gpu_space_bytes(model: Model, system: System) -> float:
    """Bytes of GPU memory left for experts, after the reserve and the dense weights; negative if these do not fit."""
    gpu = system.gpu
    return (gpu.memory_gb - gpu.reserve_gb) * 1e9 - model.moe_layers * model.dense_bytes - model.head_bytes


def dense_misfit(model: Model, system: System) -> str | None:
    """Say in one sentence that the dense weights do not fit the GPU, which nothing else forbids; None if they do."""
    if gpu_space_bytes(model, system) >= 0:
        return None
    have_gb = system.gpu.memory_gb - system.gpu.reserve_gb
    need_gb = have_gb - gpu_space_bytes(model, system) / 1e9
    return (
        f"the dense weights of {model.name} ({need_gb:.1f} GB) do not fit the GPU of {system.name} "
        f"({have_gb:.1f} GB left); they are priced as if they did."
    )


def gpu_slots(model: Model, system: System, expert_bytes: np.ndarray) -> int:
    """How many experts the GPU can hold, counted in the largest, or all if there is room for all.

    Args:
        model: The model.
        system: The system.
        expert_bytes: [layers, experts]; the trace's where it has its own, else `model.expert_bytes()`.

    Returns:
        The number of experts; all of them if there is no link.
    """
    everything = model.all_experts
    space = gpu_space_bytes(model, system)
    if system.link is None or space >= float(np.sum(expert_bytes)):
        return everything
    slots = space // float(np.max(expert_bytes))
    return int(min(max(slots, 0), everything))


def host_slots(model: Model, system: System, expert_bytes: np.ndarray) -> int:
    """How many experts host memory can hold above a disk, counted in the largest, or all if there is room for all.

    Args:
        model: The model.
        system: The system.
        expert_bytes: [layers, experts], as in `gpu_slots`.

    Returns:
        The number of experts: `host.slots` where that is given; all of them if nothing limits host memory.
    """
    everything, host = model.all_experts, system.host
    if host is not None and host.slots is not None:
        return min(host.slots, everything)
    if host is None or host.memory_gb is None or host.memory_gb * 1e9 >= float(np.sum(expert_bytes)):
        return everything
    return int(min(host.memory_gb * 1e9 // float(np.max(expert_bytes)), everything))


def check_fits(model: Model, system: System, expert_bytes: np.ndarray, ignore_capacity: bool = False) -> None:
    """Check that the experts fit the NDP units, or the GPUs of a cluster, together, or host memory or the only GPU.

    With a link and no NDP units they are in host memory, which has no limit unless `host.memory_gb` is given. A disk
    below it holds all of them.

    Args:
        model: The model.
        system: The system.
        expert_bytes: [layers, experts], as in `gpu_slots`.
        ignore_capacity: Check nothing.

    Raises:
        UsageError: They do not fit.
    """
    need = float(np.sum(expert_bytes))
    if ignore_capacity or system.disk is not None:
        return
    if system.ndp is not None:
        have = system.ndp.units * system.ndp.capacity_gb * 1e9
        place = f"the {system.ndp.units} NDP units of {system.ndp.capacity_gb:g} GB of system {system.name}"
        remedy = f"set system.ndp.units={int(-(-need // (system.ndp.capacity_gb * 1e9)))}"
    elif system.cluster is not None:
        one = system.gpu.memory_gb * 1e9 - system.gpu.reserve_gb * 1e9
        one = gpu_space_bytes(model, system) if system.cluster.is_colocated else one
        have = system.cluster.expert_gpus * max(one, 0.0)
        place = f"the {have / 1e9:.1f} GB that the {system.cluster.expert_gpus} GPUs of system {system.name} have left"
        remedy = "use more GPUs"
    elif system.link is None:
        have = max(gpu_space_bytes(model, system), 0.0)
        place = f"the {have / 1e9:.1f} GB that the GPU of system {system.name} has left (it has no link, so all must)"
        remedy = f"add a [link] to the system, so that {_behind_a_link(system)}"
    elif system.host is not None and system.host.memory_gb is not None:
        have = system.host.memory_gb * 1e9
        place = f"the {have / 1e9:g} GB of host memory of system {system.name}"
        place += ", which has all of them, those on the GPU too"
        remedy = f"set system.host.memory_gb={int(-(-need // 1e9))}, add a [disk] that holds the others"
    else:
        return
    if need > have:
        raise UsageError(
            f"The experts of {model.name} take {need / 1e9:.1f} GB and do not fit {place}; "
            f"{_fewer_bits(model, need, have)}{remedy}, or, in a replay, pass --ignore-capacity."
        )


def check_layout(
    policy: str, system: System, groups: np.ndarray, expert_bytes: np.ndarray, ignore_capacity: bool = False
) -> None:
    """Check that each NDP unit has room for what a layout puts on it at the start.

    Args:
        policy: Name of the policy that has the layout.
        system: The system.
        groups: int [layers, experts]; the unit that holds each expert, the number of units for one that all share.
        expert_bytes: [layers, experts], as in `gpu_slots`.
        ignore_capacity: Check nothing.

    Raises:
        UsageError: A unit holds more than `ndp.capacity_gb`.
    """
    if ignore_capacity or system.ndp is None:
        return
    units = system.ndp.units
    found = np.bincount(groups.ravel(), expert_bytes.ravel(), units + 1)
    need_gb = (found[:units] + found[units] / units) / 1e9
    unit = int(np.argmax(need_gb))
    if need_gb[unit] > system.ndp.capacity_gb * (1 + 1e-9):  # parts of spread experts are summed in any order
        raise UsageError(
            f"Policy {policy}: its layout puts {need_gb[unit]:.4g} GB on unit {unit}, and a unit of system "
            f"{system.name} has {system.ndp.capacity_gb:g} GB: move experts to other units, raise "
            "system.ndp.capacity_gb, or, in a replay, pass --ignore-capacity."
        )


def _behind_a_link(system: System) -> str:
    """Say what a link would change on a machine without one."""
    if system.cpu is not None:
        return "they can lie in host memory, where its [cpu] runs them"
    return "they can lie in host memory (and a [cpu] to run them there) or on a drive"


def _fewer_bits(model: Model, need_bytes: float, have_bytes: float) -> str:
    """Advise bits of a weight with which the experts fit; nothing if sizes are not one number of bits."""
    bits = model.weight_bits
    if (
        not isinstance(bits, float | int)
        or model.expert_bits is not UNSET
        or need_bytes != float(np.sum(model.expert_bytes()))
    ):
        return ""
    fitting = next((less for less in _QUANTIZED_BITS if less <= bits * have_bytes / need_bytes), None)
    both = f"model.weight_bits={fitting} and model.dense_weight_bits={fitting}"
    return f"set {both} if it is quantized, " if fitting else ""
