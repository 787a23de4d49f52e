"""What it runs on: GPU, NDP units, host link and CPU (timing model, section 1).

TOML fields carry their units in their names; the properties beside them are the same figures in SI, efficiency
included, as the replay uses them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from moetrace.spec.errors import UsageError
from moetrace.spec.known import Calibration, Known, how_known
from moetrace.spec.load import Loaded, convert, read
from moetrace.spec.network import Cluster, Network


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
    """

    bandwidth_gb_s: Positive
    latency_us: NotNegative
    efficiency: Efficiency | None = None
    host_read: bool | None = None

    @property
    def bytes_s(self) -> float:
        """Bytes per second that it reaches in one direction: B_l."""
        return self.bandwidth_gb_s * 1e9 * (self.efficiency or 1.0)

    @property
    def latency_s(self) -> float:
        """Seconds that each transfer adds: t_l."""
        return self.latency_us / 1e6


class Cpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The CPU, which runs experts out of host memory where there are no NDP units.

    Attributes:
        tflops: Peak of its arithmetic, 1e12 FLOP a second.
        bandwidth_gb_s: Peak of its memory's bandwidth, GB a second.
        command_us: Microseconds that each expert adds, as for the hand-off from the GPU and back.
        compute_efficiency: Share of `tflops` that it reaches. By default 1.
        memory_efficiency: Share of `bandwidth_gb_s` that it reaches. By default 1.
        launch: Whether each expert adds `command_us` (`expert`, the default), or all experts of a layer add it once
            (`layer`).
        roofline: Whether arithmetic and reading overlap (`max`, the default) or follow each other (`sum`).
    """

    tflops: Positive
    bandwidth_gb_s: Positive
    command_us: NotNegative
    compute_efficiency: Efficiency | None = None
    memory_efficiency: Efficiency | None = None
    launch: Launch | None = None
    roofline: Roofline | None = None

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
    """

    memory_gb: Positive | None = None


class System(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine (docs/timing-model.md, section 1).

    Attributes:
        name: Name of the system.
        gpu: The GPU.
        ndp: The NDP tier. Without it the experts live in host memory.
        link: The host link. Without it everything is in the GPU's memory.
        cpu: The CPU. It runs experts where there are no NDP units.
        host: Host memory.
        cluster: How many GPUs there are. Without it there is one.
        network: The network between the GPUs of a cluster.
        energy: Numbers that version 1 carries along and does not use.
        price: Numbers that version 1 carries along and does not use.
        known: Where the constants come from that were not calibrated; `assumed` if any of them is.
        calibration: Part (gpu, cpu, link) -> how well its fitted constants predict.
    """

    name: str
    gpu: Gpu
    ndp: Ndp | None = None
    link: Link | None = None
    cpu: Cpu | None = None
    host: Host | None = None
    cluster: Cluster | None = None
    network: Network | None = None
    energy: dict[str, NotNegative] | None = None
    price: dict[str, NotNegative] | None = None
    known: Known | None = None
    calibration: dict[str, Calibration] | None = None

    @property
    def how_known(self) -> str | None:
        """How well the constants are known, in a few words; None if the system does not say."""
        return how_known(self.known, self.calibration)

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
    def devices(self) -> list[Device]:
        """All that computes: the GPU, the units, the CPU."""
        home, cpu = self.home, self.cpu
        beside = [_device("cpu", 1, cpu, cpu.command_s)] if self.ndp is not None and cpu is not None else []
        return [self.accelerator, *([home] if home else []), *beside]

    @property
    def part_names(self) -> list[str]:
        """Names of all parts, in the order of every table: devices, then the directions of the link.

        On a cluster these are the GPUs, then what serves one task at a time.
        """
        if self.cluster is not None:
            return [*self.cluster.names, *self.cluster.resources]
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
        UsageError: A value is wrong, a key or preset is unknown, or NDP units have no link. The message names the TOML
            path.
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
    _check_cluster(system, loaded)
    return system


def _check_cluster(system: System, loaded: Loaded) -> None:
    """Refuse a cluster without a network or beside other parts, and GPUs that are not said in one of the two ways."""
    cluster, network = system.cluster, system.network
    if cluster is None and network is None:
        return
    if cluster is None or network is None:
        have, lack = ("network", "cluster") if cluster is None else ("cluster", "network")
        raise UsageError(f"{loaded.where}: {lack} is missing, and goes with [{have}]: add [{lack}] or remove [{have}].")
    for part in ("ndp", "link", "cpu", "host"):
        if getattr(system, part) is not None:
            raise UsageError(
                f"{loaded.where}: all experts are in the memory of the cluster's GPUs, so it takes no [{part}]; "
                "remove it."
            )
    pair = cluster.attention, cluster.experts
    if (cluster.gpus is None) == (None in pair) or (cluster.gpus is not None and pair != (None, None)):
        raise UsageError(f"{loaded.where}: cluster wants gpus, or attention and experts, the numbers of its GPUs.")
    if cluster.gpus_per_node is not None and any(
        network.of_phase(phase)["node_bandwidth_gb_s"] is None for phase in ("prefill", "decode", "mixed")
    ):
        loaded.refuse("network.node_bandwidth_gb_s", "a number, which cluster.gpus_per_node needs")
