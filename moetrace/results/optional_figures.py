"""The requirements of figures that not all replays have, with a sentence for each missing requirement."""

from typing import NamedTuple

from moetrace.results.record import (
    OF_A_DEADLINE,
    OF_A_LOSS,
    OF_A_TABLE,
    OF_CLUSTER,
    OF_EVICTIONS,
    OF_REGRET,
    OF_RELAYOUT,
    OF_REMOTE,
    OPTIONAL,
)
from moetrace.spec import PolicySpec, System


class Need(NamedTuple):
    """The requirement of a figure, as in "no system has [disk]", and how to meet it."""

    what: str
    add: str


_IN_A_SYSTEM, _IN_A_POLICY = "set it in the system", "set it in a policy"
_NEEDS = {name: Need(f"system has [{table}]", "add that table to the system") for name, table in OF_A_TABLE.items()}
_NEEDS |= dict.fromkeys(OF_A_LOSS, Need("system has link.loss", _IN_A_SYSTEM))
_NEEDS |= dict.fromkeys(OF_EVICTIONS, Need("system has gpu.evict_us", _IN_A_SYSTEM))
_NEEDS |= dict.fromkeys(OF_CLUSTER, Need("system has [cluster]", "use a system that is a cluster"))
_NEEDS |= dict.fromkeys(OF_REMOTE, Need("policy has remote", f"{_IN_A_POLICY} above a system with [remote]"))
_NEEDS |= dict.fromkeys(OF_A_DEADLINE, Need("policy has deadline_ms", _IN_A_POLICY))
_NEEDS["mean_frequency"] = Need(
    "policy has deadline_ms above a system with [[gpu.levels]]", "set both in policy and system"
)
_NEEDS |= dict.fromkeys(OF_RELAYOUT, Need('policy has prefetch = "relayout"', _IN_A_POLICY))
_NEEDS |= dict.fromkeys(OF_REGRET, Need("replay was asked for it", "replay with --regret"))


def need_of(name: str) -> Need | None:
    """Return what a figure needs; None if all replays have it."""
    return _NEEDS[name] if name in OPTIONAL else None


def may_have(name: str, system: System, policy: PolicySpec) -> bool:
    """Whether a replay without regret has a figure of this policy on this machine."""
    if name not in OPTIONAL:
        return True
    if name in OF_A_TABLE:
        return getattr(system, OF_A_TABLE[name]) is not None
    if name in OF_CLUSTER:
        return system.cluster is not None
    if name in OF_A_LOSS:
        return system.link is not None and bool(system.link.loss)
    if name in OF_EVICTIONS:
        return system.gpu.evict_us is not None
    if name in OF_REMOTE:
        return bool(policy.remote)
    if name in OF_A_DEADLINE:
        return policy.deadline_ms is not None and (name == "in_time" or system.gpu.levels is not None)
    return name in OF_RELAYOUT and policy.prefetch == "relayout"
