"""A cluster: how many GPUs, which of them run what, and the network between them (docs/cluster.md)."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

Rate = Annotated[float, Meta(ge=1e-9, le=1e9)]
Extra = Annotated[float, Meta(ge=0, le=1e9)]
WireBits = Annotated[float, Meta(ge=1e-6, le=64)]
Gpus = Annotated[int, Meta(ge=1, le=4096)]


class Cluster(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The GPUs of a cluster, each as `[gpu]` says: `gpus`, or `attention` and `experts`.

    Attributes:
        gpus: GPUs that run both attention and experts (colocated).
        attention: GPUs that run attention, shared experts and the head, with `experts`.
        experts: GPUs that run the experts, with `attention`.
        gpus_per_node: GPUs of a node, in the order of their numbers, attention GPUs first. By default the network has
            one tier.
        rate_factors: CSV file of `gpu,factor`: the share of `[gpu]`'s rates at which a GPU computes and reads its
            memory. By default, and for GPUs that are not in it, 1.
    """

    gpus: Gpus | None = None
    attention: Gpus | None = None
    experts: Gpus | None = None
    gpus_per_node: Gpus | None = None
    rate_factors: str | None = None

    @property
    def is_colocated(self) -> bool:
        """Whether the same GPUs run attention and experts."""
        return self.gpus is not None

    @property
    def attention_gpus(self) -> int:
        """Number of GPUs that run attention: ag."""
        return self.gpus or self.attention or 1

    @property
    def expert_gpus(self) -> int:
        """Number of GPUs that hold experts."""
        return self.gpus or self.experts or 1

    @property
    def all_gpus(self) -> int:
        """Number of GPUs."""
        return self.gpus or (self.attention or 0) + (self.experts or 0)

    @property
    def names(self) -> list[str]:
        """The name of each GPU, in the order of their numbers."""
        if self.gpus is not None:
            return [f"gpu{number}" for number in range(self.gpus)]
        return [f"attention{i}" for i in range(self.attention_gpus)] + [f"experts{i}" for i in range(self.expert_gpus)]

    @property
    def resources(self) -> list[str]:
        """The resources, each of which serves one task at a time."""
        return ["gpus", "network"] if self.is_colocated else ["attention", "dispatch", "experts", "combine"]


class NetworkPhase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Constants of the network in the steps of one phase, where they are not those of `[network]`; fields as there."""

    bandwidth_gb_s: Rate | None = None
    dispatch_latency_us: Extra | None = None
    combine_latency_us: Extra | None = None
    row_ns: Extra | None = None
    dispatch_bits: WireBits | None = None
    combine_bits: WireBits | None = None
    dedup: bool | None = None
    node_bandwidth_gb_s: Rate | None = None
    node_latency_us: Extra | None = None


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The network between the GPUs of a cluster.

    Attributes:
        bandwidth_gb_s: Most that one GPU sends or receives, GB a second in each direction.
        dispatch_latency_us: Microseconds that each transfer to the experts adds.
        combine_latency_us: Microseconds that each transfer back adds.
        row_ns: Nanoseconds that each row of an attention GPU adds to a transfer. By default 0.
        dispatch_bits: Bits of an activation on its way to the experts; FP8 with scales of 128 is 8.25. By default 16.
        combine_bits: Bits of an activation on its way back. By default 16.
        dedup: Whether a row goes to a GPU once, however many of its experts are there. By default it does.
        node_bandwidth_gb_s: With `cluster.gpus_per_node`, what one node sends to the others or receives from them at
            most, GB a second in each direction.
        node_latency_us: With `cluster.gpus_per_node`, microseconds that a transfer between nodes takes at least. By
            default 0.
        decode: Other constants for decode steps.
        prefill: Other constants for prefill steps.
    """

    bandwidth_gb_s: Rate
    dispatch_latency_us: Extra
    combine_latency_us: Extra
    row_ns: Extra | None = None
    dispatch_bits: WireBits | None = None
    combine_bits: WireBits | None = None
    dedup: bool | None = None
    node_bandwidth_gb_s: Rate | None = None
    node_latency_us: Extra | None = None
    decode: NetworkPhase | None = None
    prefill: NetworkPhase | None = None

    def of_phase(self, name: str) -> dict[str, Any]:
        """Return each constant, by its field's name, in steps of the phase `prefill`, `decode` or `mixed`."""
        other = {"decode": self.decode, "prefill": self.prefill}.get(name)
        defaults = {"row_ns": 0.0, "dispatch_bits": 16.0, "combine_bits": 16.0, "dedup": True, "node_latency_us": 0.0}
        found = {}
        for field in NetworkPhase.__struct_fields__:
            own = None if other is None else getattr(other, field)
            value = getattr(self, field) if own is None else own
            found[field] = defaults.get(field) if value is None else value
        return found
