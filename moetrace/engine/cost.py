"""What one piece of work costs (timing model, section 2), and the machine in the numbers that kernels need."""

from typing import NamedTuple

import numpy as np

from moetrace.jit.compile import kernel
from moetrace.spec.model import Model
from moetrace.spec.system import System


class Machine(NamedTuple):
    """A model on a system under a placement, in SI units. Costs of what is absent are 0.

    Rates that are applied to every expert of every step are kept as seconds a byte or row: a product costs a tenth of
    a division (divisions took 70 ns of a layer's 400 at batch 1), and differs from it in the last bit at most.
    """

    gpu_flop_s: float
    gpu_bytes_s: float
    gpu_launch_s: float
    gpu_s_per_row: float  # of one row in one expert
    gpu_s_per_byte: float
    groups: int  # of units
    share: int  # units in a group, which share its experts
    ndp_s_per_row: float  # on the units that share an expert, together
    ndp_s_per_byte: float
    ndp_command_s: float
    link_bytes_s: float
    link_s_per_byte: float
    link_latency_s: float
    all_flop_s: float  # of the GPU and all units
    all_bytes_s: float
    flop_per_row: float  # of one row in one expert
    row_bytes: float  # activations of one row
    dense_bytes: float
    dense_flop_per_row: float
    kv_bytes: float  # a token and layer
    head_bytes: float
    weight_bytes: np.ndarray  # float64 [L, E]
    group_of_expert: np.ndarray  # int64 [L, E]


def machine_of(
    model: Model, system: System, weight_bytes: np.ndarray, group_of_expert: np.ndarray, share: int
) -> Machine:
    """Return the machine that kernels compute with.

    ``weight_bytes`` float64 [L, E]: of each expert; ``group_of_expert`` int64 [L, E]: the group of ``share`` units
    that holds it.
    """
    gpu, ndp, link = system.gpu, system.ndp, system.link
    unit_flop_s, unit_bytes_s = (ndp.flop_s, ndp.bytes_s) if ndp else (0.0, 0.0)
    return Machine(
        gpu_flop_s=gpu.flop_s,
        gpu_bytes_s=gpu.bytes_s,
        gpu_launch_s=gpu.launch_s,
        gpu_s_per_row=model.flop_per_row / gpu.flop_s,
        gpu_s_per_byte=1 / gpu.bytes_s,
        groups=max(system.units // share, 1),
        share=share,
        ndp_s_per_row=model.flop_per_row / (share * unit_flop_s) if ndp else 0.0,
        ndp_s_per_byte=1 / (share * unit_bytes_s) if ndp else 0.0,
        ndp_command_s=ndp.command_s if ndp else 0.0,
        link_bytes_s=link.bytes_s if link else float("inf"),
        link_s_per_byte=1 / link.bytes_s if link else 0.0,
        link_latency_s=link.latency_s if link else 0.0,
        all_flop_s=gpu.flop_s + system.units * unit_flop_s,
        all_bytes_s=gpu.bytes_s + system.units * unit_bytes_s,
        flop_per_row=float(model.flop_per_row),
        row_bytes=float(model.activation_row_bytes),
        dense_bytes=float(model.dense_bytes),
        dense_flop_per_row=float(model.dense_flop_per_row),
        kv_bytes=float(model.kv_bytes_per_token_layer),
        head_bytes=float(model.head_bytes),
        weight_bytes=np.ascontiguousarray(weight_bytes, np.float64),
        group_of_expert=np.ascontiguousarray(group_of_expert, np.int64),
    )


@kernel
def dense_s(machine, rows, kv_tokens):
    """Return the seconds of attention, shared experts and router of one layer of a step."""
    weights_s = max(machine.dense_bytes / machine.gpu_bytes_s, machine.dense_flop_per_row * rows / machine.gpu_flop_s)
    return weights_s + machine.kv_bytes * kv_tokens / machine.gpu_bytes_s + machine.gpu_launch_s


@kernel
def head_s(machine):
    """Return the seconds of the LM head and the dense first layers, once a step."""
    return machine.head_bytes / machine.gpu_bytes_s + machine.gpu_launch_s


@kernel
def ndp_s(rows, weight_bytes, s_per_row, s_per_byte, command_s):
    """Return the seconds that ``rows`` rows of an expert keep busy each of the units that share it."""
    return max(rows * s_per_row, weight_bytes * s_per_byte) + command_s


@kernel
def price(machine, layer, expert, rows, resident, active):
    """Fill the record (``ACTIVE``) of an expert that ``rows`` rows chose in ``layer``."""
    weight_bytes = machine.weight_bytes[layer, expert]
    active.expert = expert
    active.group = machine.group_of_expert[layer, expert]
    active.rows = rows
    active.weight_bytes = weight_bytes
    active.resident = resident
    active.gpu_s = max(rows * machine.gpu_s_per_row, weight_bytes * machine.gpu_s_per_byte) + machine.gpu_launch_s
    active.ndp_s = ndp_s(rows, weight_bytes, machine.ndp_s_per_row, machine.ndp_s_per_byte, machine.ndp_command_s)
    active.fetch_s = 0.0 if resident else weight_bytes * machine.link_s_per_byte + machine.link_latency_s


@kernel
def take_turns(active, size):
    """Set the order in which the GPU would run the active experts: resident ones first, each part in demand order."""
    residents = 0
    for i in range(size):
        residents += active[i].resident
    here, coming = 0, residents
    for i in range(size):
        resident = np.int64(active[i].resident)
        active[here if resident else coming].turn = i
        here += resident
        coming += 1 - resident
