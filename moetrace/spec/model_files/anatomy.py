"""The parts of a model, counted in weights, and the fields of a `Model` that follow from them."""

from typing import Any, NamedTuple

import numpy as np

from moetrace.spec.errors import MoetraceError

CACHE_BYTES = 2  # of a number in the KV cache: 16 bit, as engines keep it unless they are asked for less


class Layer(NamedTuple):
    """Weights of one layer, without biases and norms, and bytes of its KV cache."""

    mixer: int = 0  # attention, linear attention, Mamba or convolution
    kv_bytes: float = 0.0  # of one token
    dense: int = 0  # the MLP of a layer that has no experts
    shared: int = 0  # shared experts, or the MLP beside the experts; projections to and from a latent width
    router: int = 0
    experts: int = 0  # 0: a layer without experts
    top_k: int = 0


class Anatomy(NamedTuple):
    """A model as its files describe it; the layers in their order."""

    layers: list[Layer]
    hidden: int
    moe_hidden: int | None  # None: experts work in `hidden`
    expert_intermediate: int
    expert_matrices: int
    head: int  # weights of the LM head: vocabulary x hidden, shared with the embedding or not
    mtp_layers: int | None = None  # layers after these that predict further tokens; None: the file does not say

    @property
    def expert_params(self) -> int:
        """Weights of one expert."""
        return self.expert_matrices * (self.moe_hidden or self.hidden) * self.expert_intermediate

    @property
    def first_dense(self) -> int:
        """Layers without experts before all those with experts; 0 if the two kinds alternate."""
        first = next((index for index, layer in enumerate(self.layers) if layer.experts), 0)
        return first if all(layer.experts for layer in self.layers[first:]) else 0

    @property
    def params(self) -> int:
        """All weights but the embedding, the LM head included."""
        experts = sum(layer.experts for layer in self.layers) * self.expert_params
        rest = sum(layer.mixer + layer.dense + layer.shared + layer.router for layer in self.layers)
        return experts + rest + self.head


def fields_of(anatomy: Anatomy, where: str) -> dict[str, Any]:
    """The fields of a `Model` but its name and its bits, as plain values.

    Layers without experts that come before all others are read once a step, with the LM head; version 1 of the timing
    model leaves out their attention and KV cache. Where the two kinds of layers alternate, everything between two MoE
    layers (attention, Mamba blocks, dense MLPs) is averaged over the MoE layers, and so is the KV cache.

    Raises:
        MoetraceError: No layer has experts. The message begins with `where`.
    """
    first = anatomy.first_dense
    moe = [layer for layer in anatomy.layers if layer.experts]
    if not moe:
        raise MoetraceError(f"Cannot read a MoE model from {where}: it is dense, none of its layers has experts.")
    dense = [index for index, layer in enumerate(anatomy.layers) if not layer.experts]
    rest = anatomy.layers[first:]
    per_layer = sum(layer.mixer + layer.dense + layer.shared + layer.router for layer in rest) / len(moe)
    kv_bytes = float(np.sum([layer.kv_bytes for layer in rest])) / len(moe)
    fields = {
        "moe_layers": len(moe),
        "dense_layers": len(dense) if dense == list(range(len(dense))) else dense,
        "mtp_layers": anatomy.mtp_layers,
        "experts": _one_or_each([layer.experts for layer in moe]),
        "top_k": _one_or_each([layer.top_k for layer in moe]),
        "hidden": anatomy.hidden,
        "moe_hidden": anatomy.moe_hidden,
        "expert_intermediate": anatomy.expert_intermediate,
        "expert_matrices": anatomy.expert_matrices,
        "dense_params_per_layer": round(per_layer),
        "once_params": anatomy.head + sum(layer.dense for layer in anatomy.layers[:first]),
        "kv_bytes_per_token_layer": int(kv_bytes) if kv_bytes.is_integer() else kv_bytes,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _one_or_each(numbers: list[int]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else numbers
