"""Remote functions: experts that live in the memory of functions (Remoe; timing model, section 11)."""

from typing import Annotated

import msgspec
from msgspec import Meta

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
        network_gb_s: Bandwidth of a call, GB a second.
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
