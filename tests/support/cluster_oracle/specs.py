"""Models, systems and policies by the names of their TOML fields: dicts, structs, or anything with such attributes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from msgspec import UNSET

from support.cluster_oracle.parts import Machine, Network, Plan, Plans, Policy, Row, Step
from support.oracle import OracleTrace
from support.oracle_balance import eplb, lpt
from support.oracle_layer import expert_bytes, expert_width

PHASES = ("prefill", "decode", "mixed")
BLOCKS_FIRST = ("ep-lpt", "eplb", "eplb-hierarchical")  # made from loads: ep-block before the first plan


def field(part: Any, name: str, default: Any = None) -> Any:
    """A field of a dict or a struct; the default where it is not there, None or UNSET."""
    value = part.get(name) if isinstance(part, dict) else getattr(part, name, None)
    return default if value is None or value is UNSET else value


class Named:
    """Reads dict keys as attributes, for what takes structs."""

    def __init__(self, part: Any):
        self.part = part

    def __getattr__(self, name: str) -> Any:
        value = field(self.part, name)
        if value is None:
            raise AttributeError(name)
        return value


def steps_of(trace: OracleTrace) -> list[Step]:
    """The rows of a trace in arrays."""

    def row(at: int) -> Row:
        choices = [[e for e in of_layer if e >= 0] for of_layer in trace.experts[at].tolist()]
        return Row(int(trace.request[at]), int(trace.position[at]), int(trace.row_phase[at]), choices)

    return [Step([row(at) for at in trace.rows_of(step)]) for step in range(trace.steps)]


def from_specs(model: Any, system: Any, policy: Any, trace: OracleTrace | None = None) -> tuple[Machine, Policy]:
    """Read a model, a system and a policy; a trace's own sizes of experts override the model's."""
    gpu, cluster = field(system, "gpu"), field(system, "cluster")
    gpus = field(cluster, "gpus")
    layers, experts = field(model, "moe_layers"), field(model, "experts")
    width = expert_width(Named(model))
    per_expert = field(model, "expert_matrices", 3) * width * field(model, "expert_intermediate")
    network = field(system, "network")
    sizes: Any = SimpleNamespace(expert_bytes=None) if trace is None else trace
    machine = Machine(
        L=layers,
        experts=list(experts) if isinstance(experts, list | tuple) else [experts] * layers,
        W=expert_bytes(sizes, Named(model)).tolist(),
        flop_per_row=2.0 * per_expert,
        width=width,
        activation_bytes=field(model, "activation_bytes", 2),
        dense_params=field(model, "dense_params_per_layer"),
        shared_params=field(model, "shared_params_per_layer", 0),
        dense_bits=field(model, "dense_weight_bits"),
        head_bytes=field(model, "once_params") * field(model, "dense_weight_bits") / 8,
        kv_bytes=field(model, "kv_bytes_per_token_layer"),
        F=field(gpu, "tflops") * 1e12 * field(gpu, "compute_efficiency", 1.0),
        B=field(gpu, "bandwidth_gb_s") * 1e9 * field(gpu, "memory_efficiency", 1.0),
        t_g=field(gpu, "launch_us") * 1e-6,
        overhead_s=field(gpu, "layer_overhead_us", 0.0) * 1e-6,
        launch=field(gpu, "launch", "expert"),
        roofline=field(gpu, "roofline", "max"),
        attention=gpus or field(cluster, "attention"),
        expert_gpus=gpus or field(cluster, "experts"),
        colocated=gpus is not None,
        network=[network_of(network, phase) for phase in PHASES],
        factors=list(field(cluster, "factors", [])),
        gpus_per_node=field(network, "gpus_per_node", field(cluster, "gpus_per_node", 0)),
    )
    return machine, policy_of(policy)


def network_of(network: Any, phase: str) -> Network:
    """The constants of a phase: what its own table says, and the rest of [network]."""
    own = field(network, phase, {})

    def value(name: str, default: Any) -> Any:
        return field(own, name, field(network, name, default))

    return Network(
        B_net=value("bandwidth_gb_s", None) * 1e9,
        dispatch_s=value("dispatch_latency_us", 0.0) * 1e-6,
        combine_s=value("combine_latency_us", 0.0) * 1e-6,
        row_s=value("row_ns", 0.0) * 1e-9,
        dispatch_bits=value("dispatch_bits", 16),
        combine_bits=value("combine_bits", 16),
        dedup=value("dedup", True),
        B_node=value("node_bandwidth_gb_s", 0.0) * 1e9,
        node_s=value("node_latency_us", 0.0) * 1e-6,
    )


def policy_of(policy: Any) -> Policy:
    """The fields that say how a cluster is run; the placement is `plans_of`'s."""
    names = ("copies", "seed", "schedule", "order", "shared", "execution", "kernels_per_layer", "interval")
    names += ("migrate", "migrate_share", "plan_steps")
    given = {name: field(policy, name) for name in names if field(policy, name) is not None}
    from_loads = field(policy, "placement", "ep") in BLOCKS_FIRST
    return Policy(**given, window=field(policy, "window", 0) if from_loads else 0)


def plans_of(policy: Any, machine: Machine, given: Plan | None = None) -> Plans:
    """Plans of a policy's placement by plain Python; `given` is the plan of placement `plan`."""
    placement, gpus = field(policy, "placement", "ep"), machine.expert_gpus
    if placement == "plan":
        assert given is not None, "placement plan needs a plan"
        return Plans(given)
    if placement == "ep":
        return Plans([held([e % gpus for e in range(number)], gpus) for number in machine.experts])
    first = [held([e * gpus // number for e in range(number)], gpus) for number in machine.experts]
    if placement not in BLOCKS_FIRST:
        return Plans(first)
    make = maker_of(placement, machine, policy)
    return Plans(first, lambda loads: [make(of_layer) for of_layer in loads])


def maker_of(placement: str, machine: Machine, policy: Any) -> Callable[[list[int]], list[list[int]]]:
    """What makes the plan of one layer from its loads."""
    gpus = machine.expert_gpus
    if placement == "ep-lpt":
        return lambda loads: held(lpt(loads, gpus), gpus)
    nodes, groups = (field(policy, "nodes", 1), field(policy, "groups", 1)) if placement != "eplb" else (1, 1)

    def make(loads: list[int]) -> list[list[int]]:
        slots = slots_of(len(loads), gpus, field(policy, "redundant"))
        plan, room = eplb(loads, slots, gpus, nodes, groups, float), slots // gpus
        return [plan[gpu * room : (gpu + 1) * room] for gpu in range(gpus)]

    return make


def slots_of(experts: int, gpus: int, redundant: int | None) -> int:
    """Slots of a layer, as `analyze balance` has them: by default one redundant one at least for each GPU."""
    return experts + redundant if redundant is not None else -(-(experts + gpus) // gpus) * gpus


def held(gpu_of: list[int], gpus: int) -> list[list[int]]:
    """What each GPU holds, by id."""
    return [[e for e, at in enumerate(gpu_of) if at == gpu] for gpu in range(gpus)]
