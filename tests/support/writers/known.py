"""A known trace, as lists of passes, from which the writers of line formats write."""

from typing import NamedTuple

import numpy as np

from support.writers import routing


class Pass(NamedTuple):
    """One pass through the layers: ids [rows, layers, top_k], -1 where a layer (the last) leaves a row out."""

    ids: np.ndarray
    prefill: bool


def passes(rows: list[int], layers: int, top_k: int, num_experts: int, seed: int = 0) -> list[Pass]:
    """Passes of so many rows each; of a prefill (more rows than one), the last layer routes the last row only."""
    ids = routing(sum(rows), layers, top_k, num_experts, seed)
    found = [Pass(part, len(part) > 1) for part in np.split(ids, np.cumsum(rows)[:-1])]
    for one in found:
        if one.prefill:
            one.ids[:-1, -1] = -1
    return found


def joined(passes: list[Pass], num_experts: int) -> np.ndarray:
    """The ids [rows, layers, top_k] that a trace should hold."""
    ids = np.concatenate([one.ids for one in passes])
    return np.where(ids < 0, 255 if num_experts <= 255 else 65535, ids)
