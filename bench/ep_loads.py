"""What falls on the busiest GPU of an expert-parallel group in the tables of NVIDIA's aisimulate.

A table says rows, experts and a name of the routing, and has the time of the GPU with most choices. Balanced routing
spreads choices over experts as evenly as they go. `power_law_A` draws each expert's popularity from a density x^-A
between 1 and 0.8 rows (between 0.01 and 2 where choices are at most as many as experts), scales all to the choices that
there are, rounds, and caps each at the rows. What is then missing (or too much) is dealt one by one to the GPUs in
turn, each time to its expert of fewest (from that of most) choices. GPUs hold experts in blocks. Draws and their seed
are not in the table, so that loads are means over draws of ours.
"""

import numpy as np

DRAWS = 64


def busiest(experts: int, top_k: int, rows: int, gpus: int, distribution: str) -> tuple[float, float]:
    """Return how many experts of the busiest GPU have rows, and how many choices fall on them.

    Args:
        experts: Experts of the layer, a multiple of `gpus`.
        top_k: Choices of a row.
        rows: Rows of all GPUs together.
        gpus: GPUs that hold the layer's experts.
        distribution: `balanced`, or `power_law_` and its exponent.
    """
    if distribution == "balanced":
        counts = _balanced(experts, top_k, rows)[None]
    else:
        counts = _power_law(experts, top_k, rows, gpus, float(distribution.removeprefix("power_law_")))
    counts = counts.reshape(-1, gpus, experts // gpus)
    most = counts[np.arange(len(counts)), counts.sum(axis=2).argmax(axis=1)]
    return float((most > 0).sum(axis=1).mean()), float(most.sum(axis=1).mean())


def _balanced(experts: int, top_k: int, rows: int) -> np.ndarray:
    """Choices of each expert `[experts]`: a row's experts are a stride apart, and rows follow each other."""
    stride = -(-experts // top_k)
    first = np.arange(rows) if rows >= stride else np.arange(rows) * stride // rows
    chosen = (first[:, None] + stride * np.arange(top_k)) % experts
    return np.bincount(chosen.reshape(-1), minlength=experts)


def _power_law(experts: int, top_k: int, rows: int, gpus: int, exponent: float) -> np.ndarray:
    """Choices of each expert `[DRAWS, gpus, experts / gpus]`."""
    least, most = (1.0, 0.8 * rows) if rows * top_k > experts else (0.01, 2.0)
    power = 1 - exponent
    drawn = np.random.default_rng(0).random((DRAWS, experts))
    popular = ((most**power - least**power) * drawn + least**power) ** (1 / power)
    scaled = np.round(popular / popular.sum(axis=1, keepdims=True) * rows * top_k).astype(np.int64)
    counts = np.minimum(scaled, rows).reshape(DRAWS, gpus, -1)
    counts = _dealt(counts, rows * top_k, rows)
    return rows - _dealt(rows - counts, rows * (experts - top_k), rows)  # what is too much, seen from the other side


def _dealt(counts: np.ndarray, wanted: int, most: int) -> np.ndarray:
    """Deal to the GPUs in turn, to each one's lowest count, until all sum to `wanted`; no count passes `most`."""
    while True:
        missing = np.maximum(wanted - counts.sum(axis=(1, 2)), 0)[:, None]
        if not missing.any():
            return counts
        room = (most - counts).sum(axis=2)
        takes = room > 0
        number, place = takes.sum(axis=1, keepdims=True), takes.cumsum(axis=1) - 1
        rounds = np.minimum(missing // number, np.where(takes, room, missing).min(axis=1, keepdims=True))
        counts = _raised(counts, takes * np.where(rounds > 0, rounds, place < missing))


def _raised(counts: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Add `units` `[...]` one by one to the lowest of `counts` `[..., n]`."""
    low, high = np.zeros_like(units), counts.max(axis=-1) + units + 1
    while (high - low > 1).any():  # the highest level that all can be raised to
        middle = (low + high) // 2
        enough = np.maximum(middle[..., None] - counts, 0).sum(axis=-1) <= units
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    level = np.maximum(counts, low[..., None])
    left = units - (level - counts).sum(axis=-1)
    lowest = level == low[..., None]
    return level + (lowest & (lowest.cumsum(axis=-1) <= left[..., None]))
