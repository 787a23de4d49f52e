"""The oracle's stateless half: inputs, costs, one layer, placement, dispatch.

Sections 1, 2, 3, 5 and 6 of the timing model, with what version 2 adds to them: a CPU, launches and rooflines.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.oracle_bits import expert_bytes, expert_width, most, sparse_starts

PREFILL, DECODE, MIXED = 0, 1, 2
OPTIMAL_LIMIT = 20  # active experts above which `optimal` falls back to `balance`


def less(a: float, b: float) -> bool:
    """`a < b` on times: by more than the rounding of a sum."""
    return a < b * (1 - 1e-12)


def demand_order(n: dict[int, int]) -> list[int]:
    """Return the active experts by rows descending, then id ascending."""
    return sorted(n, key=lambda e: (-n[e], e))


# --- 1. Inputs -------------------------------------------------------------------------------------------------------


@dataclass
class OracleTrace:
    """A routing trace in plain arrays."""

    experts: np.ndarray  # int [rows, L, k], -1 = absent
    request: np.ndarray  # int [rows]
    position: np.ndarray  # int [rows]
    row_phase: np.ndarray  # int [rows], 0 prefill, 1 decode
    offset: np.ndarray  # int [steps + 1]; every step has at least one row
    expert_bytes: np.ndarray | None = None  # [L] or [L, E]
    gates: np.ndarray | None = None  # [rows, L, k]; where one is not finite, nobody knows it

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
class Device:
    """One device that runs experts, efficiencies included."""

    F: float  # FLOP/s
    B: float  # bytes/s of the memory that it reads experts from
    start: float  # seconds
    launch: str = "expert"  # who pays the start: each "expert", or the "layer" once
    roofline: str = "max"  # or "sum": compute and memory do not overlap

    def work_s(self, flop: float, weight_bytes: float) -> float:
        compute_s, memory_s = flop / self.F, weight_bytes / self.B
        return compute_s + memory_s if self.roofline == "sum" else max(compute_s, memory_s)

    @property
    def own_start(self) -> float:
        """What each expert pays that needs no start of its own."""
        return self.start if self.launch == "expert" else 0.0

    @property
    def layer_start(self) -> float:
        """What a layer pays once if it runs such experts here."""
        return self.start if self.launch == "layer" else 0.0


@dataclass
class Machine:
    """Model and system in SI units, and what section 2 makes of them.

    Home is where an expert lives and runs if nothing moves: N units, or the CPU as if it were the only unit.
    """

    L: int
    E: int
    W: np.ndarray  # bytes [L, E]
    flop_per_row: float
    dense_bytes: float
    dense_flop_per_row: float
    head_bytes: float
    kv_bytes: float
    activation_row_bytes: float
    sparse_starts: float  # that each expert adds to its own
    gpu: Device
    home: Device | None  # each of its N devices
    N: int
    home_is_cpu: bool
    home_bytes: float  # capacity of all of home
    cpu: Device | None  # where it takes part and is not home
    host_activations: bool  # a row goes to the host once, however many units want it
    overhead_s: float  # of each layer of each step
    linked: bool
    B_l: float
    t_l: float
    slots: int = 0

    def gpu_s(self, layer: int, e: int, n: int, resident: bool) -> float:
        """Seconds of one expert; a fetched one always starts itself."""
        start = (self.gpu.own_start if resident else self.gpu.start) + self.sparse_s(self.gpu)
        return self.gpu.work_s(self.flop_per_row * n, self.W[layer, e]) + start

    def home_s(self, layer: int, e: int, n: int, g: int) -> float:
        """Seconds on each of the g units that share the expert."""
        work_s = self.home.work_s(self.flop_per_row * n / g, self.W[layer, e] / g)
        return work_s + self.home.own_start + self.sparse_s(self.home)

    def cpu_s(self, layer: int, e: int, n: int) -> float:
        work_s = self.cpu.work_s(self.flop_per_row * n, self.W[layer, e])
        return work_s + self.cpu.own_start + self.sparse_s(self.cpu)

    def sparse_s(self, device: Device) -> float:
        """What the weights that are stored by themselves add to each expert, wherever it runs."""
        return self.sparse_starts * device.start

    def lone_start(self, device: Device) -> float:
        """All that an expert pays which starts itself."""
        return device.start + self.sparse_s(device)

    def fetch_s(self, layer: int, e: int) -> float:
        return self.W[layer, e] / self.B_l + self.t_l

    def dense_s(self, T: int, C: int) -> float:
        work = max(self.dense_bytes / self.gpu.B, self.dense_flop_per_row * T / self.gpu.F)
        return work + self.kv_bytes * C / self.gpu.B + self.gpu.start

    def head_s(self) -> float:
        return self.head_bytes / self.gpu.B + self.gpu.start

    @property
    def home_names(self) -> list[str]:
        return ["cpu"] if self.home_is_cpu else [f"ndp{u}" for u in range(self.N)]


def device_of(part: Any, flop: float, start_us: float) -> Device:
    """Read a part of the system; what it does not say is as in version 1."""
    return Device(
        F=flop * (getattr(part, "compute_efficiency", None) or 1.0),
        B=part.bandwidth_gb_s * 1e9 * (getattr(part, "memory_efficiency", None) or 1.0),
        start=start_us * 1e-6,
        launch=getattr(part, "launch", None) or "expert",
        roofline=getattr(part, "roofline", None) or "max",
    )


def cpu_takes_part(system: Any, dispatch: str) -> bool:
    """Version 1 knows no CPU, so what version 1 can replay has none; `dispatch` is "user" for a user's own."""
    if system.cpu is None or system.link is None or dispatch == "gpu":
        return False
    return system.ndp is None or dispatch in ("home", "cheapest")


def link_bytes_s(system: Any, dispatch: str) -> float:
    """B_l: if the experts live in host memory, the link is no faster than that is read."""
    link, cpu = system.link, system.cpu
    rate = link.bandwidth_gb_s * 1e9 * (getattr(link, "efficiency", None) or 1.0)
    asked = cpu is not None and dispatch == "gpu" and getattr(link, "host_read", False)
    if system.ndp is None and (asked or cpu_takes_part(system, dispatch)):
        rate = min(rate, cpu.bandwidth_gb_s * 1e9)
    return rate


def machine_of(trace: OracleTrace, model: Any, system: Any, slots: int | None, dispatch: str = "ndp") -> Machine:
    """Describe the machine as a policy of that dispatch sees it."""
    gpu, ndp, link = system.gpu, system.ndp, system.link
    units = device_of(ndp, 2 * ndp.gmac_s * 1e9, ndp.command_us) if ndp else None
    takes_part = cpu_takes_part(system, dispatch)
    cpu = device_of(system.cpu, system.cpu.tflops * 1e12, system.cpu.command_us) if takes_part else None
    host_gb = getattr(getattr(system, "host", None), "memory_gb", None)
    machine = Machine(
        L=model.moe_layers,
        E=most(model.experts),
        W=expert_bytes(trace, model),
        flop_per_row=2.0 * model.expert_matrices * expert_width(model) * model.expert_intermediate,
        dense_bytes=model.dense_params_per_layer * model.dense_weight_bits / 8,
        dense_flop_per_row=2.0 * model.dense_params_per_layer,
        head_bytes=model.once_params * model.dense_weight_bits / 8,
        kv_bytes=model.kv_bytes_per_token_layer,
        activation_row_bytes=expert_width(model) * model.activation_bytes,
        sparse_starts=sparse_starts(model),
        gpu=device_of(gpu, gpu.tflops * 1e12, gpu.launch_us),
        home=units or cpu,
        N=ndp.units if ndp else (1 if takes_part else 0),
        home_is_cpu=takes_part and ndp is None,
        home_bytes=ndp.units * ndp.capacity_gb * 1e9 if ndp else (math.inf if host_gb is None else host_gb * 1e9),
        cpu=cpu if ndp else None,
        host_activations=ndp is not None and getattr(ndp, "activations", "per-unit") == "host",
        overhead_s=(getattr(gpu, "layer_overhead_us", None) or 0.0) * 1e-6,
        linked=link is not None,
        B_l=link_bytes_s(system, dispatch) if link else math.nan,
        t_l=link.latency_us * 1e-6 if link else math.nan,
    )
    left = (gpu.memory_gb - gpu.reserve_gb) * 1e9 - machine.L * machine.dense_bytes - machine.head_bytes
    room = math.floor(left / machine.W.max()) if slots is None else slots
    everything = sum(model.experts) if isinstance(model.experts, list) else machine.L * machine.E
    machine.slots = min(max(room, 0), everything)
    return machine


# --- 3. One layer ----------------------------------------------------------------------------------------------------


@dataclass
class Share:
    """An expert that the GPU runs in part, last."""

    expert: int
    gpu: float  # share
    here: float  # share of its weights that the GPU holds


@dataclass
class TimeLine:
    """What happens in one layer after the router has spoken."""

    on_gpu: list[int]
    at_home: list[int]
    on_cpu: list[int]  # where the CPU is not home
    fetched: list[int]
    X: float  # bytes of activations to home; the same number comes back
    act: float
    X_cpu: float
    act_cpu: float
    gpu_busy: float
    busy: list[float]  # seconds of each device of home
    cpu_busy: float
    fetch_s: float
    T_gpu: float
    T_home: float
    T_cpu: float
    share: "Share | None" = None
    streamed: float = 0.0  # bytes that were fetched for it

    @property
    def run_whole(self) -> list[int]:
        """Who is shared in name only: the GPU runs all of it, and some of it was fetched."""
        return [self.share.expert] if self.share and self.share.gpu >= 1 and self.streamed else []

    @property
    def moe(self) -> float:
        return max(self.T_gpu, self.T_home, self.T_cpu)


def time_line(
    m: Machine, layer: int, n: dict[int, int], T: int, G: set[int], C: set[int], resident: set[int], units, share=None
) -> TimeLine:
    """Run the experts of G on the GPU, those of C on the CPU, the others at home, where units[e] share expert e."""
    only_gpu = share is not None and share.gpu >= 1
    G = G - {share.expert} if share else G
    on_gpu = [e for e in demand_order(n) if e in G]
    on_cpu = [e for e in demand_order(n) if e in C]
    at_home = [e for e in demand_order(n) if e not in G and e not in C and not (only_gpu and e == share.expert)]
    # 1. activations go out, and come back when the last unit is done
    sent_to = [sum(n[e] for e in at_home if u in units[e]) for u in range(m.N)]
    if m.host_activations:
        sent_to = [sum(n[e] for e in at_home)]
    X = m.activation_row_bytes * sum(min(T, rows) for rows in sent_to)
    act = X / m.B_l + m.t_l if at_home else 0.0
    # 2. the units
    busy = [0.0] * m.N
    for u in range(m.N):
        shards = [e for e in at_home if u in units[e]]
        if shards:
            whole = {e: m.home_s(layer, e, n[e], len(units[e])) for e in shards}
            if share and share.expert in whole:
                start_s = m.lone_start(m.home)
                whole[share.expert] = (1 - share.gpu) * (whole[share.expert] - start_s) + start_s
            seconds = math.fsum(whole.values())
            busy[u] = m.home.layer_start + seconds
    T_home = act + max(busy) + act if at_home else 0.0
    # and the CPU beside them
    X_cpu = m.activation_row_bytes * min(T, sum(n[e] for e in on_cpu))
    act_cpu = X_cpu / m.B_l + m.t_l if on_cpu else 0.0
    cpu_busy = m.cpu.layer_start + math.fsum(m.cpu_s(layer, e, n[e]) for e in on_cpu) if on_cpu else 0.0
    T_cpu = act_cpu + cpu_busy + act_cpu
    # 3. weights come in, one expert after another
    arrival: dict[int, float] = {}
    clock = 0.0
    for e in on_gpu:
        if e not in resident:
            clock += m.fetch_s(layer, e)
            arrival[e] = clock
    # 4. the GPU runs the resident ones, then the fetched ones as they arrive
    there = [e for e in on_gpu if e in resident]
    T_gpu = gpu_busy = m.gpu.layer_start if there else 0.0
    for e in there + list(arrival):
        seconds = m.gpu_s(layer, e, n[e], e in resident)
        T_gpu = max(T_gpu, arrival.get(e, 0.0)) + seconds
        gpu_busy += seconds
    streamed = 0.0
    if share:
        missing = max(share.gpu - share.here, 0.0)
        if missing:
            streamed = missing * m.W[layer, share.expert]
            clock += streamed / m.B_l + m.t_l
            T_gpu = max(T_gpu, clock)
        start_s = m.lone_start(m.gpu)
        work_s = m.gpu_s(layer, share.expert, n[share.expert], False) - start_s
        T_gpu += share.gpu * work_s + start_s
        gpu_busy += share.gpu * work_s + start_s
    fetched = list(arrival)
    return TimeLine(
        on_gpu,
        at_home,
        on_cpu,
        fetched,
        X,
        act,
        X_cpu,
        act_cpu,
        gpu_busy,
        busy,
        cpu_busy,
        clock,
        T_gpu,
        T_home,
        T_cpu,
        share,
        streamed,
    )


# --- 5. Placement ----------------------------------------------------------------------------------------------------


def place(policy: Any, m: Machine) -> list[list[list[int]]]:
    """Return units[layer][expert]: the NDP units that share the expert."""
    kind, _, g = policy.placement.partition(":")
    if m.N == 0:
        return [[[] for _ in range(m.E)] for _ in range(m.L)]
    if m.home_is_cpu:  # nothing to choose
        return [[[0] for _ in range(m.E)] for _ in range(m.L)]
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
