"""A disk below host memory: `[disk]` of a system, and what it goes with (timing model, section 10)."""

from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from moetrace.spec.choices import Residency, choices_of, find

if TYPE_CHECKING:
    from moetrace.spec.policy import PolicySpec
    from moetrace.spec.system import System

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


def system_misfit(system: "System") -> str | None:
    """Say in one sentence, without its end, what a system has that does not go with its disk; None if nothing."""
    host, cpu = system.host, system.cpu
    if system.disk is None:
        unread = host is not None and host.slots is not None
        return "host.slots applies to systems with a [disk] only; remove it or add [disk]" if unread else None
    if system.ndp is not None:
        return "[disk] lies below host memory, but with [ndp] the experts live in the units; remove one of them"
    if system.link is None:
        return (
            "[disk] needs a [link] from host memory to the GPU; where they are one memory, as in a phone or a Mac, "
            "describe the disk as [link] and remove [disk], as presets phone-ufs and mac-m4-max do"
        )
    if cpu is not None and cpu.chunks not in (None, 1):
        return "cpu.chunks does not go with [disk], as experts start when they have been read; remove one of them"
    return None


def host_residencies() -> tuple[str, ...]:
    """Return the residencies that host memory may have: those that learn from the demands so far."""
    return tuple(name for name, record in choices_of("residency").items() if _goes_with_host(record))


def _goes_with_host(record: Residency) -> bool:
    looks_beyond = record.next_steps or record.begin or record.counts_prompts or record.foresees
    is_built_in = record.hook is None or record.hook.__module__.startswith("moetrace.engine.")
    return record.admits and is_built_in and not looks_beyond and not record.instead


def host_residency_of(policy: "PolicySpec") -> Residency:
    """Return the record of the residency of host memory."""
    return find("residency", policy.host_residency or HOST_RESIDENCY)


def policy_misfit(policy: "PolicySpec", system: "System") -> str | None:
    """Say in one sentence, without its end, why a policy and a system with or without a disk do not go together."""
    if system.disk is None:
        if policy.host_residency is None:
            return None
        return (
            f"host_residency applies to systems with a [disk] only, and system {system.name} has none; remove it or "
            "add [disk]"
        )
    dispatch = find("dispatch", policy.dispatch)
    if dispatch is not None and dispatch.splits:
        return (
            f"dispatch {policy.dispatch} shares experts that are in host memory, and system {system.name} reads them "
            'from a [disk]; use dispatch = "balance"'
        )
    return None
