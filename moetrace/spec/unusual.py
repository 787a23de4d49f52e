"""Values of a machine or a policy that may not be meant so beside a model: a note says what holds."""

from collections.abc import Iterator

import numpy as np

from moetrace.spec.errors import counted
from moetrace.spec.model import Model
from moetrace.spec.policy import PolicySpec
from moetrace.spec.system import System


def unusual_host(model: Model, system: System, expert_bytes: np.ndarray) -> Iterator[str]:
    """Yield a sentence if `host.slots` is more than there are experts, or than host memory has room for.

    ``expert_bytes``: float64 [layers, experts].
    """
    host = system.host
    if host is None or host.slots is None:
        return
    most = model.all_experts
    if host.slots > most:
        yield (
            f"host.slots = {host.slots:,} of {system.name} is more than the {counted(most, 'expert')} of {model.name}: "
            f"host memory keeps each of them once it has been read, as with host.slots = {most}."
        )
    need_gb = min(host.slots, most) * float(expert_bytes.max()) / 1e9
    if host.memory_gb is not None and need_gb > host.memory_gb:
        yield (
            f"host.slots = {host.slots:,} of {system.name} take {need_gb:.1f} GB, more than host.memory_gb = "
            f"{host.memory_gb:g}, and are priced as if they fit: remove one of the two."
        )


def unusual_remote(
    policy: PolicySpec, model: Model, system: System, expert_bytes: np.ndarray, steps: int
) -> Iterator[str]:
    """Yield a sentence for each number of remote functions that changes nothing, or that no function could have.

    ``expert_bytes``: float64 [layers, experts]; ``steps``: of the trace.
    """
    share, remote = policy.remote, system.remote
    if not share or remote is None:
        return
    experts = int(share * model.most_experts * (1 + 1e-12))
    if experts == 0:
        yield (
            f"policy {policy.name} has no remote experts: remote = {share:g} of the {model.most_experts} experts of a "
            "layer is less than one."
        )
        return
    if policy.replicas is not None and policy.replicas > experts:
        yield (
            f"policy {policy.name} has replicas = {policy.replicas:,}, but a layer has "
            f"{counted(experts, 'remote expert')}: more copies than that have nothing to do."
        )
    if policy.plan_steps is not None and policy.plan_steps > steps:
        yield (
            f"policy {policy.name} plans by plan_steps = {policy.plan_steps:,}, but the trace has "
            f"{counted(steps, 'step')}: its remote experts are chosen by all of what they then do."
        )
    row_bytes, payload_bytes = model.activation_row_bytes, remote.payload_mb * 1e6
    if payload_bytes < row_bytes:
        yield (
            f"remote.payload_mb = {remote.payload_mb:g} of {system.name} is less than the {row_bytes / 1e6:.3g} MB of "
            f"one row's activations: each row takes {int(np.ceil(row_bytes / payload_bytes)):,} calls."
        )
    memory_gb = experts * float(expert_bytes.max()) / 1e9 if remote.memory_gb is None else remote.memory_gb
    if payload_bytes > memory_gb * 1e9:
        yield (
            f"remote.payload_mb = {remote.payload_mb:g} of {system.name} is more than the {memory_gb:.3g} GB of memory "
            f"that a function has in policy {policy.name}: no call could carry that."
        )
