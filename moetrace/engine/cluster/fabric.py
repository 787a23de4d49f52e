"""A cluster as data: GPUs, network and schedule in the numbers that kernels need (docs/cluster.md)."""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.machine import GPU_DEVICE, Machine, machine_of
from moetrace.engine.state import records
from moetrace.spec.cluster_policy import AUTO, COPIES, MIGRATE_SHARE, SERIAL, Parts, parts_of
from moetrace.spec.errors import UsageError
from moetrace.spec.model import UNSET, Model
from moetrace.spec.policy import PolicySpec
from moetrace.spec.rate_factors import read_factors
from moetrace.spec.system import System
from moetrace.trace.schema import PHASE_NAMES

EVEN, ROW, RANDOM, NEAREST = range(len(COPIES))  # which copy of its expert a row goes to

# Whole numbers, then numbers: what does not depend on the step.
_WHOLE = (
    "attention",  # GPUs that run attention: ag
    "experts",  # GPUs that hold experts
    "colocated",  # 1: they are the same
    "copy_rule",
    "seed",
    "serial",  # 1: everything one after another
    "fused",  # 1: experts and transfers of a layer in one kernel
    "kernels",  # of a layer: K
    "reads_first",  # 1: roofline "sum"
    "per_node",  # GPUs of a node, 0: the network has one tier
    "nodes",
)
_REAL = (
    "s_per_row",  # of one row in one expert
    "s_per_byte",  # that a GPU reads
    "attention_flop_s",  # of the slowest GPU that runs attention
    "attention_s_per_byte",
    "all_factors",  # sum of those of the GPUs that hold experts
    "start_s",  # t_g
    "each_s",  # that each expert adds
    "layer_s",  # that a GPU's experts of a chunk add once
    "row_bytes",  # activations of one row, h*a
    "shared_bytes",
    "shared_flop_per_row",
    "wire_share",  # part of the sent bytes that crosses the wire: 1 - 1/M where the same GPUs do both
    "migrate_share",
)
FABRIC = np.dtype([(name, np.int64) for name in _WHOLE] + [(name, np.float64) for name in _REAL])
# The network in steps of one phase. `row_s` is a row's of an attention GPU; the bytes are a row's to one GPU.
NETWORK = np.dtype(
    [(name, np.float64) for name in ("bytes_s", "dispatch_s", "combine_s", "row_s", "dispatch_bytes", "combine_bytes")]
    + [(name, np.float64) for name in ("node_bytes_s", "node_s")]
    + [("dedup", np.int64)]
)
# How the steps of a phase are cut: micro-batches r1, chunks r2 of each; 1: attention of all micro-batches first; 1:
# shared experts are a stage of their own.
CUT_FIELDS = ("micro_batches", "chunks", "attention_first", "apart")
CUT = np.dtype([(name, np.int64) for name in CUT_FIELDS])


class Fabric(NamedTuple):
    """A cluster under a policy."""

    # The slowest GPU that runs attention: its dense layers and the head. `work[1]`: without shared experts, if they can
    # run apart.
    machine: Machine
    gpus: Any  # FABRIC [1]
    network: Any  # NETWORK [3], by phase
    cut: Any  # CUT [3], by phase
    slowness: np.ndarray  # float64 [GPUs that hold experts]: 1 / the GPU's factor
    lead: np.ndarray  # float64 [GPUs that run attention]: share of the slowest one's work in which this one is done


def fabric_of(model: Model, system: System, policy: PolicySpec, weight_bytes: np.ndarray) -> Fabric:
    """Return a model on a cluster under a policy; `pipeline:auto` is cut as `serial` until that is chosen.

    Raises UsageError if shared experts are to run apart and the model does not say which weights these are.
    """
    assert system.cluster is not None
    machine = machine_of(model, system, weight_bytes, np.zeros(weight_bytes.shape, np.int64), 1)
    gpus = records(1, FABRIC)
    cluster, gpu = system.cluster, system.accelerator
    factors = np.ones(cluster.all_gpus)
    if cluster.rate_factors is not None:
        factors = read_factors(cluster.rate_factors, cluster)
    attending, running = factors[: cluster.attention_gpus], factors[-cluster.expert_gpus :]
    slowest = attending.min()
    machine.device["flop_s"][GPU_DEVICE] *= slowest
    machine.device["bytes_s"][GPU_DEVICE] *= slowest
    numbers = {
        "attention": cluster.attention_gpus,
        "experts": cluster.expert_gpus,
        "colocated": cluster.is_colocated,
        "copy_rule": COPIES.index(policy.copies or COPIES[EVEN]),
        "seed": policy.seed,
        "serial": policy.schedule == SERIAL,
        "fused": policy.execution == "fused",
        "kernels": policy.kernels_per_layer or 1,
        "reads_first": gpu.is_serial,
        "per_node": cluster.gpus_per_node or 0,
        "nodes": -(-cluster.all_gpus // (cluster.gpus_per_node or cluster.all_gpus)),
        "s_per_row": model.flop_per_row / gpu.flop_s,
        "s_per_byte": 1 / gpu.bytes_s,
        "attention_flop_s": machine.device["flop_s"][GPU_DEVICE],
        "attention_s_per_byte": 1 / machine.device["bytes_s"][GPU_DEVICE],
        "all_factors": running.sum(),
        "start_s": gpu.start_s,
        "each_s": machine.device["each_s"][GPU_DEVICE],
        "layer_s": machine.device["layer_s"][GPU_DEVICE],
        "row_bytes": model.activation_row_bytes,
        "wire_share": 1 - 1 / cluster.all_gpus if cluster.is_colocated else 1.0,
        "migrate_share": _or(policy.migrate_share, MIGRATE_SHARE),
    }
    for name, number in numbers.items():
        gpus[name] = number
    fabric = Fabric(
        machine, gpus, _network_of(model, system), cut_of(policy), slowness=1 / running, lead=1 - slowest / attending
    )
    return _with_shared_apart(fabric, model, policy) if policy.shared in ("apart", "auto") else fabric


def cut_of(policy: PolicySpec) -> np.ndarray:
    """Return CUT [3], how a policy cuts the steps of each phase."""
    cut = records(3, CUT)
    parts = parts_of(policy.schedule or SERIAL) or Parts(1, 1)
    cut["micro_batches"], cut["chunks"] = parts
    cut["attention_first"] = policy.order == "aass"
    return cut


def may_be_apart(fabric: Fabric) -> bool:
    """Whether shared experts can be a stage of their own."""
    return len(fabric.machine.work) > 1


def is_auto(policy: PolicySpec) -> bool:
    """Whether a policy's schedule is chosen by the trace."""
    return policy.schedule == AUTO


def schedules_of(fabric: Fabric) -> dict[str, str]:
    """Return the schedule in steps of each phase, by the phase's name, as a policy would say it."""
    if fabric.gpus["serial"][0]:
        return dict.fromkeys(PHASE_NAMES, SERIAL)
    return {
        phase: f"pipeline:{cut['micro_batches']},{cut['chunks']} {'aass' if cut['attention_first'] else 'asas'}"
        + (" apart" if cut["apart"] else "")
        for phase, cut in zip(PHASE_NAMES, fabric.cut, strict=True)
    }


def _with_shared_apart(fabric: Fabric, model: Model, policy: PolicySpec) -> Fabric:
    """Return a fabric whose shared experts can be a stage of their own, and are under ``shared`` `apart`."""
    if model.shared_params_per_layer is UNSET:
        raise UsageError(
            f'Policy {policy.name}: shared = "{policy.shared}" needs to know which weights are shared experts, and '
            f"model {model.name} does not say; set model.shared_params_per_layer, to 0 if it has none."
        )
    params = model.shared_params_per_layer
    if params == 0:
        return fabric
    fabric.gpus["shared_bytes"] = params * model.dense_weight_bits / 8
    fabric.gpus["shared_flop_per_row"] = 2.0 * params
    fabric.cut["apart"] = policy.shared == "apart"
    work = records(2, fabric.machine.work.dtype)
    work[:] = fabric.machine.work[0]
    work["dense_bytes"][1] -= fabric.gpus["shared_bytes"][0]
    work["dense_flop_per_row"][1] -= fabric.gpus["shared_flop_per_row"][0]
    return fabric._replace(machine=fabric.machine._replace(work=work))


def _network_of(model: Model, system: System) -> np.ndarray:
    """Return NETWORK [3], by phase."""
    assert system.network is not None
    network = records(len(PHASE_NAMES), NETWORK)
    for phase, name in enumerate(PHASE_NAMES):
        given, row = system.network.of_phase(name), network[phase : phase + 1]
        row["bytes_s"] = given["bandwidth_gb_s"] * 1e9
        row["dispatch_s"] = given["dispatch_latency_us"] / 1e6
        row["combine_s"] = given["combine_latency_us"] / 1e6
        row["row_s"] = given["row_ns"] / 1e9
        row["dispatch_bytes"] = model.expert_hidden * given["dispatch_bits"] / 8
        row["combine_bytes"] = model.expert_hidden * given["combine_bits"] / 8
        row["node_bytes_s"] = np.inf if given["node_bandwidth_gb_s"] is None else given["node_bandwidth_gb_s"] * 1e9
        row["node_s"] = given["node_latency_us"] / 1e6
        row["dedup"] = given["dedup"]
    return network


def _or(given: float | None, default: float) -> float:
    return default if given is None else given
