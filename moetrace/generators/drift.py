"""Drift: which experts of a layer are popular turns over within a number of steps, while popularity keeps its shape.

Every expert has a score, and the expert of the r-th largest score of its layer has rank r. A score is the sum of the
latest `moves` of a sequence of independent random numbers, one for each move of popularity, so that the scores of two
steps correlate by max(0, 1 - distance / steps) (a moving average): experts rise and fall by a few ranks at a move, and
two steps that are `steps` or more apart have no number in common.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moetrace.jit.random import GOLDEN, mix_64
from moetrace.spec.errors import UsageError
from moetrace.trace.schema import expert_dtype

MOST_MOVES = 64  # in a turnover: each takes 17 us a layer of 256 experts, about as long as the draws of 170 rows
_STREAM = np.uint64(0xA0761D6478BD642F)  # apart from the streams of permutations and rows
_SHIFTS = np.arange(0, 64, 16, dtype=np.uint64)
_LOW_16 = np.uint64(0xFFFF)


class Drift:
    """The ranks of all experts in each step.

    `steps` is the number of steps in which popularity turns over. Integers decide everything: the same seed gives the
    same ranks everywhere.
    """

    def __init__(self, steps: int, seed: int, layers: int, experts: int) -> None:
        """Prepare the first step. Raises UsageError for an invalid number of steps."""
        if not 1 <= steps < 2**31:
            raise UsageError(f"drift is {steps}: give a whole number of steps from 1 to {2**31 - 1}, or leave it out.")
        self._steps, self._moves = steps, min(steps, MOST_MOVES)
        self._cells = np.arange(layers * experts, dtype=np.uint64).reshape(layers, experts)
        self._start = mix_64(np.full(1, ~np.uint64(seed) ^ _STREAM))
        self._move = 0
        self._scores = sum((self._numbers(move) for move in range(self._moves)), np.zeros(self._cells.shape, np.int64))

    def expert_of_rank(self, move: int) -> np.ndarray:
        """Return which expert has each rank after a number of moves, which never falls, uint8 or uint16 [L, E]."""
        while self._move < move:
            self._scores += self._numbers(self._move + self._moves) - self._numbers(self._move)
            self._move += 1
        return np.argsort(-self._scores, axis=1, kind="stable").astype(expert_dtype(self._cells.shape[1]))

    def parts(self, first: int, step_rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the rows between two moves, and `expert_of_rank` there, for steps from `first` on, int64 [steps]."""
        move_of_step = (first + np.arange(len(step_rows))) * self._moves // self._steps
        end = np.cumsum(step_rows)
        begin = 0
        for move in np.unique(move_of_step).tolist():
            stop = int(end[np.searchsorted(move_of_step, move, "right") - 1])
            yield slice(begin, stop), self.expert_of_rank(move)
            begin = stop

    def _numbers(self, move: int) -> np.ndarray:
        """Return an almost normal number of each expert, int64 [layers, experts]: the sum of four of 16 bits."""
        with np.errstate(over="ignore"):
            bits = mix_64(self._start + (np.uint64(move * self._cells.size % 2**64) + self._cells) * GOLDEN)
        return ((bits[..., None] >> _SHIFTS) & _LOW_16).sum(axis=-1).astype(np.int64)
