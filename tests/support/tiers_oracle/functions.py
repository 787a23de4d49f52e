"""Remote functions (section I): which experts live there, and what a layer of them takes."""

import math
from dataclasses import dataclass

import numpy as np

from support.oracle_layer import OracleTrace, less
from support.tiers_oracle.machine import Plain, Tiers


def remote_experts(trace: OracleTrace, m: Tiers, policy: Plain) -> list[set[int]]:
    """Return the experts of each layer that live in functions: those of fewest rows, the higher id first."""
    if policy.remote is None or m.remote is None:
        return [set() for _ in range(m.L)]
    rows = np.zeros((m.L, m.E))
    for step in range(min(policy.plan_steps, trace.steps)):
        for layer in range(m.L):
            for e, n in trace.demand(step, layer).items():
                rows[layer, e] += n
    if policy.remote_loads is not None:
        rows = policy.remote_loads
    chosen = []
    for layer in range(m.L):
        ids = [e for e in range(m.E) if m.W[layer, e] > 0]
        ids.sort(key=lambda e: (rows[layer, e], -e))
        chosen.append(set(ids[: math.floor(policy.remote * len(ids))]))
    return chosen


@dataclass
class Calls:
    """What the functions of one layer do."""

    T: float = 0.0
    seconds: float = 0.0  # of all replicas
    calls: int = 0


def longest_first(seconds: dict[int, float], replicas: int) -> list[list[int]]:
    """Give each expert to the replica of least seconds, the longest expert first."""
    given: list[list[int]] = [[] for _ in range(replicas)]
    total = [0.0] * replicas
    order: list[int] = []
    for e in sorted(seconds):  # a stable insertion that knows two equal times when it sees them
        at = next((i for i, other in enumerate(order) if less(seconds[other], seconds[e])), len(order))
        order.insert(at, e)
    for e in order:
        best = 0
        for z in range(1, replicas):
            if less(total[z], total[best]):
                best = z
        given[best].append(e)
        total[best] += seconds[e]
    return given


def call(m: Tiers, layer: int, n: dict[int, int], replicas: int) -> Calls:
    """Run the rows of the remote experts of a layer."""
    if not n:
        return Calls()
    remote, size = m.remote, m.activation_row_bytes
    seconds = {
        e: max(m.flop_per_row * rows / remote.F, m.W[layer, e] / remote.B) + 2 * rows * size / remote.network_bytes_s
        for e, rows in n.items()
    }
    done = Calls()
    for experts in longest_first(seconds, replicas):
        if experts:
            calls = max(1, math.ceil(sum(n[e] for e in experts) * size / remote.payload_bytes))
            took = sum(seconds[e] for e in experts) + calls * remote.call_s
            done = Calls(max(done.T, took), done.seconds + took, done.calls + calls)
    return done


def cold_start_s(m: Tiers, policy: Plain, remote: list[set[int]]) -> float:
    """Return what the first step waits for: the main function and all others start and load at once."""
    if policy.remote is None or m.remote is None:
        return 0.0
    away = [math.fsum(m.W[layer, e] for e in sorted(experts)) for layer, experts in enumerate(remote)]
    main = m.L * m.dense_bytes + m.head_bytes + math.fsum(m.W.ravel()) - math.fsum(away)
    return m.remote.start_s + max(main, *away) / m.remote.load_bytes_s
