"""The parts of a machine as a TOML describes them: GPU, NDP units, link, CPU and host memory."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from moetrace.spec.frequency import Level

# Wide enough for any machine, and so narrow that no product or quotient of a replay leaves the finite numbers.
Positive = Annotated[float, Meta(ge=1e-9, le=1e9)]  # rates and sizes
NotNegative = Annotated[float, Meta(ge=0, le=1e9)]
Efficiency = Annotated[float, Meta(ge=1e-6, le=1)]
Roofline = Literal["max", "sum"]
Launch = Literal["expert", "layer"]
DEFAULT_MTU_BYTES = 1460  # of a TCP segment on Ethernet
Parts = Annotated[int, Meta(ge=1, le=65535)] | Literal["auto"]


# A field that a later version added is None where nobody sets it: `canonical` then says nothing of it, so that a
# baseline from before compares as the same (`moetrace.batch.identity`). Its meaning says what holds then.


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The GPU.

    Attributes:
        name: Name of the GPU.
        tflops: Peak of its arithmetic, 1e12 FLOP a second.
        bandwidth_gb_s: Peak of its memory's bandwidth, GB a second.
        memory_gb: Size of its memory, GB.
        reserve_gb: Part of it for KV cache, activations and context, GB.
        compute_efficiency: Share of `tflops` that it reaches.
        memory_efficiency: Share of `bandwidth_gb_s` that it reaches.
        launch_us: Microseconds that each launch adds.
        launch: Whether each expert is a launch (`expert`, the default), or one launch runs all residents of a layer
            (`layer`).
        roofline: Whether arithmetic and reading overlap (`max`, the default) or follow each other (`sum`).
        layer_overhead_us: Microseconds of the host's work for each layer and step, in which nothing computes, as of
            Python. By default 0. The hand-off to a CPU is `cpu.command_us`.
        evict_us: Microseconds that each admission adds which evicts another expert, as for pages that are unmapped and
            mapped again. By default 0.
        levels: The frequency levels that a policy with `deadline_ms` chooses from, the top first. By default the top
            only.
        memory_scales: Whether the memory's bandwidth goes with the frequency of a level. By default it does not.
    """

    name: str
    tflops: Positive
    bandwidth_gb_s: Positive
    memory_gb: Positive
    reserve_gb: NotNegative
    compute_efficiency: Efficiency = 1.0
    memory_efficiency: Efficiency = 1.0
    launch_us: NotNegative
    launch: Launch | None = None
    roofline: Roofline | None = None
    layer_overhead_us: NotNegative | None = None
    evict_us: NotNegative | None = None
    levels: list[Level] | None = None
    memory_scales: bool | None = None

    @property
    def flop_s(self) -> float:
        """FLOP per second that it reaches: F_g."""
        return self.tflops * 1e12 * self.compute_efficiency

    @property
    def bytes_s(self) -> float:
        """Bytes per second that it reads from its memory: B_g."""
        return self.bandwidth_gb_s * 1e9 * self.memory_efficiency

    @property
    def launch_s(self) -> float:
        """Seconds that each launch adds: t_g."""
        return self.launch_us / 1e6

    @property
    def layer_overhead_s(self) -> float:
        """Seconds of the host's work for each layer and step: t_o."""
        return (self.layer_overhead_us or 0.0) / 1e6


class Ndp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The NDP tier of equal units.

    Attributes:
        units: Number of units, N.
        gmac_s: Arithmetic of one unit, 1e9 MAC a second; a MAC is two FLOP.
        bandwidth_gb_s: Bandwidth inside one unit, GB a second.
        capacity_gb: Memory of one unit, GB.
        command_us: Microseconds that each command to a unit adds.
        compute_efficiency: Share of `gmac_s` that a unit reaches. By default 1.
        memory_efficiency: Share of `bandwidth_gb_s` that a unit reaches. By default 1.
        launch: Whether each expert is a command (`expert`, the default), or one command starts a unit's experts of a
            layer (`layer`).
        roofline: Whether arithmetic and reading overlap (`max`, the default) or follow each other (`sum`).
        chunks: Equal parts in which rows go out, are worked on and come back, so that a part travels while another one
            computes; `auto` takes the best number, a power of two up to 64. By default 1.
        activations: Whether a row goes to each unit that needs it (`per-unit`, the default), or to the units once
            (`host`).
        outside_gb_s: Rate at which the GPU or a CPU can read one unit's memory, GB a second. By default as fast as they
            can.
        contention: Whether such reads keep the unit busy. By default they do not.
        move_gb_s: Rate of moves between units in other layouts, GB a second; only prefetch `relayout` does that.
    """

    units: Annotated[int, Meta(ge=1, le=65535)]
    gmac_s: Positive
    bandwidth_gb_s: Positive
    capacity_gb: Positive
    command_us: NotNegative
    compute_efficiency: Efficiency | None = None
    memory_efficiency: Efficiency | None = None
    launch: Launch | None = None
    roofline: Roofline | None = None
    chunks: Parts | None = None
    activations: Literal["per-unit", "host"] | None = None
    outside_gb_s: Positive | None = None
    contention: bool | None = None
    move_gb_s: Positive | None = None

    @property
    def flop_s(self) -> float:
        """FLOP per second that one unit reaches, two for each MAC: F_n."""
        return 2 * self.gmac_s * 1e9 * (self.compute_efficiency or 1.0)

    @property
    def bytes_s(self) -> float:
        """Bytes per second that one unit reads from its memory: B_n."""
        return self.bandwidth_gb_s * 1e9 * (self.memory_efficiency or 1.0)

    @property
    def command_s(self) -> float:
        """Seconds that each command to a unit adds: t_n."""
        return self.command_us / 1e6


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The host link, full duplex.

    Attributes:
        bandwidth_gb_s: Bandwidth in one direction, GB a second.
        latency_us: Microseconds that each transfer adds.
        efficiency: Share of `bandwidth_gb_s` that it reaches. By default 1.
        host_read: Whether the CPU's memory bandwidth also limits fetches of dispatch `gpu`. By default it does not.
        stream: Equal parts in which a fetched expert arrives, each computed once it is there; 0 stands for no limit.
            By default 1: it runs when all of it is there.
        loss: Probability that a packet is lost. By default 0. At most 0.99: beyond that a link carries almost nothing.
        mtu_bytes: Bytes of a packet, where packets are lost. By default 1460. At least 64: each may be a draw.
        rto_ms: Milliseconds until lost packets are sent again. By default 0.
        loss_mode: Whether lost packets of activations are sent again (`reliable`, the default), or not (`relaxed`):
            then their rows lose what they are about. Weights are always sent again.
        seed: Seed of the draws of lost packets. By default 0.
        rates: Path of a CSV file with lines of `seconds,gb_s`: from which second of the replay on the link has which
            bandwidth, in the place of `bandwidth_gb_s`. By default that is constant.
    """

    bandwidth_gb_s: Positive
    latency_us: NotNegative
    efficiency: Efficiency | None = None
    host_read: bool | None = None
    stream: Annotated[int, Meta(ge=0, le=65535)] | None = None
    loss: Annotated[float, Meta(ge=0, le=0.99)] | None = None
    mtu_bytes: Annotated[int, Meta(ge=64, le=1 << 30)] | None = None
    rto_ms: NotNegative | None = None
    loss_mode: Literal["reliable", "relaxed"] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    rates: str | None = None

    @property
    def bytes_s(self) -> float:
        """Bytes per second that it reaches in one direction: B_l."""
        return self.bandwidth_gb_s * 1e9 * (self.efficiency or 1.0)

    @property
    def latency_s(self) -> float:
        """Seconds that each transfer adds: t_l."""
        return self.latency_us / 1e6

    @property
    def packet_bytes(self) -> int:
        """Bytes of a packet."""
        return self.mtu_bytes or DEFAULT_MTU_BYTES

    @property
    def rto_s(self) -> float:
        """Seconds until lost packets are sent again."""
        return (self.rto_ms or 0.0) / 1e3

    @property
    def loses_rows(self) -> bool:
        """Whether lost packets of activations stay lost."""
        return bool(self.loss) and self.loss_mode == "relaxed"


class Cpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The CPU, which runs experts out of host memory where there are no NDP units, or beside them if a dispatch asks.

    Attributes:
        tflops: Peak of its arithmetic, 1e12 FLOP a second.
        bandwidth_gb_s: Peak of its memory's bandwidth, GB a second.
        command_us: Microseconds that each expert adds, as for the hand-off from the GPU and back.
        compute_efficiency: Share of `tflops` that it reaches. By default 1.
        memory_efficiency: Share of `bandwidth_gb_s` that it reaches. By default 1.
        launch: Whether each expert adds `command_us` (`expert`, the default), or all experts of a layer add it once
            (`layer`).
        roofline: Whether arithmetic and reading overlap (`max`, the default) or follow each other (`sum`).
        chunks: As of `ndp`, for the exchange with the CPU.
    """

    tflops: Positive
    bandwidth_gb_s: Positive
    command_us: NotNegative
    compute_efficiency: Efficiency | None = None
    memory_efficiency: Efficiency | None = None
    launch: Launch | None = None
    roofline: Roofline | None = None
    chunks: Parts | None = None

    @property
    def flop_s(self) -> float:
        """FLOP per second that it reaches: F_c."""
        return self.tflops * 1e12 * (self.compute_efficiency or 1.0)

    @property
    def bytes_s(self) -> float:
        """Bytes per second that it reads from host memory: B_c."""
        return self.bandwidth_gb_s * 1e9 * (self.memory_efficiency or 1.0)

    @property
    def command_s(self) -> float:
        """Seconds that each expert adds: t_c."""
        return self.command_us / 1e6


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Host memory, where experts live if there are no NDP units.

    Attributes:
        memory_gb: Memory for experts, GB. Without it there is no limit. With a `[disk]` host memory holds the experts
            that it has room for, counted in the largest, and others are read when they are demanded.
        slots: With a `[disk]`, how many experts host memory holds, instead of `memory_gb`.
        channels_gb_s: Rate at which the GPU or a CPU can read an expert that is spread over all NDP units, GB a second.
            By default as fast as they can.
    """

    memory_gb: Positive | None = None
    slots: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    channels_gb_s: Positive | None = None
