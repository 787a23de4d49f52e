"""Importance matrices of llama.cpp, as `moetrace.importers.imatrix` describes them."""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from support.gguf_files import header, text
from support.writers import Sample

WIDTH = 4  # of the sums of each expert


def tensors_of(counts: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of an importance matrix, of counts [experts] by layer: those of experts, and of attention."""
    found: dict[str, np.ndarray] = {}
    for layer, own in counts.items():
        for matrix in ("gate", "up", "down"):
            name = f"blk.{layer}.ffn_{matrix}_exps.weight"
            found |= {f"{name}.in_sum2": np.ones((own.size, WIDTH)), f"{name}.counts": own[:, None]}
        found |= {f"blk.{layer}.attn_q.weight.in_sum2": np.ones((1, WIDTH))}
        found |= {f"blk.{layer}.attn_q.weight.counts": np.array([[own.sum()]])}
    return found


def imatrix(path: Path, tensors: Mapping[str, np.ndarray], kind: int = 0, version: int = 3) -> Path:
    """Write the file, of arrays [rows, columns], as llama-imatrix lays it out; `kind` 0 is float32."""
    facts = text("general.type") + struct.pack("<I", 8) + text("imatrix")
    facts += text("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 1) + text("wiki.txt")
    facts += text("imatrix.chunk_count") + struct.pack("<II", 4, 7)
    facts += text("imatrix.chunk_size") + struct.pack("<II", 4, 512)
    infos, data = b"", b""
    for name, array in tensors.items():
        infos += text(name) + struct.pack("<IQQIQ", 2, array.shape[1], array.shape[0], kind, len(data))
        data += array.astype("<f4").tobytes()
        data += bytes(-len(data) % 32)
    before = header(len(tensors), 4, version) + facts + infos
    path.write_bytes(before + bytes(-len(before) % 32) + data)
    return path


def older(path: Path) -> Path:
    """A file of the older binary form: name, calls and sums of each matrix; the last chunk; the text's name."""
    name = b"blk.0.ffn_up_exps.weight"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii", 3, 16) + np.ones(16, "<f4").tobytes()
    path.write_bytes(struct.pack("<i", 1) + entry + struct.pack("<ii", 3, 8) + b"wiki.txt")
    return path


def samples(folder: Path) -> list[Sample]:
    random = np.random.default_rng(0)
    counts = {layer: random.integers(0, 99, 8) for layer in (1, 2, 5)}
    return [Sample([imatrix(folder / "a.imatrix.gguf", tensors_of(counts))], {"top_k": 2})]
