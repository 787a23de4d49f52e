"""The parts of a machine that take part under a dispatch, and what suits a machine (timing model, section 1)."""

import numpy as np
from msgspec.structs import replace

from moetrace.spec import cluster_policy
from moetrace.spec.choices import Dispatch, choices_of, find
from moetrace.spec.errors import UsageError, counted
from moetrace.spec.host_memory import policy_misfit
from moetrace.spec.link_rates import read_rates
from moetrace.spec.policy import PolicySpec, shown
from moetrace.spec.system import System


def seen_by(policy: PolicySpec, system: System) -> System:
    """Return the system that a policy replays on: without what takes no part, with the link as fast as it is fed.

    The CPU takes part where experts live in host memory, unless the dispatch sends all of them to the GPU, or, beside
    NDP units, under the dispatches that say so: `with_cpu` says so of a user's, or denies it of the others. Then, and
    with `link.host_read` where the CPU takes no part, the link carries no more than host memory gives. Functions take
    part where the policy has `remote`.
    """
    if policy.remote is None and system.remote is not None:
        system = replace(system, remote=None)
    link = system.link
    if system.cpu is None:
        return system
    dispatch: Dispatch | None = find("dispatch", policy.dispatch)
    runs = link is not None and _runs_experts(policy, dispatch, system)
    if runs or (link is not None and link.host_read):
        system = fed_by_host(system)
    return system if runs else replace(system, cpu=None)


def fed_by_host(system: System) -> System:
    """Return the system with a link that carries no more than the CPU's memory gives, where experts live in it."""
    cpu, link = system.cpu, system.link
    if cpu is None or link is None or system.ndp is not None or link.bytes_s <= cpu.bandwidth_gb_s * 1e9:
        return system
    return replace(system, link=replace(link, bandwidth_gb_s=cpu.bandwidth_gb_s, efficiency=1.0))


def rates_seen_by(policy: PolicySpec, system: System) -> np.ndarray | None:
    """Return the link's rates over time as a policy replays on them: float64 [n, 2], seconds and bytes a second.

    They stand for `bandwidth_gb_s`: its efficiency, and what host memory gives, hold for them, too. None without them.
    """
    link, cpu = system.link, system.cpu
    if link is None or link.rates is None:
        return None
    rates = read_rates(link.rates) * [1.0, 1e9 * (link.efficiency or 1.0)]
    if cpu is not None and system.ndp is None and (link.host_read or seen_by(policy, system).cpu is not None):
        rates[:, 1] = np.minimum(rates[:, 1], cpu.bandwidth_gb_s * 1e9)
    return rates


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
    """Say in one sentence that a described CPU takes no part in a replay, and why; None if it does or is not there."""
    if system.cpu is None or seen_by(policy, system).cpu is not None:
        return None
    if system.link is None:
        why = "without [link] every expert is in GPU memory"
    elif system.ndp is not None:
        why = f"beside NDP units, dispatch {shown(policy.dispatch)} uses these"
        if policy.with_cpu is False:
            why = "with_cpu is false"
        elif find("dispatch", policy.dispatch) is None:
            why += ", unless with_cpu is true"
    else:
        why = f"dispatch {shown(policy.dispatch)} runs every expert on the GPU"
    return f"the CPU of {system.name} takes no part in policy {policy.name}: {why}."


def idle_loss(policy: PolicySpec, system: System) -> str | None:
    """Say in one sentence that a link loses no rows in a replay, although it may; None if it does or may not."""
    dispatch: Dispatch | None = find("dispatch", policy.dispatch)
    if system.link is None or not system.link.loses_rows or dispatch is None or not dispatch.without_units:
        return None
    return (
        f'link.loss_mode = "relaxed" of {system.name} changes nothing in policy {policy.name}: dispatch '
        f"{policy.dispatch} runs every expert on the GPU, so only weights travel, and lost ones are sent again."
    )


def idle_nodes(system: System) -> str | None:
    """Say in one sentence that a network between nodes is described, but no node; else None."""
    network = system.network
    if network is None or system.cluster is None or system.cluster.gpus_per_node is not None:
        return None
    for field in ("node_bandwidth_gb_s", "node_latency_us"):
        if any(getattr(part, field) is not None for part in (network, network.decode, network.prefill) if part):
            return (
                f"network.{field} of {system.name} changes nothing: without cluster.gpus_per_node all GPUs are on one "
                "node."
            )
    return None


def never_plans(policy: PolicySpec, steps: int) -> str | None:
    """Say in one sentence that a trace of so many steps ends before a cluster's first plan; None if it does not."""
    if policy.schedule is None or policy.placement not in cluster_policy.PLANNED:
        return None
    window = cluster_policy.WINDOW if policy.window is None else policy.window
    if steps > window:
        return None
    return (
        f"policy {policy.name} makes no plan: the first is made just before step {window} (window), and the trace has "
        f"{counted(steps, 'step')}; experts stay in blocks."
    )


def check_policy(policy: PolicySpec, system: System) -> None:
    """Raise a UsageError if the policy cannot run on the system.

    `tp:g` wants a g that divides the number of NDP units. Without these and without a CPU that could run experts,
    `gpu` is the only dispatch: there is nothing to decide, so a user's own is refused too. `placement` places nothing
    where there are no units, and is not looked at. A cluster runs policies with a schedule, and no other machine does.
    """
    if (system.cluster is None) != (policy.schedule is None):
        raise UsageError(cluster_policy.other_kind(policy.name, system))
    if system.cluster is not None:
        return
    if system.home is None:
        dispatch = find("dispatch", policy.dispatch)
        if dispatch is None or not dispatch.without_units:
            able = [f'"{name}"' for name, record in choices_of("dispatch").items() if record.without_units]
            missing = "has none" if system.link is not None else "has no link to either"
            raise UsageError(
                f"Policy {policy.name}: dispatch {shown(policy.dispatch)} needs NDP units or a CPU that runs experts, "
                f"and system {system.name} {missing}; only dispatch = {' or '.join(able)} (as in on-demand) runs there."
            )
    dispatch = find("dispatch", policy.dispatch)
    parts = [part for part in (system.accelerator, system.home) if part is not None]
    if dispatch is not None and dispatch.splits and any(part.starts_once for part in parts):
        raise UsageError(
            f"Policy {policy.name}: dispatch {policy.dispatch} needs experts that each start themselves, and system "
            f'{system.name} has launch = "layer"; set launch = "expert" or use dispatch = "balance".'
        )
    if policy.with_cpu is not None and (system.ndp is None or system.cpu is None):
        missing = " and no ".join(f"[{name}]" for name in ("ndp", "cpu") if getattr(system, name) is None)
        raise UsageError(
            f"Policy {policy.name}: with_cpu = {str(policy.with_cpu).lower()} needs NDP units and a CPU beside "
            f"them, and system {system.name} has no {missing}; add it, or remove with_cpu."
        )
    if misfit := policy_misfit(policy.host_residency, policy.dispatch, system.disk, system.name):
        raise UsageError(f"Policy {policy.name}: {misfit}.")
    if policy.remote is not None:
        _check_remote(policy, system, dispatch)
    placement, prefetch = find("placement", policy.placement), find("prefetch", policy.prefetch)
    if system.ndp is None:
        if placement is not None and placement.needs_units:
            raise UsageError(
                f"Policy {policy.name}: placement {policy.placement} needs NDP units, and system {system.name} has "
                "none; remove placement, or add [ndp]."
            )
        return
    if prefetch.partners and system.ndp.move_gb_s is None:
        raise UsageError(
            f"Policy {policy.name}: prefetch {policy.prefetch} moves experts between units, and system {system.name} "
            "does not say how fast; set ndp.move_gb_s."
        )
    size = policy.group_size(system.ndp.units)
    if system.ndp.units % size:
        raise UsageError(
            f"Policy {policy.name}: placement {policy.placement} wants a group size that divides the "
            f"{system.ndp.units} NDP units of system {system.name}, got {size}."
        )


def _check_remote(policy: PolicySpec, system: System, dispatch: Dispatch | None) -> None:
    """Experts are remote only where there are functions, and no expert is then split."""
    if system.remote is None:
        raise UsageError(
            f"Policy {policy.name}: remote = {policy.remote:g} puts experts into functions, and system {system.name} "
            "has none; add [remote] to the system, or remove remote."
        )
    if dispatch is not None and dispatch.splits:
        raise UsageError(
            f'Policy {policy.name}: dispatch {policy.dispatch} does not go with remote; use dispatch = "balance", or '
            "remove remote."
        )


def _runs_experts(policy: PolicySpec, dispatch: Dispatch | None, system: System) -> bool:
    if system.ndp is not None:
        return bool(policy.with_cpu) if dispatch is None else dispatch.beside_units and policy.with_cpu is not False
    return dispatch is None or not dispatch.without_units
