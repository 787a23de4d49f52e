"""Systems: GPU, NDP units, host link and CPU (timing model, section 1).

TOML fields carry their units in their names; the properties beside them are the same figures in SI, efficiency
included, as the replay uses them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from moetrace.spec.errors import UsageError
from moetrace.spec.frequency import by_frequency, level_misfits
from moetrace.spec.host_memory import Disk, disk_misfit
from moetrace.spec.known import Calibration, Known, how_known
from moetrace.spec.link_rates import read_rates
from moetrace.spec.load import Loaded, convert, read
from moetrace.spec.network import Cluster, Network
from moetrace.spec.rate_factors import read_factors
from moetrace.spec.rates import Energy, Price, misfits
from moetrace.spec.remote import Remote
from moetrace.spec.system_parts import Cpu, Gpu, Host, Link, Ndp

_OF_LOSS = ("mtu_bytes", "rto_ms", "loss_mode", "seed")  # fields of a link that say how packets are lost


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
        """The name of each of them."""
        return [f"{self.name}{number}" for number in range(self.count)] if self.is_numbered else [self.name]


class System(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine (docs/timing-model.md, section 1).

    Attributes:
        name: Name of the system.
        gpu: The GPU.
        ndp: The NDP tier. Without it the experts live in host memory.
        link: The host link. Without it everything is in the GPU's memory.
        cpu: The CPU. It runs experts where there are no NDP units.
        host: Host memory.
        energy: Power and energy of its parts. Without it a result says nothing of energy.
        price: Prices of its parts. Without it a result says nothing of price.
        disk: The disk below host memory. Without it host memory holds all experts.
        remote: Functions that may hold a part of the experts. A policy with `remote` uses them.
        cluster: How many GPUs there are. Without it there is one.
        network: The network between the GPUs of a cluster.
        known: Where the constants come from that were not calibrated; `assumed` if any of them is.
        calibration: Part (gpu, cpu, link, network, network_decode, network_prefill) -> how well its fitted constants
            predict.
    """

    name: str
    gpu: Gpu
    ndp: Ndp | None = None
    link: Link | None = None
    cpu: Cpu | None = None
    host: Host | None = None
    energy: Energy | None = None
    price: Price | None = None
    disk: Disk | None = None
    remote: Remote | None = None
    cluster: Cluster | None = None
    network: Network | None = None
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
        gpus = 1 if self.cluster is None else self.cluster.all_gpus
        sizes = {"gpu": (gpus, self.gpu.memory_gb), "cpu": (1, 0.0)}
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
        """The device that runs the dense layers, and experts that are resident or fetched."""
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
        """Names of all parts, in the order of every table: devices, directions of the link, the disk, functions.

        On a cluster these are the GPUs, then what serves one task at a time.
        """
        if self.cluster is not None:
            return [*self.cluster.names, *self.cluster.resources]
        devices = [self.accelerator, *([self.home] if self.ndp and self.home else [])]
        names = [name for device in devices for name in device.names]
        more = [name for name in ("disk", "remote") if getattr(self, name) is not None]
        return [*names, "cpu", "link_in", "link_out", *more]


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
        UsageError: A value is wrong, a key or preset is unknown, NDP units have no link, levels have no top, a part has
            watts or a price that the system lacks, the disk does not go with the rest, or nothing reads a field. The
            message names the TOML path.
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
    there = {name for name in ("gpu", "ndp", "cpu", "link", "disk") if getattr(system, name) is not None}
    if system.host is not None and system.host.memory_gb is not None:
        there.add("host")
    slots, chunks = system.host and system.host.slots, system.cpu and system.cpu.chunks
    if misfit := disk_misfit(system.disk, slots, there, chunks) or next(
        misfits(system.energy, system.price, there), None
    ):
        raise UsageError(f"{loaded.where}: {misfit}.")
    if unread := next(_unread_fields(system), None):
        raise UsageError(f"{loaded.where}: {unread}.")
    if system.link is not None:
        _check_link(system, system.link, loaded)
    return _with_levels(system, loaded.where)


def _unread_fields(system: System) -> Iterator[str]:
    """Yield a sentence, without its full stop, for each field that nothing reads on this machine.

    A switch that is off may stand anywhere, and so may what says how packets are lost beside `loss = 0`.
    """
    ndp, link, cpu, host = system.ndp, system.link, system.cpu, system.host
    can_read_outside = (ndp is not None and ndp.outside_gb_s) or (host is not None and host.channels_gb_s)
    loses, beside_loss = link is not None and link.loss is not None, "add link.loss"
    needs = (
        (host, "host.channels_gb_s", ndp, "needs experts that are spread over NDP units", "add [ndp]"),
        (
            ndp,
            "ndp.contention",
            can_read_outside,
            "needs reads of units' memory that take time",
            "add ndp.outside_gb_s or host.channels_gb_s",
        ),
        (
            link,
            "link.host_read",
            ndp is None,
            "needs experts in host memory, and with [ndp] they live in the units",
            "",
        ),
        (link, "link.host_read", cpu, "needs the bandwidth of the CPU's memory", "add [cpu]"),
        *((link, f"link.{name}", loses, "needs packets that are lost", beside_loss) for name in _OF_LOSS),
        (cpu, "cpu.chunks", link, "needs a link to the GPU", "add [link]"),
    )
    for part, field, is_read, why, remedy in needs:
        value = getattr(part, field.partition(".")[2], None)
        if value is not None and value is not False and not is_read:
            yield f"{field} {why}: " + (f"{remedy} or remove {field}" if remedy else f"remove {field}")


def _check_link(system: System, link: Link, loaded: Loaded) -> None:
    """Rows that may be lost only where rows travel; rates that are some."""
    if link.loss_mode == "relaxed" and system.home is None:
        raise UsageError(
            f'{loaded.where}: link.loss_mode = "relaxed" is for activations, and only weights travel without [ndp] or '
            '[cpu]: use loss_mode = "reliable".'
        )
    if link.rates is not None:
        read_rates(link.rates)


def _check_cluster(system: System, loaded: Loaded) -> None:
    """Refuse a cluster without a network or beside other parts, and GPUs that are not said in one of the two ways."""
    cluster, network = system.cluster, system.network
    if cluster is None and network is None:
        return
    if cluster is None or network is None:
        have, lack = ("network", "cluster") if cluster is None else ("cluster", "network")
        raise UsageError(f"{loaded.where}: {lack} is missing, and goes with [{have}]: add [{lack}] or remove [{have}].")
    for part in ("ndp", "link", "cpu", "host", "disk", "remote"):
        if getattr(system, part) is not None:
            raise UsageError(
                f"{loaded.where}: all experts are in the memory of the cluster's GPUs, so it takes no [{part}]; "
                "remove it."
            )
    if system.gpu.levels is not None:
        raise UsageError(f"{loaded.where}: GPUs of a cluster have no frequency levels yet; remove gpu.levels.")
    pair = cluster.attention, cluster.experts
    if (cluster.gpus is None) == (None in pair) or (cluster.gpus is not None and pair != (None, None)):
        raise UsageError(f"{loaded.where}: cluster wants gpus, or attention and experts, the numbers of its GPUs.")
    if cluster.gpus_per_node is not None and any(
        network.of_phase(phase)["node_bandwidth_gb_s"] is None for phase in ("prefill", "decode", "mixed")
    ):
        loaded.refuse("network.node_bandwidth_gb_s", "a number, which cluster.gpus_per_node needs")
    if cluster.rate_factors is not None:
        read_factors(cluster.rate_factors, cluster)


def _with_levels(system: System, where: str) -> System:
    """Return a system whose GPU has its levels by frequency, once they are checked."""
    levels = None if system.gpu.levels is None else by_frequency(system.gpu.levels)
    if misfit := next(level_misfits(levels, system.gpu.memory_scales), None):
        raise UsageError(f"{where}: {misfit}.")
    if levels == system.gpu.levels:
        return system
    return msgspec.structs.replace(system, gpu=msgspec.structs.replace(system.gpu, levels=levels))
