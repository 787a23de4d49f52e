"""Files as engines write them, made from routing that a test knows: one module a format, for its tests and the fuzzer.

Each module has `samples(folder)`, which writes some small ones.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Sample(NamedTuple):
    """Files that belong to one import, and the hints that it needs (by name, of `Hints`)."""

    files: list[Path]
    hints: dict[str, Any] = {}  # noqa: RUF012 - not changed


def routing(rows: int, layers: int, top_k: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """Ids int64 [rows, layers, top_k], none twice in a cell."""
    random = np.random.default_rng(seed)
    return np.argsort(random.random((rows, layers, num_experts)), axis=-1)[..., :top_k]
