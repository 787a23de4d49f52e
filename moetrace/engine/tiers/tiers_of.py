"""What a described machine has beside GPU, home and a plain link."""

from typing import Any

from moetrace.engine.machine import MachinePart, describe, parts_of
from moetrace.engine.state import FIRST_GROUP
from moetrace.engine.tiers.tier_records import AUTO, CPU_ROW, DISK_ROW, Tiers, new_tiers
from moetrace.spec.choices import Dispatch
from moetrace.spec.model import Model
from moetrace.spec.system import Cpu, Ndp, System


def tiers_of(model: Model, system: System, dispatch: Dispatch) -> Tiers | None:
    """Return what the machine has beside GPU, home and a plain link; None if there is nothing that a replay uses.

    ``system`` is the machine as the policy sees it (`moetrace.spec.participants`).
    """
    term = _term_of(system, dispatch)
    tiers = new_tiers(max(system.units, 1))
    if term == tiers.term and dispatch.hook is not None:
        return None
    if term["has_cpu"] and system.beside is not None:
        describe(tiers.cpu, system.beside, 1, model)
        term["cpu_layer_s"] = tiers.cpu["layer_s"]
    return tiers._replace(term=term)


def _term_of(system: System, dispatch: Dispatch) -> Any:
    term, ndp, cpu, host = new_tiers(max(system.units, 1)).term, system.ndp, system.cpu, system.host
    term["has_disk"] = system.disk is not None
    term["evict_s"] = (system.gpu.evict_us or 0.0) / 1e6
    if system.link is not None and system.link.stream is not None:
        term["stream"] = system.link.stream
    if system.home is not None:
        _exchange(term, "home", ndp or cpu)
    if ndp is None:
        return term
    if cpu is not None and dispatch.uses_cpu:
        term["has_cpu"] = 1
        _exchange(term, "cpu", cpu)
    if host is not None and host.channels_gb_s is not None:
        term["all_s_per_byte"] = 1 / (host.channels_gb_s * 1e9)
    if ndp.outside_gb_s is not None:
        term["one_s_per_byte"] = 1 / (ndp.outside_gb_s * 1e9)
    term["sends_once"] = ndp.activations == "host"
    if term["all_s_per_byte"] or term["one_s_per_byte"]:
        term["contends"] = bool(ndp.contention)
    return term


def _exchange(term: Any, who: str, part: Ndp | Cpu | None) -> None:
    """Say in how many chunks rows go to a part and come back."""
    if part is not None and part.chunks not in (None, 1):
        term[f"{who}_chunks"] = AUTO if part.chunks == "auto" else part.chunks
        term[f"{who}_command_s"] = part.command_s


def tier_parts_of(system: System, share: int, tiers: Tiers) -> list[MachinePart]:
    """Return the parts of a machine with more tiers, as `parts_of`."""
    groups = max(system.units // share, 1)
    rows = {"cpu": CPU_ROW} if tiers.term["has_cpu"][0] else {}
    rows |= {"disk": DISK_ROW} if tiers.host is not None else {}
    return [
        part._replace(log_row=FIRST_GROUP + groups + rows[part.name]) if part.name in rows else part
        for part in parts_of(system, share)
    ]
