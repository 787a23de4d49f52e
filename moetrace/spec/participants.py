"""Which parts of a machine take part under a dispatch, and what suits a machine (timing model, section 1)."""

from msgspec.structs import replace

from moetrace.spec.choices import Dispatch, find
from moetrace.spec.policy import PolicySpec, shown
from moetrace.spec.system import System


def seen_by(policy: PolicySpec, system: System) -> System:
    """Return the system that a policy replays on: without a CPU that takes no part, with the link as fast as it is fed.

    The CPU takes part where experts live in host memory, unless the dispatch sends all of them to the GPU, or, beside
    NDP units, under the dispatches that say so. Then, and with `link.host_read` under the others, the link carries no
    more than host memory gives.
    """
    link = system.link
    if system.cpu is None:
        return system
    dispatch: Dispatch | None = find("dispatch", policy.dispatch)
    runs = link is not None and _runs_experts(dispatch, system)
    if runs or (link is not None and link.host_read):
        system = fed_by_host(system)
    return system if runs else replace(system, cpu=None)


def fed_by_host(system: System) -> System:
    """Return the system with a link that carries no more than the CPU's memory gives, where experts live in it."""
    cpu, link = system.cpu, system.link
    if cpu is None or link is None or system.ndp is not None or link.bytes_s <= cpu.bandwidth_gb_s * 1e9:
        return system
    return replace(system, link=replace(link, bandwidth_gb_s=cpu.bandwidth_gb_s, efficiency=1.0))


def default_policies(system: System) -> tuple[str, ...]:
    """Return the presets that a replay compares where none is named: what its class of machine does, and a better one.

    With NDP units MoNDE and the framework of arXiv 2601.03992, with a CPU whole layers on the GPU and a balance of both
    sides, with only a link whole layers on the GPU and a cache; without one everything is resident, and there is
    nothing to compare. Beside NDP units the first of them moves weights although all would fit the GPU. On a cluster
    experts where they are by number, and copies of the busiest ones.
    """
    if system.cluster is not None:
        return "ep-serial", "eplb"
    if system.ndp is not None:
        return "monde", "edge-ndp"
    if system.home is not None:
        return "n-cpu-moe", "hybrid"
    return ("resident",) if system.link is None else ("resident", "on-demand-lfu")


def idle_cpu(policy: PolicySpec, system: System) -> str | None:
    """Say in one sentence that a described CPU takes no part in a replay, and why; None if it does or there is none."""
    if system.cpu is None or seen_by(policy, system).cpu is not None:
        return None
    if system.link is None:
        why = "without [link] every expert is in GPU memory"
    elif system.ndp is not None:
        why = f"beside NDP units, dispatch {shown(policy.dispatch)} uses these"
    else:
        why = f"dispatch {shown(policy.dispatch)} runs every expert on the GPU"
    return f"the CPU of {system.name} takes no part in policy {policy.name}: {why}."


def _runs_experts(dispatch: Dispatch | None, system: System) -> bool:
    if system.ndp is not None:
        return dispatch is not None and dispatch.beside_units
    return dispatch is None or not dispatch.without_units
