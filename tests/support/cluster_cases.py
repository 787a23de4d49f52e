"""Random small clusters: traces, models, machines and policies in all combinations.

Model, system and policy are plain dicts, as their TOML files would be, so that the oracle and the engine each read them
in their own way. A field is as often left out as written. Stage times are drawn close to each other, so that every
resource is the bottleneck of some case; half of the cases have powers of two for rates and times, for ties.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from support.cluster_oracle import Figures, Machine, Plan, Plans, Policy, from_specs, plans_of, replay, steps_of
from support.oracle import OracleTrace
from support.strategies import arrivals, routing

MADE_FROM_LOADS = ("ep-lpt", "eplb", "eplb-hierarchical")
PLACEMENTS = ("ep", "ep-block", "plan", *MADE_FROM_LOADS)
COPIES = ("even", "row", "random", "nearest")


@dataclass
class ClusterCase:
    """One replay. `plan` [L, GPUs, slots], -1 = empty, is that of placement `plan`."""

    trace: OracleTrace
    model: dict[str, Any]
    system: dict[str, Any]
    policy: dict[str, Any]
    plan: Plan | None = None

    @property
    def gpus(self) -> int:
        """GPUs that hold experts."""
        cluster = self.system["cluster"]
        return cluster.get("gpus") or cluster["experts"]

    def read(self, **changes: Any) -> tuple[Machine, Policy, Plans]:
        """What the oracle takes, with some fields of the policy changed."""
        policy = self.policy | changes
        machine, how = from_specs(self.model, self.system, policy, self.trace)
        return machine, how, plans_of(policy, machine, self.plan)

    def run(self, **changes: Any) -> Figures:
        """Replay it in the oracle, with some fields of the policy changed."""
        return replay(steps_of(self.trace), *self.read(**changes))


@st.composite
def cluster_cases(
    draw,
    max_steps: int = 8,
    max_rows: int = 9,
    max_experts: int = 10,
    max_gpus: int = 5,
    schedules: tuple[str, ...] = ("serial", "pipeline", "pipeline:auto"),
    placements: tuple[str, ...] = PLACEMENTS,
    two_tiers: bool = True,
    uneven: bool = True,
) -> ClusterCase:
    """Draw a case."""
    layers = draw(st.integers(1, 4), label="layers")
    ties = draw(st.booleans(), label="ties")
    system = draw(cluster_systems(max_gpus, ties, two_tiers))
    gpus = system["cluster"].get("gpus") or system["cluster"]["experts"]
    policy = draw(cluster_policies(schedules, placements))
    placement = policy.get("placement", "ep")
    if placement == "eplb-hierarchical":
        experts, counts = draw(_in_groups(policy, gpus, max_experts)), None
    else:
        experts = draw(st.integers(2, max_experts), label="experts")
        counts = draw(_uneven(layers, experts)) if uneven else None
    if placement in ("eplb", "eplb-hierarchical") and counts is None and draw(st.booleans(), label="redundant"):
        policy["redundant"] = -experts % gpus + gpus * draw(st.integers(0, 2))
    top_k = draw(st.integers(1, min(4, min(counts or [experts]))), label="top_k")
    trace = draw(cluster_traces(layers, experts, top_k, max_steps, max_rows, counts))
    model = draw(cluster_models(layers, counts or experts, top_k, ties))
    plan = None
    if placement == "plan":
        rng = np.random.default_rng(draw(st.integers(0, 2**32), label="plan"))
        extra = draw(st.integers(0, 3), label="extra slots a GPU")
        plan = drawn_plan(rng, counts or [experts] * layers, gpus, extra)
    return ClusterCase(trace, model, system, policy, plan)


@st.composite
def cluster_traces(draw, layers, experts, top_k, max_steps, max_rows, counts) -> OracleTrace:
    """Draw a trace; many steps are all prefill or all decode. `counts`: experts of each layer, or None."""
    rows_of = draw(st.lists(st.integers(1, max_rows), min_size=1, max_size=max_steps), label="rows of each step")
    absent = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]), label="absent")
    kind = draw(st.sampled_from(["wild", "by step", "decode"]), label="phases")
    sizes = draw(st.sampled_from([None, "layer", "expert"]), label="expert_bytes")
    rng = np.random.default_rng(draw(st.integers(0, 2**32), label="seed"))
    rows = sum(rows_of)
    ids = routing(rng, rows, (layers, experts, top_k), absent)
    if counts:
        ids = np.stack([routing(rng, rows, (1, number, top_k), absent)[:, 0] for number in counts], axis=1)
    request, position, phase = arrivals(rng, rows, kind == "wild")
    if kind == "by step":
        phase = np.repeat(rng.integers(0, 3, len(rows_of)), rows_of)
        phase = np.where(phase == 2, rng.integers(0, 2, rows), phase)
    elif kind == "decode":
        phase = np.ones_like(phase)
    own = None
    if sizes:
        own = rng.integers(500_000, 1_500_000, layers if sizes == "layer" else (layers, experts))
    return OracleTrace(ids, request, position, phase, np.concatenate(([0], np.cumsum(rows_of))), own)


@st.composite
def cluster_models(draw, layers: int, experts: int | list[int], top_k: int, ties: bool) -> dict[str, Any]:
    """Draw a model of experts of about 1 MB, with and without shared experts."""
    model = {
        "name": "random",
        "moe_layers": layers,
        "experts": experts,
        "top_k": top_k,
        "hidden": 512,
        "expert_intermediate": 1024,
        "expert_matrices": draw(st.sampled_from([1, 2])),
        "weight_bits": draw(st.sampled_from([8.0, 16.0]) if ties else st.floats(4, 16)),
        "dense_weight_bits": draw(st.sampled_from([8, 16])),
        "activation_bytes": draw(st.sampled_from([1, 2])),
        "dense_params_per_layer": draw(st.sampled_from([2**18, 2**20])),
        "once_params": draw(st.sampled_from([0, 2**20])),
        "kv_bytes_per_token_layer": 0 if ties else draw(st.floats(0, 65536)),
    }
    model |= draw(_some({"moe_hidden": st.sampled_from([512, 256])}))
    return model | draw(_some({"shared_params_per_layer": st.sampled_from([0, 2**17, 2**18])}))


@st.composite
def cluster_systems(draw, max_gpus: int, ties: bool, two_tiers: bool) -> dict[str, Any]:
    """Draw a cluster on which a slot, a transfer and attention take about as long."""

    def ratio(low: float, high: float) -> st.SearchStrategy[float]:
        exponents = st.integers(round(np.log2(low)), round(np.log2(high)))
        return exponents.map(lambda e: 2.0**e) if ties else st.floats(low, high)

    def time(high: float) -> st.SearchStrategy[float]:
        return st.sampled_from([0.0, 2.0**-10 * 1e6]) if ties else st.floats(0, high)

    gpu = {
        "name": "random",
        "tflops": 2.0**31 / 1e12 * draw(ratio(0.25, 64)),
        "bandwidth_gb_s": 2.0**30 / 1e9,
        "memory_gb": 64.0,
        "reserve_gb": 0.0,
        "launch_us": draw(time(300)),
    }
    share = st.sampled_from([1.0, 0.5]) if ties else st.floats(0.5, 1)
    gpu |= draw(_some({"compute_efficiency": share, "memory_efficiency": share}))
    gpu |= draw(_some({"launch": st.sampled_from(["expert", "layer"]), "roofline": st.sampled_from(["max", "sum"])}))
    gpu |= draw(_some({"layer_overhead_us": st.sampled_from([0.0, 120.0])}))
    some_gpus = st.sampled_from([*range(2, max_gpus + 1), 1])
    if draw(st.booleans(), label="colocated"):
        cluster = {"gpus": draw(some_gpus, label="gpus")}
    else:
        cluster = {"attention": draw(some_gpus, label="attention"), "experts": draw(some_gpus, label="experts")}
    if draw(st.integers(0, 2), label="slow GPUs") == 0:
        factor = st.sampled_from([1.0, 0.5, 0.25, 2.0]) if ties else st.just(1.0) | st.floats(0.1, 1.5)
        number = sum(cluster.values())
        cluster["factors"] = draw(st.lists(factor, min_size=number, max_size=number), label="factors")
    # So slow that rows of 1 KB take longer than an expert of 1 MB, or so fast that a plan moves in some steps.
    powers = st.integers if ties else st.floats
    rate = (powers(-13, -9) | powers(-4, 3)).map(lambda power: 2.0 ** (30 + power) / 1e9)
    fields = {
        "bandwidth_gb_s": rate,
        "dispatch_latency_us": time(300),
        "combine_latency_us": time(300),
        "row_ns": st.sampled_from([0.0, 2.0**-14 * 1e9] if ties else [0.0, 50_000.0]),
        "dispatch_bits": st.sampled_from([16, 8, 8.25]),
        "combine_bits": st.sampled_from([16, 32]),
        "dedup": st.booleans(),
    }
    tiers = {"node_bandwidth_gb_s": rate, "node_latency_us": time(300)}
    always = ("bandwidth_gb_s", "dispatch_latency_us", "combine_latency_us")
    network = {name: draw(fields[name]) for name in always}
    network |= draw(_some({name: fields[name] for name in fields if name not in always}))
    if two_tiers and draw(st.integers(0, 3), label="two tiers") == 0:
        network |= {name: draw(value) for name, value in tiers.items()}
        network["gpus_per_node"] = draw(st.integers(1, max_gpus), label="gpus_per_node")
        fields |= tiers
    for phase in ("decode", "prefill"):
        if draw(st.integers(0, 2), label=f"network.{phase}") == 0:
            network[phase] = draw(_some(fields))
    return {"name": "random", "gpu": gpu, "cluster": cluster, "network": network}


@st.composite
def cluster_policies(draw, schedules: tuple[str, ...], placements: tuple[str, ...]) -> dict[str, Any]:
    """Draw a policy; `redundant` is left to what knows the experts."""
    placement = draw(st.sampled_from(placements), label="placement")
    policy = {"name": "random", "placement": placement}
    policy |= draw(_some({"copies": st.sampled_from(COPIES), "seed": st.integers(0, 2**40)}))
    policy |= draw(_some({"shared": st.sampled_from(["with-attention", "apart"])}))
    kind = draw(st.sampled_from(schedules), label="schedule")
    if kind == "serial":
        policy |= draw(_some({"schedule": st.just("serial"), "execution": st.sampled_from(["bulk", "fused"])}))
        policy |= draw(_some({"kernels_per_layer": st.integers(1, 4)}))
    else:
        cuts = st.integers(1, 6)
        policy["schedule"] = kind if kind != "pipeline" else f"pipeline:{draw(cuts)},{draw(cuts)}"
        policy |= draw(_some({"order": st.sampled_from(["asas", "aass"])}))
    if kind == "pipeline:auto":
        policy |= draw(_some({"plan_steps": st.integers(1, 4), "shared": st.just("auto")}))
    if placement in MADE_FROM_LOADS:
        policy["window"] = draw(st.integers(1, 4), label="window")
        policy |= draw(_some({"interval": st.integers(0, 3)}))
        if draw(st.booleans(), label="async"):
            policy["migrate"] = "async"
            policy |= draw(_some({"migrate_share": st.sampled_from([0.1, 0.5, 0.9])}))
    return policy


@st.composite
def _some(draw, fields: dict[str, st.SearchStrategy]) -> dict[str, Any]:
    """Draw each field or leave it out."""
    return {name: draw(value, label=name) for name, value in fields.items() if draw(st.booleans())}


@st.composite
def _in_groups(draw, policy: dict[str, Any], gpus: int, max_experts: int) -> int:
    """Set nodes and groups that hierarchical EPLB can share equally, and draw the experts."""
    nodes = draw(st.sampled_from([n for n in range(1, gpus + 1) if gpus % n == 0]), label="nodes")
    groups = nodes * draw(st.integers(1, 2), label="groups of a node")
    policy |= {"nodes": nodes, "groups": groups}
    return groups * draw(st.integers(1, max(1, max_experts // groups)), label="experts of a group")


@st.composite
def _uneven(draw, layers: int, experts: int) -> list[int] | None:
    """Draw, in one case of five, experts for each layer, one of which has all."""
    if draw(st.integers(0, 4), label="uneven layers"):
        return None
    return [experts, *(draw(st.integers(2, experts)) for _ in range(layers - 1))]


def drawn_plan(rng: np.random.Generator, counts: list[int], gpus: int, extra: int) -> Plan:
    """A plan with each expert at least once and the same number of slots on every GPU; some may be empty."""
    room = -(-max(counts) // gpus) + extra
    plan = []
    for number in counts:
        slots = np.concatenate([np.arange(number), rng.integers(-1, number, gpus * room - number)])
        plan.append(rng.permutation(slots).reshape(gpus, room).tolist())
    return plan
