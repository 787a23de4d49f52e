"""Layers that stand still for a while, as if nothing had been recorded there, though others go on."""

from collections.abc import Iterator
from math import log

import numpy as np

from moetrace.lints.finding import Finding, Ranges, finding
from moetrace.lints.layers import LEAST_ROWS
from moetrace.lints.piece import Piece, Shape

_BLOCK = LEAST_ROWS // 2  # a run of 32 rows holds such a block that begins at a multiple of it
_FEW = 0.25  # of the rows: a run in fewer than half of the layers, where the same words make equal choices
_LOG_CHANCE = log(1e-6)


class StuckLayers:
    """`stuck-layer`: 32 rows or more that choose alike in a layer, but not in all.

    In half of the layers or more any such run counts, in fewer one that has a quarter of the rows: first layers may
    choose only by the token, so that a repeated word makes runs there.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.open = np.zeros(shape.layers, np.int64)  # rows of the run that each layer ends with, 0 if none is known
        self.longest = np.zeros(shape.layers, np.int64)
        self.stop = np.zeros(shape.layers, np.int64)  # row behind the longest run
        self.last: np.ndarray | None = None  # ids of the last row
        self.equal = np.zeros(shape.layers, np.int64)

    def see(self, piece: Piece, equal: np.ndarray) -> None:
        """Look at the next rows; `equal` bool [rows - 1, layers] says which cells are those of the row before."""
        whole = len(equal) // _BLOCK * _BLOCK
        blocks = equal[:whole].reshape(-1, _BLOCK, self.shape.layers)
        first = np.zeros(self.shape.layers, bool) if self.last is None else (piece.experts[0] == self.last).all(1)
        long = blocks.all(1).any(0) | (first & (self.open > 0))
        if len(equal):
            long |= equal[-1]  # a run may have begun
        self.equal += np.count_nonzero(equal, axis=0)
        self.last = piece.experts[-1].copy()
        for layer in np.flatnonzero(long).tolist():
            same = np.r_[first[layer], equal[:, layer]]
            if piece.missing is not None:
                same &= piece.missing[:, layer] < self.shape.top_k
            breaks = np.flatnonzero(~same)
            starts = piece.first_row + np.r_[-self.open[layer] if same[0] else breaks[:0], breaks].astype(np.int64)
            lengths = np.diff(starts, append=piece.first_row + piece.rows)
            most = int(lengths.argmax())
            if lengths[most] > self.longest[layer]:
                self.longest[layer], self.stop[layer] = lengths[most], starts[most] + lengths[most]
            self.open[layer] = lengths[-1]
        self.open[~long] = 0

    def findings(self, without: np.ndarray, repeated: int) -> Iterator[Finding]:
        """The findings in layers other than `without` [layers]; `repeated` rows are in runs in all layers."""
        layers = np.count_nonzero(~without)
        goes_on = (self.equal - self.longest + 1).clip(1) / np.maximum(self.shape.rows - self.longest + 2, 1)
        log_chance = log(self.shape.rows) + (self.longest - 1) * np.log(np.minimum(goes_on, 0.995))
        runs = ~without & (self.longest >= LEAST_ROWS) & (log_chance <= _LOG_CHANCE)
        if layers:  # as all layers do, and a few rows more by chance
            runs &= self.longest >= max(repeated, int(self.longest[~without].min())) + LEAST_ROWS
        few = runs & (self.longest >= _FEW * self.shape.rows)
        stuck = runs if 2 * np.count_nonzero(runs) >= layers else few
        count = int(np.count_nonzero(stuck))
        if not count or count == layers or self.shape.top_k == self.shape.num_experts or layers < 2:
            return
        rows, most = Ranges(), int(self.longest[stuck].max())
        for start, stop in sorted(
            zip((self.stop - self.longest)[stuck].tolist(), self.stop[stuck].tolist(), strict=True)
        ):
            rows.add(start, stop)
        what = f"In {count} of {layers} layers, up to {most:,} successive rows choose alike, while other layers go on."
        yield finding("stuck-layer", what, most, self.shape.layer_index[stuck], rows)
