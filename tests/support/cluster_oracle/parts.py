"""What goes in: rows, machine, policy and plans, as plain numbers in SI units."""

from collections.abc import Callable
from dataclasses import dataclass, field

PREFILL, DECODE, MIXED = 0, 1, 2

Plan = list[list[list[int]]]  # plan[layer][GPU][slot]: the expert in the slot, -1 = empty


def less(a: float, b: float) -> bool:
    """`a < b` on times: by more than the rounding of a sum."""
    return a < b * (1 - 1e-12)


@dataclass
class Row:
    """A token row: its request, position and phase, and the experts that it chose in each layer (absent: fewer)."""

    request: int
    position: int
    phase: int
    choices: list[list[int]]


@dataclass
class Step:
    """The rows of a forward pass, in order."""

    rows: list[Row]

    @property
    def phase(self) -> int:
        phases = {row.phase for row in self.rows}
        return phases.pop() if len(phases) == 1 else MIXED


@dataclass
class Network:
    """The constants of one phase."""

    B_net: float  # bytes/s of a GPU in one direction
    dispatch_s: float
    combine_s: float
    row_s: float = 0.0
    dispatch_bits: float = 16.0
    combine_bits: float = 16.0
    dedup: bool = True
    B_node: float = 0.0  # bytes/s of a node in one direction
    node_s: float = 0.0


@dataclass
class Machine:
    """A model on a cluster of GPUs."""

    L: int
    experts: list[int]  # of each layer
    W: list[list[float]]  # bytes of an expert, [layer][expert]
    flop_per_row: float  # of one row in one expert
    width: int  # of a row on its way to experts
    activation_bytes: float
    dense_params: float  # a layer, shared experts included
    shared_params: float
    dense_bits: float
    head_bytes: float
    kv_bytes: float
    F: float
    B: float
    t_g: float
    overhead_s: float
    launch: str  # "expert" or "layer"
    roofline: str  # "max" or "sum"
    attention: int  # GPUs that run attention: all of them if colocated
    expert_gpus: int
    colocated: bool
    network: list[Network]  # of prefill, decode and mixed steps
    gpus_per_node: int = 0  # 0 = one tier
    factors: list[float] = field(default_factory=list)  # of F and B, attention GPUs first; none: 1 each

    def __post_init__(self) -> None:
        if self.colocated and self.attention != self.expert_gpus:
            raise ValueError("on a colocated cluster the same GPUs do both")

    def attention_factor(self, gpu: int) -> float:
        return self.factors[gpu] if self.factors else 1.0

    def expert_factor(self, gpu: int) -> float:
        return self.factors[gpu if self.colocated else self.attention + gpu] if self.factors else 1.0

    def work_s(self, gpu: int, layer: int, expert: int, rows: int) -> float:
        """Seconds of one slot on an expert GPU without a start."""
        F, B = self.F * self.expert_factor(gpu), self.B * self.expert_factor(gpu)
        compute_s, memory_s = self.flop_per_row * rows / F, self.W[layer][expert] / B
        return compute_s + memory_s if self.roofline == "sum" else max(compute_s, memory_s)

    def own_head_s(self, gpu: int) -> float:
        """Seconds of an attention GPU."""
        return self.head_bytes / (self.B * self.attention_factor(gpu)) + self.t_g

    def head_s(self) -> float:
        return max(self.own_head_s(gpu) for gpu in range(self.attention))

    @property
    def crossing(self) -> float:
        """Share of what is sent that passes a wire: colocated, one row in M is where it wants to be."""
        return 1 - 1 / self.expert_gpus if self.colocated else 1.0

    @property
    def attention_names(self) -> list[str]:
        return [f"gpu{g}" if self.colocated else f"attention{g}" for g in range(self.attention)]

    @property
    def expert_names(self) -> list[str]:
        return [f"gpu{g}" if self.colocated else f"experts{g}" for g in range(self.expert_gpus)]


@dataclass
class Policy:
    """How a cluster is run; the plans themselves are `Plans`."""

    copies: str = "even"  # even, row, random, nearest
    seed: int = 0
    schedule: str = "serial"  # serial, pipeline:r1,r2, pipeline:auto
    order: str = "asas"  # or aass
    shared: str = "with-attention"  # or apart; auto goes with pipeline:auto
    execution: str = "bulk"  # or fused
    kernels_per_layer: int = 1
    window: int = 0  # steps that plans are made from; 0 with a placement that is not made from loads
    interval: int = 0
    migrate: str = "pause"  # or async
    migrate_share: float = 0.1
    plan_steps: int = 32

    def __post_init__(self) -> None:
        if self.schedule != "serial" and (self.execution == "fused" or self.kernels_per_layer > 1):
            raise ValueError("fused and kernels_per_layer go with serial only")


@dataclass
class Plans:
    """The plan of step 0, and what makes others from loads[layer][expert] (None: the first one stays)."""

    first: Plan
    make: Callable[[list[list[int]]], Plan] | None = None


@dataclass
class Chunk:
    """Rows `first` to `last` (excluded) of a step."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


@dataclass
class MicroBatch(Chunk):
    """Rows of a step that go through a layer together, in chunks."""

    chunks: list[Chunk] = field(default_factory=list)
