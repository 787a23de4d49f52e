"""What comes out: figures of every step and of the whole replay."""

from dataclasses import dataclass, field


@dataclass
class Span:
    """A task as it ran: seconds from the start of the step's schedule (after its pause)."""

    stage: str  # A, S, A2E, E, E2A; K: what further kernels of a layer add (bulk)
    layer: int
    batch: int
    chunk: int  # 0 where a stage has no chunks
    start_s: float
    end_s: float


@dataclass
class StepFigures:
    """One step; imbalance is [layer], NaN where undefined."""

    phase: int
    rows: int
    start_s: float
    duration_s: float  # pause and head included
    pause_s: float
    head_s: float
    overhead_s: float
    exposed_s: float
    r1: int
    r2: int
    order: str
    stage_s: dict[str, float]  # A (without t_o), S, A2E, E, E2A, K: sums of the stages' own seconds
    dispatch_bytes: float
    combine_bytes: float
    node_bytes: float
    moved_bytes: float
    migrating: bool  # a plan is under way, so that the network is slower
    plan: int  # number of the plan in force, 0 = the first one
    imbalance_rows: list[float]
    imbalance_s: list[float]
    gpu_rows: list[list[int]]  # [layer][expert GPU]
    gpu_s: list[list[float]]  # [layer][expert GPU]: its own work, all chunks
    fan_out: float  # mean over (row, layer), NaN without any
    fan_out_gpus: int  # the sum of distinct GPUs behind it, and the number of (row, layer)
    fan_out_cells: int
    taxes: dict[str, float] | None  # launch, locality, barrier
    spans: list[Span]


@dataclass
class Figures:
    """A whole replay."""

    steps: list[StepFigures]
    total_s: float
    prefill_s: float
    decode_s: float
    mixed_s: float
    pause_s: float
    pauses: int
    plans: int
    overhead_s: float
    exposed_s: float
    busy_s: dict[str, float]  # of each GPU, its own sum
    resource_s: dict[str, float]  # of AG, A2E, EG, E2A; colocated of GPU, NET
    gpu_rows: dict[str, int]  # choices that each expert GPU ran
    gpu_slots: dict[str, int]  # slots that it ran, once for each chunk
    gpu_bytes: dict[str, float]  # weights that it read: slots, dense layers, head
    dispatch_bytes: float
    combine_bytes: float
    network_bytes: float
    node_bytes: float
    moved_bytes: float
    imbalance_rows: list[float]  # [layer]: mean over the steps in which it is defined
    imbalance_s: list[float]
    imbalance_rows_mean: float  # over all (step, layer)
    imbalance_s_mean: float
    fan_out: float
    taxes: dict[str, float] | None
    chosen: dict[int, tuple[int, int, str, str]] = field(default_factory=dict)  # phase -> r1, r2, order
