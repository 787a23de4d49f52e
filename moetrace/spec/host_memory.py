"""A disk below host memory: `[disk]` of a system, and what it goes with (timing model, section 11)."""

from typing import Annotated

import msgspec
from msgspec import Meta

from moetrace.spec.choices import Residency, choices_of, find, source_of

HOST_RESIDENCY = "lru"  # where a policy does not say


class Disk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The disk that holds all experts, where host memory holds a part of them.

    Attributes:
        bandwidth_gb_s: Bandwidth of its reads, GB a second.
        latency_us: Microseconds that each read adds.
        efficiency: Share of `bandwidth_gb_s` that it reaches. By default 1.
    """

    bandwidth_gb_s: Annotated[float, Meta(ge=1e-9, le=1e9)]
    latency_us: Annotated[float, Meta(ge=0, le=1e9)]
    efficiency: Annotated[float, Meta(ge=1e-6, le=1)] | None = None

    @property
    def bytes_s(self) -> float:
        """Bytes per second that it reaches: B_d."""
        return self.bandwidth_gb_s * 1e9 * (self.efficiency or 1.0)

    @property
    def latency_s(self) -> float:
        """Seconds that each read adds: t_d."""
        return self.latency_us / 1e6


def disk_misfit(disk: Disk | None, slots: int | None, there: set[str], chunks: int | str | None) -> str | None:
    """Say in one sentence, without its end, what of a system does not go with its disk, or with none; None if all does.

    Args:
        disk: The system's.
        slots: `host.slots`.
        there: Parts that the system has.
        chunks: `cpu.chunks`.
    """
    if disk is None:
        return None if slots is None else "host.slots applies to systems with a [disk] only; remove it or add [disk]"
    if "ndp" in there:
        return "[disk] lies below host memory, but with [ndp] the experts live in the units; remove one of them"
    if "link" not in there:
        return (
            "[disk] needs a [link] from host memory to the GPU; where they are one memory, as in a phone or a Mac, "
            "describe the disk as [link] and remove [disk], as presets phone-ufs and mac-m4-max do"
        )
    if chunks not in (None, 1):
        return "cpu.chunks does not go with [disk], as experts start when they have been read; remove one of them"
    return None


def host_residencies() -> tuple[str, ...]:
    """Return the residencies that host memory may have: built-in ones that learn from the demands so far."""
    return tuple(name for name, record in choices_of("residency").items() if _goes_with_host(record))


def _goes_with_host(record: Residency) -> bool:
    looks_beyond = record.next_steps or record.begin or record.counts_prompts or record.foresees
    is_built_in = source_of("residency", record.name) is None
    return record.admits and is_built_in and not looks_beyond and not record.instead


def host_residency_of(name: str | None) -> Residency:
    """Return the record of the residency of host memory, which a policy may leave unsaid."""
    return find("residency", name or HOST_RESIDENCY)


def policy_misfit(host_residency: str | None, dispatch: str, disk: Disk | None, system: str) -> str | None:
    """Say in one sentence, without its end, what of a policy does not go with a disk or with none; None if all does.

    `system` is its name.
    """
    if disk is None:
        if host_residency is None:
            return None
        return f"host_residency applies to systems with a [disk] only, and system {system} has no [disk]; remove it"
    record = find("dispatch", dispatch)
    if record is not None and record.splits:
        return (
            f"dispatch {dispatch} shares experts that are in host memory, and system {system} reads them from a "
            '[disk]; use dispatch = "balance"'
        )
    return None
