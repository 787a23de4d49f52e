"""What a replay yields."""

from dataclasses import dataclass, field

import numpy as np

COLUMNS = ("busy_s", "experts", "rows", "bytes")


@dataclass
class Step:
    """One step; lists are by layer."""

    start_s: float = 0.0
    duration_s: float = 0.0
    cold_s: float = 0.0
    wait_s: float = 0.0
    head_s: float = 0.0
    evict_s: float = 0.0
    prefetch_bytes: float = 0.0
    late: int = 0
    dense_s: list[float] = field(default_factory=list)  # overhead and evictions included
    moe_s: list[float] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    misses: list[int] = field(default_factory=list)
    demand_bytes: list[float] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)  # NaN where undefined
    plan: list[dict[int, int]] = field(default_factory=list)  # of each active expert: 0 home, 1 GPU, 2 CPU, 3 remote
    chunks: list[tuple[int, int]] = field(default_factory=list)  # of home and the CPU


@dataclass
class Figures:
    """A replay; bytes are payload, GB on the wire are bytes and resent bytes."""

    steps: list[Step] = field(default_factory=list)
    unit: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # busy_s experts rows bytes; of gpu, ndp0 .. link_in
    carrying_s: float = 0.0  # in which link in carries anything
    sending_s: float = 0.0  # in which link out does
    late: int = 0
    wasted: int = 0
    used: int = 0
    moved_bytes: float = 0.0
    moved_s: float = 0.0
    host_hits: int = 0
    host_misses: int = 0
    disk_bytes: float = 0.0
    disk_busy_s: float = 0.0
    gate_mass_lost: float = 0.0
    gate_mass_total: float = 0.0
    resent_in_bytes: float = 0.0
    resent_out_bytes: float = 0.0
    remote_s: float = 0.0
    remote_calls: int = 0
    optimal_fallbacks: int = 0
    work_bound_s: float = 0.0
    clairvoyant_s: float = 0.0
    regret_s: float = 0.0  # sum of moe - moe of optimal, where that is exhaustive, as decisions see both
    regret_base_s: float = 0.0  # sum of moe of optimal there
    decisions: int = 0  # of active experts there
    equal_decisions: int = 0

    def add(self, name: str, **amounts: float) -> None:
        row = self.unit.setdefault(name, dict.fromkeys(COLUMNS, 0.0))
        for column, amount in amounts.items():
            row[column] += amount

    def per_step(self, name: str) -> np.ndarray:
        """Return a figure of each step; sums over its layers where it is of layers."""
        values = [getattr(step, name) for step in self.steps]
        return np.array([sum(value) if isinstance(value, list) else value for value in values])

    @property
    def total_s(self) -> float:
        return float(np.sum(self.per_step("duration_s")))

    @property
    def hits(self) -> int:
        return int(self.per_step("hits").sum())

    @property
    def misses(self) -> int:
        return int(self.per_step("misses").sum())

    @property
    def demand_bytes(self) -> float:
        return float(self.per_step("demand_bytes").sum())

    @property
    def prefetch_bytes(self) -> float:
        return float(self.per_step("prefetch_bytes").sum())

    @property
    def gate_mass_dropped(self) -> float:
        return self.gate_mass_lost / self.gate_mass_total if self.gate_mass_total else 0.0

    @property
    def regret(self) -> float:
        return self.regret_s / self.regret_base_s if self.regret_base_s else 0.0
