"""Read a model from the header of a GGUF file: its tensors say all sizes, its metadata only what runs and is cached."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from moetrace.spec.errors import MoetraceError, printable
from moetrace.spec.load import MAX_NAME
from moetrace.spec.model_files.anatomy import CACHE_BYTES, Anatomy, Layer, fields_of
from moetrace.spec.model_files.gguf_header import GgufHeader, Tensor, read_header
from moetrace.spec.model_files.json_fields import MAX_LAYERS, Fields

_BLOCK = re.compile(r"blk\.(\d{1,5})\.(.+)")
_EXPERTS = re.compile(r"ffn_(gate_up|gate|up|down)_exps\.(weight|bias|scale)")
_ONE_EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d{1,5})\.(weight|bias)")  # files of Mixtral before March 2024
_DENSE = re.compile(r"ffn_(gate|up|down)\.weight")
_CACHED = ("attn_k.weight", "attn_kv_a_mqa.weight", "attn_qkv.weight")


def read_gguf(path: Path) -> dict[str, Any]:
    """The fields of a `Model` from a GGUF file; of its bits, those of each layer's experts as they are stored.

    Raises:
        MoetraceError: The file is not a whole GGUF file, or not that of a MoE model.
    """
    header = read_header(path)
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise MoetraceError(f"Cannot read a MoE model from {path}: its general.architecture is missing.")
    prefix = f"{architecture}."
    inner = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    blocks = _blocks(header, Fields(str(path), inner, {}), path)
    if not any(block.experts for block in blocks):
        raise MoetraceError(f"Cannot read a MoE model from {path}: it is dense, none of its tensors is of experts.")
    fields = Fields(str(path), inner, {"expert_used_count": None})
    anatomy = _anatomy(header, blocks, fields)
    name = header.metadata.get("general.name")
    named = printable(name if isinstance(name, str) and name.strip() else path.stem).strip()[:MAX_NAME]
    return {"name": named or "unnamed"} | fields_of(anatomy, str(path)) | _bits(header, blocks, anatomy)


class _Block:
    """The tensors of one block, sorted by what they are for."""

    def __init__(self) -> None:
        self.matrices: dict[str, Tensor] = {}  # gate, up, down or gate_up -> all experts of it, or the first one
        self.experts = 0
        self.expert_bytes = 0
        self.parts: dict[str, list[Tensor]] = defaultdict(list)  # mixer, dense, shared, router
        self.cached = False
        self.recurrent = False

    def add(self, name: str, tensor: Tensor) -> None:
        """Put a tensor where it belongs; norms, biases and other vectors belong nowhere."""
        stacked, single = _EXPERTS.fullmatch(name), _ONE_EXPERT.fullmatch(name)
        self.cached |= name in _CACHED
        self.recurrent |= name.startswith(("ssm_", "shortconv.", "time_mix_"))
        if stacked or single:
            self.expert_bytes += tensor.size
            if stacked and stacked[2] == "weight" and len(tensor.shape) == 3:
                self.matrices[stacked[1]] = tensor
                self.experts = max(self.experts, tensor.shape[2])
            elif single and single[3] == "weight":
                self.matrices.setdefault(single[1], tensor)
                self.experts = max(self.experts, int(single[2]) + 1)
        elif len(tensor.shape) > 1 and "norm" not in name and not name.endswith(".bias"):
            self.parts[_part(name)].append(tensor)

    def params(self, part: str) -> int:
        """Weights of a part."""
        return sum(tensor.params for tensor in self.parts[part])


def _part(name: str) -> str:
    if "_shexp" in name or "_chexps" in name or "latent" in name:
        return "shared"
    if name == "ffn_gate_inp.weight":
        return "router"
    return "dense" if _DENSE.fullmatch(name) else "mixer"


def _blocks(header: GgufHeader, fields: Fields, path: Path) -> list[_Block]:
    """The blocks of the model, without those that predict further tokens."""
    count = fields.count("block_count") - fields.maybe("nextn_predict_layers")
    if not 1 <= count <= MAX_LAYERS:
        raise MoetraceError(f"Cannot read a MoE model from {path}: it says {count:,} blocks.")
    blocks = [_Block() for _ in range(count)]
    for tensor in header.tensors:
        found = _BLOCK.fullmatch(tensor.name)
        if found and int(found[1]) < count:
            blocks[int(found[1])].add(found[2], tensor)
    return blocks


def _anatomy(header: GgufHeader, blocks: list[_Block], fields: Fields) -> Anatomy:
    hidden, used = fields.count("embedding_length"), fields.get("expert_used_count")
    listed = isinstance(used, list) and fields.numbers("expert_used_count", len(blocks))
    layers = []
    for index, block in enumerate(blocks):
        kv_bytes = _kv_bytes(fields, index, len(blocks)) if block.cached and not block.recurrent else 0.0
        mixer, dense = block.params("mixer"), block.params("dense")
        if block.experts:  # a dense MLP beside the experts is a shared one
            top_k = listed[index] if listed else fields.count("expert_used_count")
            shared = block.params("shared") + dense
            layers.append(Layer(mixer, kv_bytes, 0, shared, block.params("router"), block.experts, top_k))
        else:
            layers.append(Layer(mixer, kv_bytes, dense + block.params("shared"), 0, block.params("router")))
    first = next(block for block in blocks if block.experts)
    width, matrices, moe_hidden = _expert(first, fields)
    for block in blocks:
        if block.experts and _expert(block, fields) != (width, matrices, moe_hidden):
            fields.refuse("the experts of its layers have different sizes")
    latent, head = moe_hidden if moe_hidden != hidden else None, _head(header)
    mtp_layers = None if fields.get("nextn_predict_layers") is None else fields.maybe("nextn_predict_layers")
    return Anatomy(layers, hidden, latent, width, matrices, head.params if head else 0, mtp_layers)


def _expert(block: _Block, fields: Fields) -> tuple[int, int, int]:
    """Intermediate size, matrices and width of the experts of a block."""
    shapes = {name: tensor.shape[:2] for name, tensor in block.matrices.items()}
    if "down" not in shapes or not ({"up", "gate_up"} & set(shapes)):
        fields.refuse("a layer of it has experts without ffn_up or ffn_down")
    width, hidden = shapes["down"]
    wide = {"gate_up": 2 * width}
    if any(shape != (hidden, wide.get(name, width)) for name, shape in shapes.items() if name != "down"):
        fields.refuse("the matrices of its experts do not fit each other")
    return width, len(shapes) + ("gate_up" in shapes), hidden


def _kv_bytes(fields: Fields, index: int, blocks: int) -> float:
    """Bytes of a token in the KV cache of a block; windows are not modelled."""
    if rank := fields.maybe("attention.kv_lora_rank"):
        return (rank + fields.count("rope.dimension_count")) * CACHE_BYTES
    heads = fields.count("attention.head_count") if not isinstance(fields.get("attention.head_count"), list) else 0
    per_layer = fields.get("attention.head_count_kv")
    if isinstance(per_layer, list):
        values = [value for value in per_layer if isinstance(value, int)]
        kv_heads = values[index] if len(values) == blocks else 0
    else:
        kv_heads = fields.maybe("attention.head_count_kv", default=heads)
    head_dim = fields.count("embedding_length") // heads if heads else 0
    key = fields.maybe("attention.key_length", default=head_dim)
    return kv_heads * (key + fields.maybe("attention.value_length", default=head_dim)) * CACHE_BYTES


def _head(header: GgufHeader) -> Tensor | None:
    """The LM head: a tensor of its own, or the embedding."""
    by_name = {tensor.name: tensor for tensor in header.tensors}
    return by_name.get("output.weight") or by_name.get("token_embd.weight")


def _bits(header: GgufHeader, blocks: list[_Block], anatomy: Anatomy) -> dict[str, Any]:
    """Bits of experts, layer by layer, and the mean bits of what else the model counts."""
    moe = [block for block in blocks if block.experts]
    bits = [8 * block.expert_bytes / (block.experts * anatomy.expert_params) for block in moe]
    first, counted = anatomy.first_dense, [head] if (head := _head(header)) else []
    for index, block in enumerate(blocks):
        parts = ("dense", "shared", "router") if index < first else ("mixer", "dense", "shared", "router")
        counted += [tensor for part in parts for tensor in block.parts[part]]
    params = sum(tensor.params for tensor in counted)
    return {
        "weight_bits": bits[0] if len(set(bits)) == 1 else bits,
        "dense_weight_bits": 8 * sum(tensor.size for tensor in counted) / params if params else 16,
    }
