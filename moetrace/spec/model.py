"""Models: the MoE layers of a model, in bytes and FLOP (timing model, section 1)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType

from moetrace.spec.errors import UsageError
from moetrace.spec.load import Loaded, convert, overridden, read, read_table
from moetrace.spec.model_files import is_model_file, read_model_file
from moetrace.spec.weights import (
    MAX_BITS,
    MIN_BITS,
    Bits,
    Starts,
    WeightBits,
    check_codebook_bits,
    check_read,
    read_expert_bits,
    without_defaults,
)

# Ids are at most uint16 in a trace, and its largest value says "absent".
MAX_EXPERTS = 65535

MAX_WIDTH = 1_000_000
MAX_PARAMS = 10**15

Width = Annotated[int, Meta(ge=1, le=MAX_WIDTH)]
Experts = Annotated[int, Meta(ge=1, le=MAX_EXPERTS)]
Params = Annotated[int, Meta(ge=0, le=MAX_PARAMS)]
LayerNumber = Annotated[int, Meta(ge=0, le=65535)]


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model as the replay prices it (docs/timing-model.md, section 1). Biases and norms are ignored.

    Attributes:
        name: Name of the model.
        moe_layers: Number of MoE layers, L.
        dense_layers: Layers without experts: how many come before the first MoE layer, or a list of the numbers of all
            of them where they stand elsewhere too. By default not known.
        mtp_layers: Layers after the last one that predict further tokens (MTP). They are not in `moe_layers`. By
            default not known.
        experts: Experts of a layer: one number, or a list with one for each layer. The largest is E.
        top_k: Experts that a row chooses in a layer: one number, or a list with one for each layer.
        hidden: Numbers in a row's activations, h.
        moe_hidden: Width in which experts work and in which rows travel to them, where it is not `hidden`: such a model
            projects each row to a latent vector of this width before its experts, and back after them.
        expert_intermediate: Intermediate size of an expert, I.
        expert_matrices: Weight matrices of an expert, m.
        weight_bits: Bits of an expert's weight: one number, a list with one for each layer, the path of a CSV file
            with a line for each layer and a column for each expert, or a table of the bits of a weight and of those
            stored beside it.
        expert_bits: Path of a CSV file with lines of `layer,expert,bits` that give single experts bits of their own,
            in the place of `weight_bits` or, if that is a table, of its `bits`. By default none.
        sparse_launches: Starts that an expert adds on the device that runs it, if `weight_bits` is a table with a share
            of sparse weights. By default 0.
        dense_weight_bits: Bits of a dense weight.
        activation_bytes: Bytes of an activation, a.
        dense_params_per_layer: Weights that are read once per layer and step: attention, router, shared experts.
        shared_params_per_layer: Those of them that are of shared experts, which a cluster may run apart. By default not
            known.
        once_params: Weights that are read once per step: LM head, dense first layers.
        kv_bytes_per_token_layer: Bytes of the KV cache of one token in one layer.
    """

    name: str
    moe_layers: Annotated[int, Meta(ge=1, le=65535)]
    dense_layers: LayerNumber | list[LayerNumber] | UnsetType = UNSET
    mtp_layers: Annotated[int, Meta(ge=0, le=1000)] | UnsetType = UNSET
    experts: Experts | list[Experts]
    top_k: Experts | list[Experts]
    hidden: Width
    moe_hidden: Width | UnsetType = UNSET
    expert_intermediate: Width
    expert_matrices: Annotated[int, Meta(ge=1, le=100)] = 3
    weight_bits: Bits | list[Bits] | str | WeightBits
    expert_bits: str | UnsetType = UNSET
    sparse_launches: Starts | UnsetType = UNSET
    dense_weight_bits: Bits
    activation_bytes: Annotated[float, Meta(ge=1e-9, le=1000)] = 2
    dense_params_per_layer: Params
    shared_params_per_layer: Params | UnsetType = UNSET
    once_params: Params
    kv_bytes_per_token_layer: Annotated[float, Meta(ge=0, le=1e9)]

    @property
    def layer_index(self) -> np.ndarray | None:
        """Number of each MoE layer among all layers, int64 [moe_layers]; None if `dense_layers` does not say."""
        if self.dense_layers is UNSET:
            return None
        dense = range(self.dense_layers) if isinstance(self.dense_layers, int) else set(self.dense_layers)
        numbers = np.arange(self.moe_layers + len(dense))
        return numbers[~np.isin(numbers, list(dense))][: self.moe_layers]

    @property
    def all_layers(self) -> int | None:
        """Number of layers with and without experts, MTP layers apart; None if `dense_layers` does not say."""
        if self.dense_layers is UNSET:
            return None
        dense = self.dense_layers
        return self.moe_layers + (dense if isinstance(dense, int) else len(set(dense)))

    @property
    def layer_experts(self) -> np.ndarray:
        """Experts of each layer; int64 [moe_layers]."""
        return np.broadcast_to(np.asarray(self.experts, np.int64), self.moe_layers)

    @property
    def most_experts(self) -> int:
        """Experts of the layer that has most, E."""
        return self.experts if isinstance(self.experts, int) else max(self.experts)

    @property
    def all_experts(self) -> int:
        """Experts of all layers."""
        return self.moe_layers * self.experts if isinstance(self.experts, int) else sum(self.experts)

    @property
    def layer_top_k(self) -> np.ndarray:
        """Experts that a row chooses in each layer; int64 [moe_layers]."""
        return np.broadcast_to(np.asarray(self.top_k, np.int64), self.moe_layers)

    @property
    def most_top_k(self) -> int:
        """Experts that a row chooses in the layer where it chooses most."""
        return self.top_k if isinstance(self.top_k, int) else max(self.top_k)

    @property
    def expert_hidden(self) -> int:
        """Width in which experts work: `moe_hidden`, or h where the model has no width of its own for them."""
        return self.hidden if self.moe_hidden is UNSET else self.moe_hidden

    @property
    def expert_params(self) -> int:
        """Weights of one expert: `m*h*I`, with the width of the experts for h."""
        return self.expert_matrices * self.expert_hidden * self.expert_intermediate

    @property
    def codebooks_per_weight(self) -> float:
        """Codebooks of an expert, one for each output channel of its matrices, over its weights: c."""
        channels = (self.expert_matrices - 1) * self.expert_intermediate + self.expert_hidden
        return channels / self.expert_params

    @property
    def sparse_starts(self) -> float:
        """Starts that each expert adds to its own, for the weights that are stored by themselves."""
        table = self.weight_bits
        has_sparse = isinstance(table, WeightBits) and table.sparse > 0
        return float(self.sparse_launches) if has_sparse and self.sparse_launches is not UNSET else 0.0

    @property
    def flop_per_row(self) -> float:
        """FLOP to run one row through one expert: `Q(1) = 2*m*h*I`."""
        return 2.0 * self.expert_params

    @property
    def dense_flop_per_row(self) -> float:
        """FLOP of one row in the dense part of one layer."""
        return 2.0 * self.dense_params_per_layer

    @property
    def dense_bytes(self) -> float:
        """Bytes of the dense weights of one layer."""
        return self.dense_params_per_layer * self.dense_weight_bits / 8

    @property
    def head_bytes(self) -> float:
        """Bytes read once a step: LM head and dense first layers."""
        return self.once_params * self.dense_weight_bits / 8

    @property
    def activation_row_bytes(self) -> float:
        """Bytes of one row's activations on their way to an expert: `h*a`, with the width of the experts for h."""
        return self.expert_hidden * float(self.activation_bytes)

    def expert_bytes(self) -> np.ndarray:
        """Bytes of each expert, `W(e) = m*h*I*w(e)`; 0 for an id that a layer of fewer experts does not have.

        Returns:
            float64 [moe_layers, most_experts].

        Raises:
            MoetraceError: `weight_bits` or `expert_bits` names a file, and it is not as the model wants it.
        """
        sizes = self.expert_params * (self.bits_of_experts() / 8)
        return sizes if isinstance(self.experts, int) else np.where(self.has_expert, sizes, 0.0)

    def bits_of_experts(self) -> np.ndarray:
        """Bits that a weight of each expert takes on average, with all that is stored beside it.

        Returns:
            float64 [moe_layers, most_experts].

        Raises:
            MoetraceError: As `expert_bytes`.
        """
        given, shape = self.weight_bits, (self.moe_layers, self.most_experts)
        if isinstance(given, str):
            return read_table(given, *shape)
        one = given.bits if isinstance(given, WeightBits) else given
        bits = np.broadcast_to(np.asarray(one, np.float64).reshape(-1, 1), shape)
        if self.expert_bits is not UNSET:
            own = read_expert_bits(self.expert_bits, self.layer_experts)
            bits = np.where(np.isnan(own), bits, own)
        return given.average(bits, self.codebooks_per_weight) if isinstance(given, WeightBits) else bits

    @property
    def has_expert(self) -> np.ndarray:
        """Whether a layer has an expert of an id; bool [moe_layers, most_experts]."""
        return np.arange(self.most_experts) < self.layer_experts[:, None]


def load_model(source: str | Path | Model, overrides: Mapping[str, object] | None = None) -> Model:
    """Load a model and check it.

    Args:
        source: A preset's name, a TOML file or an instance; or a model's own file: the folder of a Hugging Face model
            or its `config.json`, or a GGUF file. Only the descriptions in these files are read, and no code is run.
        overrides: New values of single fields, by dotted path. By default none.

    Returns:
        The model.

    Raises:
        UsageError: A value is wrong, or a key or preset is unknown. The message names the TOML path.
        MoetraceError: A file cannot be read.

    Examples:
        >>> import moetrace as mt
        >>> mt.load_model("mixtral-8x7b", {"weight_bits": 4}).weight_bits
        4.0
    """
    if isinstance(source, str | Path) and is_model_file(source):
        loaded = overridden(read_model_file(source), overrides or {})
        _check_bits_known(loaded)
    else:
        loaded = read("models", source, overrides or {})
    without_defaults(loaded.raw)
    model = convert(loaded, Model)
    _check_layers(model, loaded)
    _check_weight_bits(model, loaded)
    if model.shared_params_per_layer is not UNSET and model.shared_params_per_layer > model.dense_params_per_layer:
        loaded.refuse("shared_params_per_layer", f"at most dense_params_per_layer = {model.dense_params_per_layer}")
    return model


def check_shape(where: str, layers: int, experts: int, model: Model) -> None:
    """Raise a UsageError that begins with `where` unless the model has these numbers of MoE layers and experts."""
    if (layers, experts) != (model.moe_layers, model.most_experts):
        raise UsageError(
            f"{where} has {layers} MoE layers of {experts} experts, but the model {model.name} has {model.moe_layers} "
            f"of {model.most_experts}: name the right one with --model."
        )


def _check_layers(model: Model, loaded: Loaded) -> None:
    """Lists with a number for each layer, and in no layer a larger top_k than it has experts."""
    for field, value in (("experts", model.experts), ("top_k", model.top_k)):
        if isinstance(value, list) and len(value) != model.moe_layers:
            raise UsageError(
                f"{loaded.where}: {field} wants one number for each of the {model.moe_layers} MoE layers, "
                f"got {len(value)} numbers."
            )
    if isinstance(model.experts, int) and isinstance(model.top_k, int):
        if model.top_k > model.experts:
            loaded.refuse("top_k", f"at most the {model.experts} experts that a layer has")
        return
    for layer, (experts, top_k) in enumerate(zip(model.layer_experts, model.layer_top_k, strict=True)):
        if top_k > experts:
            raise UsageError(
                f"{loaded.where}: top_k wants at most the {experts} experts that MoE layer {layer} has, got {top_k}."
            )


def _check_bits_known(loaded: Loaded) -> None:
    """Refuse a quantized model whose bits no file says: a width of 16 bits would be wrong in silence."""
    for field in ("weight_bits", "dense_weight_bits"):
        if field not in loaded.raw:
            raise UsageError(
                f"{loaded.where}: the model {loaded.raw.get('name')} is quantized, but its files do not say to how "
                f"many bits: give --set model.{field}=BITS."
            )


def _check_weight_bits(model: Model, loaded: Loaded) -> None:
    """A width for every layer or expert, each in the range, and none so small that an expert weighs nothing."""
    bits = model.weight_bits
    if isinstance(bits, list) and len(bits) != model.moe_layers:
        raise UsageError(
            f"{loaded.where}: weight_bits wants one number for each of the {model.moe_layers} MoE layers, "
            f"got {len(bits)} numbers."
        )
    _check_expert_bits(model, loaded)
    where = bits if isinstance(bits, str) else loaded.where
    widths = model.bits_of_experts()[model.has_expert]
    least, most = float(widths.min()), float(widths.max())
    if not (least >= MIN_BITS and most <= MAX_BITS):
        got = most if least >= MIN_BITS else least
        wants = "an average from" if isinstance(bits, WeightBits) else "numbers from"
        raise UsageError(f"{where}: weight_bits wants {wants} {MIN_BITS:g} to {MAX_BITS}, got {got:g}.")
    if float(model.expert_params) * least < 8:
        raise UsageError(
            f"{where}: weight_bits wants at least one byte for the {model.expert_params} weights of an expert, "
            f"got {least:g}."
        )


def _check_expert_bits(model: Model, loaded: Loaded) -> None:
    """Bits of single experts, codebooks and sparse starts only where `weight_bits` is what they go with."""
    bits, own = model.weight_bits, None
    if model.expert_bits is not UNSET:
        if isinstance(bits, str):
            raise UsageError(
                f"{loaded.where}: expert_bits wants weight_bits to be a number, a list or a table, got a file, which "
                f"already has a number for each expert: remove one of the two."
            )
        own = read_expert_bits(model.expert_bits, model.layer_experts)
    if isinstance(bits, WeightBits):
        check_read(bits, model.sparse_launches is not UNSET, loaded.where)
        check_codebook_bits(bits, own, loaded.where, model.expert_bits)
    elif model.sparse_launches is not UNSET:
        raise UsageError(
            f"{loaded.where}: sparse_launches wants weight_bits to be a table with sparse: set weight_bits.sparse."
        )
