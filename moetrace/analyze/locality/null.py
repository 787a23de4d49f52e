"""Shuffles: what a statistic would be if time, or the request, did not matter.

Each `turn` of a seed is another shuffle: of few rows one is not enough.
"""

import numpy as np


def within_requests(first: np.ndarray, seed: int, turn: int = 0) -> np.ndarray:
    """Return an order, int32 [n], that shuffles the rows of each request among themselves.

    `first` int [n] is equal for the rows of a request and increases from one to the next.
    """
    noise = np.random.default_rng((seed, 1, turn)).random(first.size)
    return np.lexsort((noise, first)).astype(np.int32)


def globally(first: np.ndarray, seed: int, turn: int = 0) -> np.ndarray:
    """Return an order, int32 [n], that shuffles all rows."""
    return np.random.default_rng((seed, 2, turn)).permutation(first.size).astype(np.int32)
