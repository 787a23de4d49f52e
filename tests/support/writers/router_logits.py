"""Logits of routers, as Transformers returns them and users keep them, and slow rules that choose from them."""

import importlib.util
import math
from pathlib import Path

import numpy as np

from support.writers import Sample

ROWS, LAYERS, EXPERTS, TOP_K = 7, 3, 8, 2


def logits(rows: int = ROWS, layers: int = LAYERS, experts: int = EXPERTS, seed: int = 0) -> np.ndarray:
    """float32 [rows, layers, experts], rounded so that some are equal."""
    made = np.random.default_rng(seed).normal(0, 2, (rows, layers, experts))
    return np.round(made, 1).astype(np.float32)


def by_hand(
    row: list[float],
    score: str,
    top_k: int,
    *,
    norm: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    kept: int = 1,
    bias: list[float] | None = None,
) -> tuple[list[int], list[float]]:
    """Ids and gates of one row in one layer, by plain loops."""
    if score == "softmax":
        total = math.fsum(math.exp(value - max(row)) for value in row)
        scores = [math.exp(value - max(row)) / total for value in row]
    else:
        scores = [1 / (1 + math.exp(-value)) for value in row]
    wanted = list(row) if bias is None and groups == 1 else scores
    wanted = [one + other for one, other in zip(wanted, bias or [0.0] * len(row), strict=True)]
    size = len(row) // groups
    goodness = []
    for group in range(groups):
        members = sorted(wanted[group * size : (group + 1) * size], reverse=True)
        goodness.append(members[0] if score == "softmax" or size == 1 else members[0] + members[1])
    best = sorted(range(groups), key=lambda group: (-goodness[group], group))[:kept]
    allowed = [expert for expert in range(len(row)) if expert // size in best]
    ids = sorted(allowed, key=lambda expert: (-wanted[expert], expert))[:top_k]
    gates = [scores[expert] for expert in ids]
    if norm:
        gates = [gate / math.fsum(gates) for gate in gates]
    return ids, [gate * scale for gate in gates]


def samples(folder: Path) -> list[Sample]:
    made = logits()
    np.save(folder / "logits.npy", made)
    for layer in (1, 4):
        np.save(folder / f"layer_{layer}.npy", made[:, layer % 3].astype(np.float16))
    np.savez(folder / "whole.npz", router_logits=made)
    np.savez_compressed(folder / "layers.npz", **{f"layer{layer}": made[:, layer] for layer in range(LAYERS)})
    files = [[folder / "logits.npy"], [folder / "layer_1.npy", folder / "layer_4.npy"]]
    files += [[folder / "whole.npz"], [folder / "layers.npz"]]
    if importlib.util.find_spec("torch"):
        import torch

        parts = [torch.tensor(made[:, layer]) for layer in range(LAYERS)]
        for name, value in (
            ("tuple", tuple(parts)),
            ("list", [part.bfloat16() for part in parts]),
            ("four", (*parts, parts[0])),
            ("tensor", torch.tensor(made)),
        ):
            torch.save(value, folder / f"{name}.pt")
            files.append([folder / f"{name}.pt"])
    if importlib.util.find_spec("safetensors"):
        from safetensors.numpy import save_file

        save_file({"router_logits": made}, folder / "whole.safetensors")
        save_file({f"router_logits.{n}": made[:, n].copy() for n in range(LAYERS)}, folder / "layers.safetensors")
        files += [[folder / "whole.safetensors"], [folder / "layers.safetensors"]]
    hints = {"top_k": TOP_K, "router": "softmax,norm"}
    rules = ["softmax,norm", "sigmoid,groups=4:2,scale=2.5"]
    return [Sample(paths, hints | {"router": rules[number % 2]}) for number, paths in enumerate(files)]
