"""Write small GGUF files, whole or only as long as they say: no tensor's data is ever written."""

import struct
from pathlib import Path

import numpy as np

from moetrace.spec.model_files.bits import GGML_TYPES

NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}
A_KIND = {"F32": np.float32, "F16": np.float16}
Tensors = dict[str, tuple[tuple[int, ...], str]]  # name -> shape with the fastest axis first, type


def text(value: str) -> bytes:
    """A string of a GGUF file."""
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def header(tensors: int, facts: int, version: int = 3) -> bytes:
    """The first bytes of a GGUF file."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, facts)


def write_gguf(path: Path, architecture: str, tensors: Tensors, facts: dict) -> None:
    """Write the header of a file, and make the file as long as its tensors need; holes take no room on the disk."""
    facts = {"general.architecture": architecture} | facts
    data = header(len(tensors), len(facts))
    for key, value in facts.items():
        data += text(key) + _value(value)
    offset = 0
    for name, (shape, kind) in tensors.items():
        data += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, NUMBERS[kind], offset)
        offset += -(-_size(shape, kind) // 32) * 32
    with path.open("wb") as file:
        file.write(data)
        file.truncate(-(-len(data) // 32) * 32 + offset)


def _size(shape: tuple[int, ...], kind: str) -> int:
    block = GGML_TYPES[NUMBERS[kind]]
    return int(np.prod(shape)) // block.block * block.block_bytes


def _value(value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", 9, 6, value.size) + value.astype("<f4").tobytes()
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))


def moe_tensors(
    architecture: str,
    layers: list[dict[str, str]],
    first_dense: bool = False,
    experts: int = 8,
    hidden: int = 512,
    width: int = 256,
) -> tuple[Tensors, dict]:
    """Tensors and metadata of a model whose experts are Q4_K, but for the matrices that a layer names otherwise."""
    blocks = len(layers) + first_dense
    facts = {f"{architecture}.block_count": blocks, f"{architecture}.embedding_length": hidden}
    facts |= {f"{architecture}.expert_used_count": 2, f"{architecture}.attention.head_count": 8}
    latent = architecture == "deepseek2"
    if latent:
        facts |= {f"{architecture}.attention.kv_lora_rank": 64, f"{architecture}.rope.dimension_count": 32}
    else:
        facts |= {f"{architecture}.attention.head_count_kv": 2}
    tensors: Tensors = {"token_embd.weight": ((hidden, 1000), "Q4_K"), "output.weight": ((hidden, 1000), "Q6_K")}
    tensors["output_norm.weight"] = ((hidden,), "F32")
    inner = hidden // 2 if architecture == "nemotron_h_moe" else hidden
    for block in range(blocks):
        name = f"blk.{block}"
        tensors |= {f"{name}.attn_norm.weight": ((hidden,), "F32"), f"{name}.attn_q.weight": ((hidden, hidden), "Q4_K")}
        tensors[f"{name}.attn_output.weight"] = ((hidden, hidden), "Q4_K")
        if latent:
            tensors[f"{name}.attn_kv_a_mqa.weight"] = ((hidden, 96), "Q8_0")
        else:
            tensors |= {f"{name}.attn_{part}.weight": ((hidden, 128), "Q6_K") for part in "kv"}
        if first_dense and block == 0:
            shapes = {"gate": (hidden, 1024), "up": (hidden, 1024), "down": (1024, hidden)}
            tensors |= {f"{name}.ffn_{part}.weight": (shape, "Q4_K") for part, shape in shapes.items()}
            continue
        kinds = layers[block - first_dense]
        parts = ("up",) if architecture == "nemotron_h_moe" else ("gate", "up")
        for part in parts:
            tensors[f"{name}.ffn_{part}_exps.weight"] = ((inner, width, experts), kinds.get(part, "Q4_K"))
        tensors[f"{name}.ffn_down_exps.weight"] = ((width, inner, experts), kinds.get("down", "Q4_K"))
        tensors[f"{name}.ffn_gate_inp.weight"] = ((hidden, experts), "F32")
        if latent:
            shared = {"gate": (hidden, 512), "up": (hidden, 512), "down": (512, hidden)}
            tensors |= {f"{name}.ffn_{part}_shexp.weight": (shape, "Q4_K") for part, shape in shared.items()}
    return tensors, facts
