"""Numbers that stand for what a row chose: equal for equal choices, and else different except in one case in 2**40."""

import numpy as np

from moetrace.jit.random import GOLDEN, mix_64
from moetrace.lints.piece import Piece

_WEIGHTS_AT_ONCE = 1 << 16


def row_digests(piece: Piece) -> np.ndarray:
    """uint64 [rows]: a multilinear hash of the ids of each row, in the order of their slots."""
    flat = np.ascontiguousarray(piece.experts).reshape(piece.rows, -1).view(np.uint8)
    if odd := -flat.shape[1] % 8:
        flat = np.pad(flat, ((0, 0), (0, odd)))
    words = flat.view(np.uint64)
    total = np.zeros(piece.rows, np.uint64)
    for start in range(0, words.shape[1], _WEIGHTS_AT_ONCE):
        part = words[:, start : start + _WEIGHTS_AT_ONCE]
        weights = np.arange(start + 1, start + 1 + part.shape[1], dtype=np.uint64) * GOLDEN
        # A product loses what differs in high bits only, so these count in low bits too.
        total += np.einsum("ij,j->i", part ^ (part >> np.uint64(32)), mix_64(weights) | np.uint64(1))
    return mix_64(total)
