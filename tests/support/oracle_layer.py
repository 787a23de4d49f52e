"""The oracle's stateless half: sections 1, 2, 3, 5 and 6 of the timing model (inputs, costs, one layer, dispatch)."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

PREFILL, DECODE, MIXED = 0, 1, 2
OPTIMAL_LIMIT = 20  # active experts above which `optimal` falls back to `balance`


def less(a: float, b: float) -> bool:
    """`a < b` on times: by more than the rounding of a sum."""
    return a < b * (1 - 1e-12)


def demand_order(n: dict[int, int]) -> list[int]:
    """Return the active experts by rows descending, then id ascending."""
    return sorted(n, key=lambda e: (-n[e], e))


# --- 1. What goes in -------------------------------------------------------------------------------------------------


@dataclass
class OracleTrace:
    """A routing trace in plain arrays."""

    experts: np.ndarray  # int [rows, L, k], -1 = absent
    request: np.ndarray  # int [rows]
    position: np.ndarray  # int [rows]
    row_phase: np.ndarray  # int [rows], 0 prefill, 1 decode
    offset: np.ndarray  # int [steps + 1]; every step has at least one row
    expert_bytes: np.ndarray | None = None  # [L] or [L, E]

    @property
    def steps(self) -> int:
        return len(self.offset) - 1

    def rows_of(self, step: int) -> range:
        return range(int(self.offset[step]), int(self.offset[step + 1]))

    def phase(self, step: int) -> int:
        phases = {int(self.row_phase[row]) for row in self.rows_of(step)}
        return phases.pop() if len(phases) == 1 else MIXED

    def demand(self, step: int, layer: int) -> dict[int, int]:
        """Return n[e] of the active experts only."""
        rows = self.rows_of(step)
        return dict(Counter(e for e in self.experts[rows.start : rows.stop, layer].ravel().tolist() if e >= 0))


@dataclass
class Machine:
    """Model and system in SI units, and what section 2 makes of them."""

    L: int
    E: int
    N: int
    W: np.ndarray  # bytes [L, E]
    flop_per_row: float
    dense_bytes: float
    dense_flop_per_row: float
    head_bytes: float
    kv_bytes: float
    activation_row_bytes: float
    F_g: float
    B_g: float
    t_g: float
    F_n: float
    B_n: float
    t_n: float
    linked: bool
    B_l: float
    t_l: float
    slots: int = 0

    def gpu_s(self, layer: int, e: int, n: int) -> float:
        return max(self.flop_per_row * n / self.F_g, self.W[layer, e] / self.B_g) + self.t_g

    def ndp_s(self, layer: int, e: int, n: int, g: int) -> float:
        return max(self.flop_per_row * n / (g * self.F_n), self.W[layer, e] / (g * self.B_n)) + self.t_n

    def fetch_s(self, layer: int, e: int) -> float:
        return self.W[layer, e] / self.B_l + self.t_l

    def dense_s(self, T: int, C: int) -> float:
        work = max(self.dense_bytes / self.B_g, self.dense_flop_per_row * T / self.F_g)
        return work + self.kv_bytes * C / self.B_g + self.t_g

    def head_s(self) -> float:
        return self.head_bytes / self.B_g + self.t_g


def expert_bytes(trace: OracleTrace, model: Any) -> np.ndarray:
    """Return W, float [L, E]: the trace's own sizes if it has them, else from the model's weight bits."""
    shape = (model.moe_layers, most(model.experts))
    if trace.expert_bytes is not None:
        given = np.asarray(trace.expert_bytes, dtype=float)
        return np.broadcast_to(given[:, None] if given.ndim == 1 else given, shape)
    bits = model.weight_bits
    if isinstance(bits, str | Path):
        bits = np.loadtxt(bits, delimiter=",", ndmin=2)
    elif isinstance(bits, list | tuple):
        bits = np.asarray(bits, dtype=float)[:, None]
    w = np.broadcast_to(np.asarray(bits, dtype=float) / 8, shape)
    sizes = model.expert_matrices * expert_width(model) * model.expert_intermediate * w
    if isinstance(model.experts, list):
        for layer, count in enumerate(model.experts):
            sizes[layer, count:] = 0.0
    return sizes


def expert_width(model: Any) -> int:
    """Return the width in which experts work: that of the rows, unless the model says another."""
    return model.moe_hidden if isinstance(model.moe_hidden, int) else model.hidden


def most(numbers: int | list[int]) -> int:
    """Return a number that may be said for each layer: the largest."""
    return max(numbers) if isinstance(numbers, list) else numbers


def machine_of(trace: OracleTrace, model: Any, system: Any, slots: int | None) -> Machine:
    gpu, ndp, link = system.gpu, system.ndp, system.link
    machine = Machine(
        L=model.moe_layers,
        E=most(model.experts),
        N=ndp.units if ndp else 0,
        W=expert_bytes(trace, model),
        flop_per_row=2.0 * model.expert_matrices * expert_width(model) * model.expert_intermediate,
        dense_bytes=model.dense_params_per_layer * model.dense_weight_bits / 8,
        dense_flop_per_row=2.0 * model.dense_params_per_layer,
        head_bytes=model.once_params * model.dense_weight_bits / 8,
        kv_bytes=model.kv_bytes_per_token_layer,
        activation_row_bytes=expert_width(model) * model.activation_bytes,
        F_g=gpu.tflops * 1e12 * gpu.compute_efficiency,
        B_g=gpu.bandwidth_gb_s * 1e9 * gpu.memory_efficiency,
        t_g=gpu.launch_us * 1e-6,
        F_n=2 * ndp.gmac_s * 1e9 if ndp else 0.0,
        B_n=ndp.bandwidth_gb_s * 1e9 if ndp else 0.0,
        t_n=ndp.command_us * 1e-6 if ndp else 0.0,
        linked=link is not None,
        B_l=link.bandwidth_gb_s * 1e9 if link else math.nan,
        t_l=link.latency_us * 1e-6 if link else math.nan,
    )
    left = (gpu.memory_gb - gpu.reserve_gb) * 1e9 - machine.L * machine.dense_bytes - machine.head_bytes
    room = math.floor(left / machine.W.max()) if slots is None else slots
    everything = sum(model.experts) if isinstance(model.experts, list) else machine.L * machine.E
    machine.slots = min(max(room, 0), everything)
    return machine


# --- 3. One layer ----------------------------------------------------------------------------------------------------


@dataclass
class TimeLine:
    """What happens in one layer after the router has spoken."""

    on_gpu: list[int]
    on_ndp: list[int]
    fetched: list[int]
    X: float
    act: float
    busy: list[float]  # seconds of each NDP unit
    fetch_s: float
    T_gpu: float
    T_ndp: float
    moe: float


def time_line(m: Machine, layer: int, n: dict[int, int], T: int, G: set[int], resident: set[int], units) -> TimeLine:
    """Run the experts of G on the GPU and the other active ones on the units; units[e] lists those that share e."""
    on_gpu = [e for e in demand_order(n) if e in G]
    on_ndp = [e for e in demand_order(n) if e not in G]
    # 1. activations go out, and come back when the last unit is done
    rows_on = [sum(n[e] for e in on_ndp if u in units[e]) for u in range(m.N)]
    X = m.activation_row_bytes * sum(min(T, rows) for rows in rows_on)
    act = X / m.B_l + m.t_l if on_ndp else 0.0
    # 2. the units
    busy = [math.fsum(m.ndp_s(layer, e, n[e], len(units[e])) for e in on_ndp if u in units[e]) for u in range(m.N)]
    T_ndp = act + max(busy) + act if on_ndp else 0.0
    # 3. weights come in, one expert after another
    arrival: dict[int, float] = {}
    clock = 0.0
    for e in on_gpu:
        if e not in resident:
            clock += m.fetch_s(layer, e)
            arrival[e] = clock
    # 4. the GPU runs the resident ones, then the fetched ones as they arrive
    T_gpu = 0.0
    for e in [e for e in on_gpu if e in resident] + list(arrival):
        T_gpu = max(T_gpu, arrival.get(e, 0.0)) + m.gpu_s(layer, e, n[e])
    return TimeLine(on_gpu, on_ndp, list(arrival), X, act, busy, clock, T_gpu, T_ndp, max(T_gpu, T_ndp))


# --- 5. Placement ----------------------------------------------------------------------------------------------------


def place(policy: Any, m: Machine) -> list[list[list[int]]]:
    """Return units[layer][expert]: the NDP units that share the expert."""
    kind, _, g = policy.placement.partition(":")
    if m.N == 0:
        return [[[] for _ in range(m.E)] for _ in range(m.L)]
    if kind == "ep-lpt":
        loads = np.loadtxt(policy.loads, delimiter=",", ndmin=2)
        return [longest_first(loads[layer], m.N) for layer in range(m.L)]
    if kind == "eplb":
        loads = np.loadtxt(policy.loads, delimiter=",", ndmin=2)
        return [longest_first(loads[layer], m.N, m.E // m.N) for layer in range(m.L)]
    if kind == "plan":
        rows = json.loads(Path(policy.plan).read_text())["physical_to_logical_map"]
        return [[[row.index(e) // (m.E // m.N)] for e in range(m.E)] for row in rows]
    if kind == "ep":
        layer_units = [[e % m.N] for e in range(m.E)]
    elif kind == "ep-block":
        layer_units = [[e * m.N // m.E] for e in range(m.E)]
    else:
        size = int(g) if g else m.N
        groups = m.N // size
        layer_units = [list(range(e % groups * size, e % groups * size + size)) for e in range(m.E)]
    return [layer_units] * m.L


def longest_first(load: np.ndarray, N: int, room: int | None = None) -> list[list[int]]:
    """Longest load first onto the least loaded unit, or the least loaded that has `room`: experts that it may hold."""
    units: list[list[int]] = [[] for _ in load]
    total = [0.0] * N
    if room == 1:
        return [[e] for e in range(len(load))]
    for e in sorted(range(len(load)), key=lambda e: (-load[e], e)):
        u = min((u for u in range(N) if room is None or units.count([u]) < room), key=lambda u: (total[u], u))
        units[e] = [u]
        total[u] += float(load[e])
    return units


# --- 6. Dispatch -----------------------------------------------------------------------------------------------------


def dispatch(kind: str, order: list[int], resident: set[int], moe_of: Callable[[set[int]], float]) -> set[int]:
    """Return G; order is the active experts in demand order, moe_of(G) the layer's `moe` if G goes to the GPU."""
    if kind == "ndp":
        return set()
    if kind == "gpu":
        return set(order)
    if kind == "hot":
        return least([set(order[:H]) for H in range(len(order) + 1)], moe_of)
    if kind == "optimal" and len(order) <= OPTIMAL_LIMIT:
        # combinations() goes by size, then lexicographically in demand order: the order in which ties are broken
        return least([set(G) for size in range(len(order) + 1) for G in combinations(order, size)], moe_of)
    if kind not in ("balance", "optimal"):
        raise ValueError(f"unknown dispatch {kind!r}")
    G: set[int] = set()
    for e in [e for e in order if e in resident] + [e for e in order if e not in resident]:
        now, then = moe_of(G), moe_of(G | {e})
        if less(then, now) or (e in resident and not less(now, then)):
            G = G | {e}
    return G


def least(splits: list[set[int]], moe_of: Callable[[set[int]], float]) -> set[int]:
    """Return the first split that is not beaten by the best one."""
    times = [moe_of(G) for G in splits]
    best = min(times)
    return next(G for G, time in zip(splits, times, strict=True) if not less(best, time))
