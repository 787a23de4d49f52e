"""What it runs on: GPU, NDP units, host link and CPU (timing model, section 1).

TOML fields carry their units in their names; the properties beside them are the same figures in SI, efficiency
included, as the replay uses them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from moetrace.spec.errors import UsageError
from moetrace.spec.frequency import Level, by_frequency, level_misfits
from moetrace.spec.known import Calibration, Known, how_known
from moetrace.spec.load import convert, read
from moetrace.spec.rates import Energy, Price, misfits


@dataclass(frozen=True)
class Device:
    """A class of ``count`` equal devices, in SI units, efficiency included: what a replay knows of them."""

    name: str  # of a device; of several, with a number behind it
    count: int
    flop_s: float
    bytes_s: float  # of the memory that it reads experts from
    start_s: float  # of one launch
    is_numbered: bool = False
    is_serial: bool = False  # arithmetic and reading do not overlap
    starts_once: bool = False  # a layer, for all experts that need not be fetched; else each expert starts itself

    @property
    def names(self) -> list[str]:
        """What each of them is called."""
        return [f"{self.name}{number}" for number in range(self.count)] if self.is_numbered else [self.name]


# Wide enough for any machine, and so narrow that no product or quotient of a replay leaves the finite numbers.
Positive = Annotated[float, Meta(ge=1e-9, le=1e9)]  # rates and sizes
NotNegative = Annotated[float, Meta(ge=0, le=1e9)]
Efficiency = Annotated[float, Meta(ge=1e-6, le=1)]
Roofline = Literal["max", "sum"]
Launch = Literal["expert", "layer"]
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
        outside_gb_s: What the GPU or a CPU can read of one unit's memory, GB a second. By default as fast as they can.
        contention: Whether such reads keep the unit busy. By default they do not.
        move_gb_s: What moves between units in other layouts, GB a second; only prefetch `relayout` does that.
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
    """

    bandwidth_gb_s: Positive
    latency_us: NotNegative
    efficiency: Efficiency | None = None
    host_read: bool | None = None
    stream: Annotated[int, Meta(ge=0, le=65535)] | None = None

    @property
    def bytes_s(self) -> float:
        """Bytes per second that it reaches in one direction: B_l."""
        return self.bandwidth_gb_s * 1e9 * (self.efficiency or 1.0)

    @property
    def latency_s(self) -> float:
        """Seconds that each transfer adds: t_l."""
        return self.latency_us / 1e6


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
        memory_gb: Memory for experts, GB. Without it there is no limit.
        channels_gb_s: What the GPU or a CPU can read of an expert that is spread over all NDP units, GB a second. By
            default as fast as they can.
    """

    memory_gb: Positive | None = None
    channels_gb_s: Positive | None = None


class System(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine (docs/timing-model.md, section 1).

    Attributes:
        name: Name of the system.
        gpu: The GPU.
        ndp: The NDP tier. Without it the experts live in host memory.
        link: The host link. Without it everything is in the GPU's memory.
        cpu: The CPU. It runs experts where there are no NDP units.
        host: Host memory.
        energy: What its parts draw. Without it a result says nothing of energy.
        price: What its parts cost. Without it a result says nothing of price.
        known: Where the constants come from that were not calibrated; `assumed` if any of them is.
        calibration: Part (gpu, cpu, link) -> how well its fitted constants predict.
    """

    name: str
    gpu: Gpu
    ndp: Ndp | None = None
    link: Link | None = None
    cpu: Cpu | None = None
    host: Host | None = None
    energy: Energy | None = None
    price: Price | None = None
    known: Known | None = None
    calibration: dict[str, Calibration] | None = None

    @property
    def how_known(self) -> str | None:
        """How well the constants are known, in a few words; None if the system does not say."""
        return how_known(self.known, self.calibration)

    @property
    def usd_hour_by_part(self) -> dict[str, float]:
        """USD an hour of each part that has a price; see `Price.usd_hour_by_part`."""
        if self.price is None:
            return {}
        sizes = {"gpu": (1, self.gpu.memory_gb), "cpu": (1, 0.0)}
        if self.ndp is not None:
            sizes["ndp"] = (self.ndp.units, self.ndp.capacity_gb)
        if self.host is not None:
            sizes["host"] = (1, self.host.memory_gb or 0.0)
        return self.price.usd_hour_by_part(sizes)

    @property
    def usd_hour(self) -> float | None:
        """USD an hour of the whole machine; None without a `[price]`."""
        return None if self.price is None else math.fsum(self.usd_hour_by_part.values())

    @property
    def units(self) -> int:
        """Number of NDP units: N, 0 without an NDP tier."""
        return 0 if self.ndp is None else self.ndp.units

    @property
    def accelerator(self) -> Device:
        """What runs the dense layers, and experts that are resident or fetched."""
        gpu = self.gpu
        return _device("gpu", 1, gpu, gpu.launch_s)

    @property
    def home(self) -> Device | None:
        """Where experts live and run if nothing moves: the NDP units, else the CPU at the other end of the link."""
        ndp, cpu = self.ndp, self.cpu
        if ndp is not None:
            return _device("ndp", ndp.units, ndp, ndp.command_s, is_numbered=True)
        return _device("cpu", 1, cpu, cpu.command_s) if cpu is not None and self.link is not None else None

    @property
    def beside(self) -> Device | None:
        """The CPU beside NDP units."""
        cpu = self.cpu
        return _device("cpu", 1, cpu, cpu.command_s) if self.ndp is not None and cpu is not None else None

    @property
    def devices(self) -> list[Device]:
        """All that computes: the GPU, the units, the CPU."""
        return [one for one in (self.accelerator, self.home, self.beside) if one is not None]

    @property
    def part_names(self) -> list[str]:
        """Names of all parts, in the order of every table: devices, then the directions of the link."""
        devices = [self.accelerator, *([self.home] if self.ndp and self.home else [])]
        return [*(name for device in devices for name in device.names), "cpu", "link_in", "link_out"]


def _device(name: str, count: int, part: Gpu | Ndp | Cpu, start_s: float, is_numbered: bool = False) -> Device:
    is_serial, starts_once = part.roofline == "sum", part.launch == "layer"
    return Device(name, count, part.flop_s, part.bytes_s, start_s, is_numbered, is_serial, starts_once)


def load_system(source: str | Path | System, overrides: Mapping[str, object] | None = None) -> System:
    """Load a system and check it.

    Args:
        source: A preset's name, a TOML file or an instance.
        overrides: New values of single fields, by dotted path. By default none.

    Returns:
        The system.

    Raises:
        UsageError: A value is wrong, a key or preset is unknown, NDP units have no link, levels have no top, or a part
            has watts or a price that the system lacks. The message names the TOML path.
        MoetraceError: A file cannot be read.

    Examples:
        >>> import moetrace as mt
        >>> mt.load_system("edge-ndp", {"ndp.units": 4}).units
        4
    """
    loaded = read("systems", source, overrides or {})
    system = convert(loaded, System)
    if system.gpu.reserve_gb > system.gpu.memory_gb:
        loaded.refuse("gpu.reserve_gb", f"at most gpu.memory_gb = {system.gpu.memory_gb:g}")
    if system.ndp is not None and system.link is None:
        raise UsageError(f"{loaded.where}: link is missing, and NDP units need one: add [link] or remove [ndp].")
    there = {name for name in ("gpu", "ndp", "cpu", "link") if getattr(system, name) is not None}
    if system.host is not None and system.host.memory_gb is not None:
        there.add("host")
    if misfit := next(misfits(system.energy, system.price, there), None):
        raise UsageError(f"{loaded.where}: {misfit}.")
    return _with_levels(system, loaded.where)


def _with_levels(system: System, where: str) -> System:
    """Return a system whose GPU has its levels by frequency, once they are checked."""
    levels = None if system.gpu.levels is None else by_frequency(system.gpu.levels)
    if misfit := next(level_misfits(levels, system.gpu.memory_scales), None):
        raise UsageError(f"{where}: {misfit}.")
    if levels == system.gpu.levels:
        return system
    return msgspec.structs.replace(system, gpu=msgspec.structs.replace(system.gpu, levels=levels))
