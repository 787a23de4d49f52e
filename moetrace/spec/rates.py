"""Power and cost of a machine: `[energy]` and `[price]` of a system (timing model, section 10)."""

from collections.abc import Container, Iterator, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

Rate = Annotated[float, Meta(ge=0, le=1e9)]

# For messages: what an empty table may hold, and what gives a system a part.
_EXAMPLES = {"energy": "[energy.gpu] or [energy.link]", "price": "price.usd_hour or [price.gpu]"}
_PARTS = {"host": "host.memory_gb"}


class Watts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Power of a device; for NDP units, of each of them.

    Attributes:
        idle_w: Watts while it waits.
        active_w: Watts while it works, at least `idle_w`.
    """

    idle_w: Rate
    active_w: Rate


class TransferEnergy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Energy of the link.

    Attributes:
        joule_per_gb: Joules for each GB that it carries, in either direction.
    """

    joule_per_gb: Rate


class Energy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Energy of a system, by part. A part that is not set is not in the account.

    Attributes:
        gpu: The GPU.
        ndp: Each NDP unit.
        cpu: The CPU.
        link: The host link.
        disk: The disk below host memory.
    """

    gpu: Watts | None = None
    ndp: Watts | None = None
    cpu: Watts | None = None
    link: TransferEnergy | None = None
    disk: Watts | None = None


class DevicePrice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Price of a device with a memory of its own; for NDP units, of each of them.

    Attributes:
        usd_hour: USD for each hour.
        usd_gb_hour: USD for each hour and GB of its memory, used or not.
    """

    usd_hour: Rate | None = None
    usd_gb_hour: Rate | None = None


class CpuPrice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Price of the CPU.

    Attributes:
        usd_hour: USD for each hour.
    """

    usd_hour: Rate


class HostPrice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Price of host memory.

    Attributes:
        usd_gb_hour: USD for each hour and GB of `host.memory_gb`, used or not.
    """

    usd_gb_hour: Rate


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Price of a system: the sum of all that is set.

    Attributes:
        usd_hour: USD for each hour of the machine as a whole, or of the parts without a price of their own.
        gpu: The GPU.
        ndp: Each NDP unit.
        cpu: The CPU.
        host: Host memory.
    """

    usd_hour: Rate | None = None
    gpu: DevicePrice | None = None
    ndp: DevicePrice | None = None
    cpu: CpuPrice | None = None
    host: HostPrice | None = None

    def usd_hour_by_part(self, sizes: Mapping[str, tuple[int, float]]) -> dict[str, float]:
        """Return USD an hour of each part that has a price: `ndp` is all units, `machine` all without an own price.

        `sizes` has how many there are of each part, and the GB of memory of one.
        """
        found = {}
        for part in ("gpu", "ndp", "cpu", "host"):
            rates = getattr(self, part)
            if rates is not None and part in sizes:
                count, memory_gb = sizes[part]
                of_time, of_memory = getattr(rates, "usd_hour", None), getattr(rates, "usd_gb_hour", None)
                found[part] = count * ((of_time or 0.0) + (of_memory or 0.0) * memory_gb)
        return found if self.usd_hour is None else found | {"machine": self.usd_hour}


def misfits(energy: Energy | None, price: Price | None, there: Container[str]) -> Iterator[str]:
    """Yield a sentence, without its full stop, for each rate that a system of the parts `there` cannot use."""
    for table, rates in (("energy", energy), ("price", price)):
        if rates is None:
            continue
        listed = [name for name in rates.__struct_fields__ if getattr(rates, name) is not None]
        if not listed:
            yield f"[{table}] is empty: set {_EXAMPLES[table]}, or remove it"
        for name in listed:
            if name != "usd_hour" and name not in there:
                key, part = f"[{table}.{name}]", _PARTS.get(name, f"[{name}]")
                yield f"{key} is set, but the system has no {part}: add {part} or remove {key}"
    for name in ("gpu", "ndp", "cpu", "disk"):
        watts: Watts | None = getattr(energy, name, None)
        if watts is not None and watts.active_w < watts.idle_w:
            yield f"energy.{name}.active_w wants at least idle_w = {watts.idle_w:g}, got {watts.active_w:g}"
        if getattr(price, name, None) == DevicePrice():
            yield f"[price.{name}] is empty: set usd_hour or usd_gb_hour, or remove it"
