"""Clusters, policies and traces of a few experts, whose times can be worked out by hand."""

from typing import Any

import msgspec
import numpy as np

from moetrace.engine.cluster.cluster_lane import ClusterLane
from moetrace.engine.run import run_setups
from moetrace.engine.setup import Setup
from moetrace.spec import MoetraceError, PolicySpec, System, load_policy, load_system
from moetrace.trace import Trace
from support.in_ms import GPU, model

FREE = {"bandwidth_gb_s": 1e9, "dispatch_latency_us": 0, "combine_latency_us": 0}
# By hand: a row's activations are 1 kB, so one row a GPU takes 1 ms at 1 MB/s.
SLOW = {
    "bandwidth_gb_s": 1e-3,
    "dispatch_latency_us": 0,
    "combine_latency_us": 0,
    "dispatch_bits": 8,
    "combine_bits": 8,
}


def cluster(network: dict | None = None, gpu: dict | None = None, **gpus: int) -> System:
    """Return a cluster of GPUs whose network is free unless fields of it are given."""
    given_gpu = GPU | (gpu or {})
    return load_system(
        msgspec.convert({"name": "c", "gpu": given_gpu, "cluster": gpus, "network": FREE | (network or {})}, System)
    )


def policy(schedule: str = "serial", **fields: Any) -> PolicySpec:
    return load_policy(PolicySpec(name="p"), {"schedule": schedule} | fields)


def trace_of(ids: Any, steps: Any = None, experts: int = 4, **more: Any) -> Trace:
    ids = np.asarray(ids)
    return Trace.from_arrays(ids, num_experts=experts, steps=np.asarray([len(ids)] if steps is None else steps), **more)


def drawn_trace(
    seed: int, *, steps: int = 6, rows: int = 9, layers: int = 3, experts: int = 8, top_k: int = 2
) -> Trace:
    """Uneven routing in steps of different sizes, one request a row number, some choices absent."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, rows + 1, steps)
    weight = random.random((layers, experts)) ** 2
    ids = np.argsort(-weight * random.random((sizes.sum(), layers, experts)), axis=2)[:, :, :top_k].astype(np.int64)
    ids[random.random(ids.shape) < 0.05] = 255
    request = np.concatenate([np.arange(size) for size in sizes])
    position = np.repeat(np.arange(steps), sizes)
    return trace_of(ids, sizes, experts, request=request, position=position, phase=random.integers(0, 2, steps))


def of(trace: Trace, on: System, policies: Any, store: Any = None, **changed: Any) -> list:
    """Return the lanes of a replay; raise what it ends with."""
    changed = {"moe_layers": trace.layers, "experts": trace.num_experts, "top_k": trace.top_k} | changed
    several = policies if isinstance(policies, list) else [policies]
    (run,) = run_setups(trace, [Setup(model=model(**changed), system=on, policies=several)], store=store)
    if isinstance(run, MoetraceError):
        raise run
    return run.lanes


def lane(trace: Trace, on: System, one: PolicySpec, **changed: Any) -> ClusterLane:
    return of(trace, on, one, **changed)[0]


def ms(found: ClusterLane) -> list[float]:
    return (1e3 * found.duration_s).tolist()
