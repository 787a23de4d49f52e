"""A described machine's parts beside GPU, home and a plain link."""

from typing import Any

from moetrace.engine.machine import FIRST_HOME, Machine, MachinePart, describe, parts_of
from moetrace.engine.prefetch import RELAYOUT
from moetrace.engine.state import FIRST_GROUP
from moetrace.engine.tiers.tier_host import host_of
from moetrace.engine.tiers.tier_layout import new_layout
from moetrace.engine.tiers.tier_records import (
    AUTO,
    CPU_ROW,
    DISK_ROW,
    NO_GROUP,
    REMOTE_ROW,
    TERM,
    Tiers,
    new_tiers,
)
from moetrace.spec.choices import Dispatch, find
from moetrace.spec.fits import host_slots
from moetrace.spec.model import Model
from moetrace.spec.policy import PolicySpec
from moetrace.spec.system import Cpu, Ndp, System


def tiers_of(model: Model, system: System, policy: PolicySpec, machine: Machine) -> Tiers | None:
    """Return what the machine has beside GPU, home and a plain link; None if there is nothing that a replay uses.

    ``system`` is the machine as the policy sees it (`moetrace.spec.participants`).
    """
    dispatch: Dispatch | None = find("dispatch", policy.dispatch)
    uses_cpu = bool(policy.with_cpu) if dispatch is None else dispatch.uses_cpu
    term, tiers = _term_of(system, uses_cpu), new_tiers(max(system.units, 1))
    if len(machine.device) - FIRST_HOME > max(system.units // machine.share, 1):
        term["all_group"] = system.units
    if term == tiers.term and (dispatch is None or dispatch.hook is not None) and system.remote is None:
        return None
    if system.link is not None and system.home is not None:
        term["link_bytes_s"], term["home_bytes_s"] = system.link.bytes_s, system.home.count * system.home.bytes_s
    if system.ndp is not None and find("prefetch", policy.prefetch).rule == RELAYOUT:
        layers, experts = machine.weight_bytes.shape
        layout = new_layout(layers, experts, system.units, (system.ndp.move_gb_s or 0.0) * 1e9, policy.alpha)
        tiers = tiers._replace(layout=layout)
    if system.disk is not None:
        slots = host_slots(model, system, machine.weight_bytes)
        tiers = tiers._replace(host=host_of(system.disk, policy, machine, slots))
    if system.beside is not None:
        describe(tiers.cpu, system.beside, 1, model)
        term["cpu_layer_s"] = tiers.cpu["layer_s"]
    return tiers._replace(term=term)


def adds_nothing(tiers: Tiers) -> bool:
    """Whether the machine has a plain link and one home only, and its dispatch is why there are tiers."""
    term, always = tiers.term, new_tiers(int(tiers.term["units"][0]))
    known = {"link_bytes_s", "home_bytes_s"}  # for a dispatch; they change no time
    same = all(term[name] == always.term[name] for name in TERM.names or () if name not in known)
    return same and all((part is None) == (other is None) for part, other in zip(tiers, always, strict=True))


def what_it_has(system: System, tiers: Tiers) -> list[str]:
    """Return what of a system makes its tiers, as fields and tables of its TOML."""
    term, ndp, link = tiers.term[0], system.ndp, system.link
    home = "ndp" if ndp is not None else "cpu"
    fields = (
        ("link.stream", term["stream"] != 1),
        (f"{home}.chunks", term["home_chunks"] != 1),
        ("cpu.chunks", term["cpu_chunks"] != 1),
        ("a layout of experts of single units and of all", term["all_group"] != NO_GROUP),
        ('ndp.activations = "host"', term["sends_once"]),
        ("host.channels_gb_s", term["all_s_per_byte"]),
        ("ndp.outside_gb_s", term["one_s_per_byte"]),
        ("gpu.evict_us", term["evict_s"]),
        ("[disk]", term["has_disk"]),
        ("link.loss", link is not None and link.loss),
        ("link.rates", link is not None and link.rates is not None),
    )
    return [name for name, is_there in fields if is_there]


def _term_of(system: System, uses_cpu: bool) -> Any:
    term, ndp, cpu, host = new_tiers(max(system.units, 1)).term, system.ndp, system.cpu, system.host
    term["has_disk"] = system.disk is not None
    term["evict_s"] = (system.gpu.evict_us or 0.0) / 1e6
    if system.link is not None and system.link.stream is not None:
        term["stream"] = system.link.stream
    if system.home is not None:
        _exchange(term, "home", ndp or cpu)
    if ndp is None:
        return term
    if cpu is not None and uses_cpu:
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


def with_homes_of_its_own(machine: Machine, tiers: Tiers | None) -> Machine:
    """Return a machine whose experts may move to other homes, where they do."""
    moves = tiers is not None and tiers.layout is not None
    return machine._replace(home=machine.home.copy()) if moves else machine


def tier_parts_of(system: System, share: int, tiers: Tiers, groups: int) -> list[MachinePart]:
    """Return the parts of a machine with more tiers, as `parts_of`; ``groups`` of units stand before the others."""
    rows = {"cpu": CPU_ROW} if tiers.term["has_cpu"][0] else {}
    rows |= {"disk": DISK_ROW} if tiers.host is not None else {}
    rows |= {"remote": REMOTE_ROW} if tiers.remote is not None else {}
    return [
        part._replace(log_row=FIRST_GROUP + groups + rows[part.name]) if part.name in rows else part
        for part in parts_of(system, share)
    ]
