"""The machine as data: devices and links in the numbers that kernels need, and what its parts are called.

Device 0 is the GPU; those behind it are where experts live: groups of units of one class, which share their experts.
The names and abilities of classes are in `moetrace.spec.system`.
"""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.state import FIRST_GROUP, GPU, LINK_IN, LINK_OUT, records
from moetrace.spec.model import Model
from moetrace.spec.system import Device, System

# Rates that are applied to every expert of every step are kept as seconds a byte or row: a product costs a tenth of a
# division (divisions took 70 ns of a layer's 400 at batch 1), and differs from it in the last bit at most.
DEVICE = np.dtype(
    [
        (name, np.float64)
        for name in (
            "s_per_row",  # of one row in one expert, on all units of a group together
            "s_per_byte",
            "is_serial",  # 1: reading and arithmetic do not overlap (roofline "sum"), else 0
            "start_s",  # of one launch
            "each_s",  # that each expert adds which need not be fetched: start_s, or 0 with launch "layer"; sparse too
            "fetched_s",  # that each expert adds which starts itself: start_s; sparse too
            "layer_s",  # that all these experts of a layer add once: 0, or start_s with launch "layer"
            "flop_s",
            "bytes_s",
        )
    ]
)
LINK = np.dtype([(name, np.float64) for name in ("bytes_s", "s_per_byte", "latency_s")])
# Work of a model, for every kind of machine.
WORK = np.dtype(
    [
        (name, np.float64)
        for name in (
            "flop_per_row",  # of one row in one expert
            "row_bytes",  # activations of one row
            "dense_bytes",
            "dense_flop_per_row",
            "kv_bytes",  # a token and layer
            "head_bytes",
            "overhead_s",  # of the host, a layer and step
            "all_flop_s",  # of all devices together
            "all_bytes_s",
        )
    ]
)
GPU_DEVICE, FIRST_HOME = 0, 1  # of the devices: the GPU, and the first that experts live on
NO_ROW = -1


class Machine(NamedTuple):
    """A model on a system under a placement, in SI units. Costs of absent parts are 0."""

    device: Any  # DEVICE [1 + groups]
    link: Any  # LINK [1]: between the GPU and where experts live, the same in both directions
    work: Any  # WORK [1]
    share: int  # units in a group, which share its experts
    weight_bytes: np.ndarray  # float64 [L, E]
    home: np.ndarray  # int64 [L, E]: the device that each expert lives on
    even_bytes: float  # of each expert, a whole number, where all are alike; else 0
    is_plain: int  # 1: every expert starts itself, and once, and reading overlaps with arithmetic, on all devices


class MachinePart(NamedTuple):
    """A row of a table: a device or a direction of a link."""

    name: str
    log_row: int  # in the unit log; NO_ROW: it is described, but takes no part
    share: int  # the part's row in the log is the sum of this number of units


def machine_of(
    model: Model, system: System, weight_bytes: np.ndarray, group_of_expert: np.ndarray, share: int, mixes: bool = False
) -> Machine:
    """Return the machine that kernels compute with.

    Args:
        model: what is served.
        system: what it is served on, as the policy sees it (`moetrace.spec.participants`).
        weight_bytes: float64 [L, E], of each expert.
        group_of_expert: int64 [L, E], the group of ``share`` units that holds it.
        share: units in a group.
        mixes: whether a group behind the others is all units together.

    Returns:
        Records for the GPU and for each group; one group of no rate where experts have no home but the link's end.
    """
    groups = max(system.units // share, 1)  # the CPU is a group of its own
    device = records(FIRST_HOME + groups + mixes, DEVICE)
    describe(device[:FIRST_HOME], system.accelerator, 1, model)
    if system.home is not None:
        describe(device[FIRST_HOME : FIRST_HOME + groups], system.home, share, model)
        if mixes:
            describe(device[FIRST_HOME + groups :], system.home, system.units, model)
    link, work = records(1, LINK), records(1, WORK)
    link["bytes_s"] = system.link.bytes_s if system.link else np.inf
    link["s_per_byte"] = 1 / system.link.bytes_s if system.link else 0.0
    link["latency_s"] = system.link.latency_s if system.link else 0.0
    for name in ("flop_per_row", "dense_bytes", "dense_flop_per_row", "head_bytes"):
        work[name] = getattr(model, name)
    work["row_bytes"], work["kv_bytes"] = model.activation_row_bytes, model.kv_bytes_per_token_layer
    work["overhead_s"] = system.gpu.layer_overhead_s
    work["all_flop_s"] = sum(each.count * each.flop_s for each in system.devices)
    work["all_bytes_s"] = sum(each.count * each.bytes_s for each in system.devices)
    return Machine(
        device,
        link,
        work,
        share,
        np.ascontiguousarray(weight_bytes, np.float64),
        FIRST_HOME + np.ascontiguousarray(group_of_expert, np.int64),
        _even_bytes(weight_bytes),
        int(not (device["is_serial"].any() or device["layer_s"].any() or model.sparse_starts)),
    )


def _even_bytes(weight_bytes: np.ndarray) -> float:
    """Return what every expert weighs, or 0: a whole number, so that sums of it are exact in any order."""
    first = float(weight_bytes.flat[0])
    return first if first.is_integer() and first < 2**40 and (weight_bytes == first).all() else 0.0


def parts_of(system: System, share: int) -> list[MachinePart]:
    """Return the parts of a machine in the order of every table, where groups of ``share`` units share experts."""
    rows = {system.accelerator.name: (GPU, 1), "link_in": (LINK_IN, 1), "link_out": (LINK_OUT, 1)}
    if system.home is not None:
        rows |= {name: (FIRST_GROUP + unit // share, share) for unit, name in enumerate(system.home.names)}
    return [MachinePart(name, *rows.get(name, (NO_ROW, 1))) for name in system.part_names]


def describe(device: np.ndarray, kind: Device, share: int, model: Model) -> None:
    """Fill the records (DEVICE [n]) of devices, each of ``share`` units of a kind."""
    device["s_per_row"] = model.flop_per_row / (share * kind.flop_s)
    device["s_per_byte"] = 1 / (share * kind.bytes_s)
    device["is_serial"], device["start_s"] = kind.is_serial, kind.start_s
    device["each_s"], device["layer_s"] = (0.0, kind.start_s) if kind.starts_once else (kind.start_s, 0.0)
    sparse_s = model.sparse_starts * kind.start_s
    device["each_s"] += sparse_s
    device["fetched_s"] = kind.start_s + sparse_s
    device["flop_s"], device["bytes_s"] = kind.flop_s, kind.bytes_s
