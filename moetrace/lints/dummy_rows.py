"""Rows that hold experts 0 to top_k - 1 in every layer: engines write them where no token was routed."""

from collections.abc import Iterator
from math import lgamma, log

import numpy as np

from moetrace.lints.finding import Finding, Ranges, finding, many
from moetrace.lints.piece import Piece, Shape

_LAYERS = 4  # in which other rows are looked at, to know how often a cell is 0 to top_k - 1 by chance
_LOG_CHANCE = log(1e-6)


class DummyRows:
    """`placeholder-rows`: rows of 0, 1, ..., top_k - 1 in all layers, more than chance makes.

    Chance is the product of the shares of cells, in four layers, that hold these ids in rows that are no placeholder:
    one layer tells nothing.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.layers = np.unique(np.linspace(0, shape.layers - 1, _LAYERS).round().astype(int))
        self.cells = np.zeros(self.layers.size, np.int64)
        self.count = 0
        self.rows = Ranges()

    def see(self, piece: Piece) -> None:
        """Look at the next rows."""
        if self.shape.top_k == self.shape.num_experts:
            return
        found = np.arange(piece.rows)
        for at, layer in enumerate(self.layers.tolist()):
            rows = np.flatnonzero(piece.slots[0, :, layer] == 0)
            for slot in range(1, self.shape.top_k):
                rows = rows[piece.slots[slot, rows, layer] == slot]
            self.cells[at] += rows.size
            found = np.intersect1d(found, rows, assume_unique=True)
        if found.size:
            every = np.arange(self.shape.top_k, dtype=piece.experts.dtype)
            found = found[(piece.experts[found] == every).all((1, 2))]
            self.count += found.size
            mask = np.zeros(piece.rows, bool)
            mask[found] = True
            self.rows.add_mask(piece.first_row, mask)

    def findings(self, without: np.ndarray) -> Iterator[Finding]:
        """The findings; a layer that is true in `without` [layers] is ignored."""
        others = self.shape.rows - self.count
        judged = ~without[self.layers]
        if not self.count or not others or np.count_nonzero(judged) < 2:
            return
        log_share = np.log((self.cells[judged] - self.count + 1) / (others + 2)).sum()
        if self.count * (log(self.shape.rows) + float(log_share)) - lgamma(self.count + 1) <= _LOG_CHANCE:
            last = self.shape.top_k - 1
            ids = "expert 0" if last == 0 else f"the experts 0 to {last}"
            what = f"{many(self.count, 'row')} chose {ids} in all layers."
            yield finding("placeholder-rows", what, self.count, None, self.rows)
