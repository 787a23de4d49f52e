"""The specs' structs, or anything with the same fields, in plain numbers."""

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from support.oracle_layer import Machine, OracleTrace, machine_of
from support.tiers_oracle.machine import Disk, Plain, Remote, Tiers


def said(part: Any, name: str, default: Any = None) -> Any:
    """Return a field; the default if there is no such part or field, or nobody set it."""
    value = getattr(part, name, None)
    return default if value is None else value


def rows_of_file(path: str | Path) -> list[list[str]]:
    """Return the cells of a CSV file, without a first line of names."""
    lines = [line.strip() for line in Path(path).read_text().splitlines()]
    cells = [[cell.strip() for cell in line.split(",")] for line in lines if line and not line.startswith("#")]
    return cells[1:] if cells and any(character.isalpha() for character in cells[0][0]) else cells


def from_specs(
    trace: OracleTrace,
    model: Any,
    system: Any,
    policy: Any,
    slots: int | None = None,
    *,
    dispatch: Callable | None = None,
    cpu_takes_part: bool | None = None,
) -> tuple[Tiers, Plain]:
    """Return the machine as this policy sees it, and the policy; slots as in `support.oracle.simulate`.

    cpu_takes_part: whether a CPU beside units does, if that is not left to the dispatch.
    """
    plain = plain_policy(policy)
    kind = "user" if dispatch else plain.dispatch
    if system.ndp is not None:
        asked = takes_part(kind, plain.with_cpu) if cpu_takes_part is None else cpu_takes_part
        kind = "cheapest" if asked else "ndp"
    machine = machine_of(trace, model, system, slots, kind)
    own = {field.name: getattr(machine, field.name) for field in fields(Machine)}
    return Tiers(**own, **mechanisms(system, policy, machine, kind)), plain


def takes_part(kind: str, with_cpu: bool | None) -> bool:
    """Whether a CPU beside units does under a dispatch; a user's asks for it, the others may do without it."""
    return with_cpu is True if kind == "user" else kind in ("home", "cheapest", "bottleneck") and with_cpu is not False


def mechanisms(system: Any, policy: Any, machine: Machine, kind: str) -> dict[str, Any]:
    """Return what version 2 adds to the machine."""
    gpu, ndp, link, cpu = system.gpu, system.ndp, system.link, system.cpu
    host, disk, remote = (said(system, name) for name in ("host", "disk", "remote"))
    cpu_chunks = said(cpu, "chunks", 1)
    found: dict[str, Any] = {
        "evict_s": said(gpu, "evict_us", 0.0) * 1e-6,
        "stream": said(link, "stream", 1),
        "loss": said(link, "loss", 0.0),
        "mtu_bytes": said(link, "mtu_bytes", 1460),
        "rto_s": said(link, "rto_ms", 0.0) * 1e-3,
        "relaxed": said(link, "loss_mode", "reliable") == "relaxed",
        "link_seed": said(link, "seed", 0),
        "home_chunks": cpu_chunks if machine.home_is_cpu else said(ndp, "chunks", 1),
        "cpu_chunks": cpu_chunks,
        "contention": said(ndp, "contention", False),
        "B_x": said(ndp, "outside_gb_s", math.inf) * 1e9,
        "B_h": said(host, "channels_gb_s", math.inf) * 1e9,
        "rates": link_rates(system, machine, kind),
    }
    if said(ndp, "move_gb_s") is not None:
        found["move_bytes_s"] = ndp.move_gb_s * 1e9
    if disk is not None:
        found["disk"] = disk_of(disk, host, policy, machine)
    if remote is not None:
        vcpus = said(remote, "vcpus", 1.0)
        found["remote"] = Remote(
            F=remote.tflops_per_vcpu * 1e12 * vcpus,
            B=remote.bandwidth_gb_s_per_vcpu * 1e9 * vcpus,
            network_bytes_s=remote.network_gb_s * 1e9,
            call_s=said(remote, "call_ms", 0.0) * 1e-3,
            payload_bytes=said(remote, "payload_mb", math.inf) * 1e6,
            start_s=said(remote, "start_ms", 0.0) * 1e-3,
            load_bytes_s=said(remote, "load_gb_s", math.inf) * 1e9,
        )
    return found


def link_rates(system: Any, machine: Machine, kind: str) -> list[tuple[float, float]] | None:
    """Return (second, bytes/s), limited as `link.bandwidth_gb_s` is."""
    path = said(system.link, "rates")
    if path is None:
        return None
    lines = path if isinstance(path, list) else rows_of_file(path)
    efficiency = said(system.link, "efficiency", 1.0)
    limit = math.inf
    told = kind == "gpu" and said(system.link, "host_read", False)
    reads_host = told and system.cpu is not None and system.ndp is None
    if machine.home_is_cpu or reads_host:  # host memory is read, which may be slower
        limit = system.cpu.bandwidth_gb_s * 1e9
    return [(float(at), min(float(rate) * 1e9 * efficiency, limit)) for at, rate in lines]


def disk_of(disk: Any, host: Any, policy: Any, machine: Machine) -> Disk:
    """Return the disk and what host memory holds; slots and residency may be said by the host or by the policy."""
    everything = int((machine.W > 0).sum())
    slots = said(host, "slots", said(host, "host_slots", said(policy, "host_slots")))
    if slots is None:
        memory_gb = said(host, "memory_gb")
        slots = everything if memory_gb is None else math.floor(memory_gb * 1e9 / machine.W.max())
    residency = said(host, "residency", said(host, "host_residency", said(policy, "host_residency", "lru")))
    B = disk.bandwidth_gb_s * 1e9 * said(disk, "efficiency", 1.0)
    return Disk(B, said(disk, "latency_us", 0.0) * 1e-6, min(slots, everything), residency)


def plain_policy(policy: Any) -> Plain:
    """Return the policy's own fields, defaults where it does not say."""
    names = {field.name for field in fields(Plain)} - {"layout", "remote_loads"}
    given = {name: getattr(policy, name) for name in names if said(policy, name) is not None}
    plain = Plain(**given)
    layout = said(policy, "layout")
    if isinstance(layout, dict):
        plain.layout = layout
    elif layout is not None:
        plain.layout = {
            (int(layer), int(e)): "striped" if where == "striped" else int(where)
            for layer, e, where in rows_of_file(layout)
        }
    if plain.remote is not None and plain.loads is not None:
        plain.remote_loads = np.loadtxt(plain.loads, delimiter=",", ndmin=2)
    return plain
