"""What the oracle's experts weigh (timing model, section 1): bits of a weight, and what is stored beside it."""

from pathlib import Path
from typing import Any

import numpy as np


def expert_bytes(trace: Any, model: Any) -> np.ndarray:
    """Return W, float [L, E]: the trace's own sizes if it has them, else from the model's weight bits."""
    shape = (model.moe_layers, most(model.experts))
    if trace.expert_bytes is not None:
        given = np.asarray(trace.expert_bytes, dtype=float)
        return np.broadcast_to(given[:, None] if given.ndim == 1 else given, shape)
    bits, table = model.weight_bits, None
    if isinstance(bits, str | Path):
        bits = np.loadtxt(bits, delimiter=",", ndmin=2)
    elif isinstance(bits, list | tuple):
        bits = np.asarray(bits, dtype=float)[:, None]
    elif not isinstance(bits, int | float):
        table, bits = bits, bits.bits
    w = np.array(np.broadcast_to(np.asarray(bits, dtype=float), shape))
    for layer, expert, own in own_bits(model):
        w[layer, expert] = own
    if table is not None:
        w = np.vectorize(lambda b: stored_bits(table, b, model))(w)
    w = w / 8
    sizes = model.expert_matrices * expert_width(model) * model.expert_intermediate * w
    if isinstance(model.experts, list):
        for layer, count in enumerate(model.experts):
            sizes[layer, count:] = 0.0
    return sizes


def own_bits(model: Any) -> list[tuple[int, int, float]]:
    """Return layer, expert and bits of those that the model names one by one."""
    path = getattr(model, "expert_bits", None)
    if not isinstance(path, str | Path):
        return []
    lines = [line.split(",") for line in Path(path).read_text().splitlines() if not line.startswith("layer")]
    return [(int(layer), int(expert), float(bits)) for layer, expert, bits in lines]


def stored_bits(table: Any, b: float, model: Any) -> float:
    """Return what a weight of b bits takes with its codebooks, what is kept apart, and its scales."""
    h, inner, m = expert_width(model), model.expert_intermediate, model.expert_matrices
    outputs = {1: h, 2: inner + h, 3: 2 * inner + h}[m]  # one codebook each
    bits = b + table.codebook_bits * 2**b * outputs / (m * h * inner)
    bits += table.sparse * (table.sparse_value_bits + table.index_bits)
    return bits + table.scale_bits / table.group if table.group else bits


def sparse_starts(model: Any) -> float:
    """Return the starts of what is kept apart, if anything is."""
    starts = getattr(model, "sparse_launches", None)
    return starts if isinstance(starts, int | float) and getattr(model.weight_bits, "sparse", 0) > 0 else 0.0


def expert_width(model: Any) -> int:
    """Return the width in which experts work: that of the rows, unless the model says another."""
    width = getattr(model, "moe_hidden", None)
    return width if isinstance(width, int) else model.hidden


def most(numbers: int | list[int]) -> int:
    """Return a number that may be said for each layer: the largest."""
    return max(numbers) if isinstance(numbers, list) else numbers
