"""A machine to work out by hand, for the engine: an expert of 1 MB takes 1 ms on the GPU and 4 ms to fetch.

At home it takes 2 ms; a row takes 0.1 ms on the GPU and 1 ms at home; dense is 1 ms; a disk reads an expert in 11 ms.
Activations, launches and other latencies are free unless they are given.
"""

from typing import Any

import msgspec
import numpy as np

from moetrace.engine.run import Lane
from moetrace.spec import Model, PolicySpec, System, load_model, load_policy, load_system
from moetrace.trace import Trace
from support.one_run import run

MODEL = {
    "name": "by-hand",
    "moe_layers": 1,
    "experts": 4,
    "top_k": 1,
    "hidden": 1000,
    "expert_intermediate": 1000,
    "expert_matrices": 1,
    "weight_bits": 8,
    "dense_weight_bits": 8,
    "activation_bytes": 1e-9,
    "dense_params_per_layer": 1_000_000,
    "once_params": 0,
    "kv_bytes_per_token_layer": 0,
}
GPU = {"name": "g", "tflops": 0.02, "bandwidth_gb_s": 1, "memory_gb": 1, "reserve_gb": 0, "launch_us": 0}
NDP = {"units": 1, "gmac_s": 1, "bandwidth_gb_s": 0.5, "capacity_gb": 1, "command_us": 0}
CPU = {"tflops": 0.002, "bandwidth_gb_s": 0.5, "command_us": 0}
LINK = {"bandwidth_gb_s": 0.25, "latency_us": 0}
DISK = {"bandwidth_gb_s": 0.1, "latency_us": 1000}


def model(**changed: Any) -> Model:
    return load_model(msgspec.convert(MODEL | changed, Model))


def system(gpu: dict | None = None, link: dict | None = None, **parts: dict | None) -> System:
    """Return a system of a GPU, a link and the parts that are named, each with its fields changed."""
    given: dict[str, Any] = {"name": "by-hand", "gpu": GPU | (gpu or {}), "link": LINK | (link or {})}
    for name, base in (("ndp", NDP), ("cpu", CPU), ("host", {}), ("disk", DISK)):
        if name in parts:
            given[name] = base | (parts[name] or {})
    return load_system(msgspec.convert(given, System))


def policy(dispatch: str, residency: str = "none", **fields: Any) -> PolicySpec:
    return load_policy(PolicySpec(name=dispatch), {"dispatch": dispatch, "residency": residency} | fields)


def steps(*steps: list[list[list[int]]]) -> Trace:
    """Return a trace of steps: lists of rows: lists of layers: lists of ids. Every row is a request of its own."""
    experts = np.array([row for step in steps for row in step], np.uint8)
    sizes = np.array([len(step) for step in steps], np.int64)
    return Trace.from_arrays(experts, num_experts=4, steps=sizes)


def rows(*ids: int) -> list[list[list[int]]]:
    """Return a step of one layer, a row for each id."""
    return [[[e]] for e in ids]


def replay(trace: Trace, on: System, policy: PolicySpec, slots: int = 4, **changed: Any) -> Lane:
    layers, experts = trace.layers, trace.num_experts
    of = model(moe_layers=layers, experts=experts, top_k=trace.top_k, **changed)
    return run(trace, of, on, [policy], slots=slots).lanes[0]


def moe_ms(lane: Lane) -> list[float]:
    return [float(seconds) * 1e3 for seconds in lane.log.step["moe_s"]]
