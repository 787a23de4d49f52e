"""Remote functions: experts that live in the memory of functions, which a layer calls (Remoe; timing model, section 10)."""

from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from moetrace.spec.choices import find

if TYPE_CHECKING:
    from moetrace.spec.policy import PolicySpec
    from moetrace.spec.system import System

Rate = Annotated[float, Meta(ge=1e-9, le=1e9)]
Cost = Annotated[float, Meta(ge=0, le=1e9)]

PLAN_STEPS = 32  # of a trace, whose rows say which experts are remote, where a policy does not say
# Fields of a policy that only one with remote experts reads.
FIELDS = ("plan_steps", "replicas")


class Remote(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Functions that hold a part of the experts of a layer, one function a layer, with copies of each.

    Attributes:
        tflops_per_vcpu: Arithmetic of one vCPU, 1e12 FLOP a second.
        bandwidth_gb_s_per_vcpu: Memory bandwidth of one vCPU, GB a second.
        vcpus: vCPUs of one copy of a function.
        start_ms: Milliseconds that a cold start takes before weights are loaded, of the main function too.
        payload_mb: The most that one call carries, MB.
        load_gb_s: How fast a cold start loads weights, GB a second.
        network_gb_s: What a call carries, GB a second.
        call_ms: Milliseconds that each call adds.
        usd_per_gb_s: USD for each second in which a copy works, and GB of its memory.
        memory_gb: Memory of one copy, GB. By default what the layer's remote experts take.
    """

    tflops_per_vcpu: Rate
    bandwidth_gb_s_per_vcpu: Rate
    vcpus: Rate
    start_ms: Cost
    payload_mb: Rate
    load_gb_s: Rate
    network_gb_s: Rate
    call_ms: Cost
    usd_per_gb_s: Cost
    memory_gb: Rate | None = None

    @property
    def flop_s(self) -> float:
        """FLOP per second of one copy: F_r."""
        return self.vcpus * (self.tflops_per_vcpu * 1e12)

    @property
    def bytes_s(self) -> float:
        """Bytes per second that one copy reads: B_f."""
        return self.vcpus * (self.bandwidth_gb_s_per_vcpu * 1e9)

    def cold_s(self, main_bytes: float, function_bytes: float) -> float:
        """Return the seconds of a cold start: the main function and the largest of the others load at once."""
        return self.start_ms / 1e3 + max(main_bytes, function_bytes) / (self.load_gb_s * 1e9)


def policy_misfit(policy: "PolicySpec", system: "System") -> str | None:
    """Say in one sentence, without its end, why a policy and a system do not go together; None if they do."""
    if policy.remote is None:
        return None
    if system.remote is None:
        return (
            f"remote = {policy.remote:g} puts experts into functions, and system {system.name} has none; add [remote] "
            "to the system or remove remote"
        )
    dispatch = find("dispatch", policy.dispatch)
    if dispatch is not None and dispatch.splits:
        return f'dispatch {policy.dispatch} does not go with remote; use dispatch = "balance" or remove remote'
    return None


def plan_misfit(policy: "PolicySpec") -> str | None:
    """Say in one sentence, without its end, what of a policy's plan of remote experts is said twice."""
    if policy.remote is None or policy.plan_steps is None or policy.loads is None:
        return None
    return "plan_steps counts rows of the trace, and loads gives rows of a file, to plan remote experts; remove one of them"
