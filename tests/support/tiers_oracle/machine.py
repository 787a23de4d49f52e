"""The machine and the policy in plain numbers: SI units, efficiencies applied, every mechanism off unless it is set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from support.oracle_layer import Device, Machine

Units = Sequence[int]  # that hold a part of an expert

__all__ = ["Device", "Disk", "Plain", "Remote", "Tiers", "Units"]


@dataclass
class Disk:
    """Where all experts are; host memory holds some."""

    B: float
    latency_s: float
    host_slots: int | None = None  # None: all experts fit
    host_residency: str = "lru"  # or any other that learns from the demands so far


@dataclass
class Remote:
    """Functions that run the experts of least demand."""

    F: float  # FLOP/s of one replica, all of its vCPUs
    B: float  # bytes/s of one replica
    network_bytes_s: float
    call_s: float = 0.0
    payload_bytes: float = math.inf
    start_s: float = 0.0
    load_bytes_s: float = math.inf


@dataclass
class Tiers(Machine):
    """Version 1's machine and what version 2 adds."""

    evict_s: float = 0.0
    stream: int = 1  # parts that a fetch arrives in; 0: no limit
    loss: float = 0.0
    mtu_bytes: float = 1460
    rto_s: float = 0.0
    relaxed: bool = False
    link_seed: int = 0
    rates: list[tuple[float, float]] | None = None  # (second, bytes/s), ascending
    home_chunks: int | str = 1
    cpu_chunks: int | str = 1
    B_h: float = math.inf  # all channels of the host
    B_x: float = math.inf  # what the outside reads from one unit
    move_bytes_s: float | None = None
    contention: bool = False
    disk: Disk | None = None
    remote: Remote | None = None

    def cap(self, units: Units) -> float:
        """Bytes/s at which the outside can read an expert that these units hold."""
        if self.home_is_cpu or not units:
            return math.inf
        return self.B_x if len(units) == 1 else self.B_h

    def cpu_cost_s(self, layer: int, e: int, n: float, units: Units) -> float:
        """Seconds of an expert on the CPU beside the units."""
        sparse_s, cpu = self.sparse_s(self.cpu), self.cpu
        cpu = Device(cpu.F, min(cpu.B, self.cap(units)), cpu.start, cpu.launch, cpu.roofline)
        return cpu.work_s(self.flop_per_row * n, self.W[layer, e]) + cpu.own_start + sparse_s

    @property
    def is_plain_link(self) -> bool:
        """Whether prefetches flow as in version 1."""
        return not self.loss and self.rates is None and self.B_h == self.B_x == math.inf


@dataclass
class Plain:
    """A policy; names and meanings are those of the specs."""

    placement: str = "ep"
    dispatch: str = "gpu"
    residency: str = "none"
    prefetch: str = "none"
    scope: str = "layer"
    budget: str | None = None
    half_life: int | None = None
    with_cpu: bool | None = None
    alpha: float = 0.3
    p: float = 1.0
    seed: int = 0
    loads: str | None = None
    plan: str | None = None
    static: str | None = None
    prefetch_blocks: bool = False
    gpu_rows: int | None = None
    gpu_layers: int | None = None
    gpu_layers_end: str | None = None
    most_count: float | None = None
    evicted_share: float | None = None
    margin: float | None = None
    ahead_layers: int | None = None
    follows: bool | None = None
    now_weight: float | None = None
    long_weight: float | None = None
    layout: dict[tuple[int, int], int | str] = field(default_factory=dict)  # of (layer, expert): unit or "striped"
    remote: float | None = None  # share of each layer's experts
    replicas: int = 1
    plan_steps: int = 32
    remote_loads: np.ndarray | None = None  # [L, E], instead of the first steps
