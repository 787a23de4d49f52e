"""Ids that no router can have chosen, and rows that no trace can have: all of them, not only the first."""

from collections.abc import Iterator

import numpy as np

from moetrace.lints.finding import Finding, Ranges, finding, many
from moetrace.lints.piece import Piece, Shape
from moetrace.trace.schema import DECODE, MIXED, NOT_RECORDED, PREFETCHED

_PAIRS_UP_TO = 32  # top_k from which sorting beats comparing all pairs of slots


class ImpossibleIds:
    """`impossible-id`: ids of the number of experts or more that don't mean absent."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.cells = np.zeros(shape.layers, np.int64)
        self.rows = Ranges()

    def see(self, piece: Piece) -> None:
        """Look at the next rows."""
        fewest = int(self.shape.experts.min())
        if piece.experts.max() < fewest:
            return
        most = self.shape.num_experts if fewest == self.shape.num_experts else self.shape.experts
        wrong = ((piece.slots >= most) & (piece.slots != self.shape.absent)).any(0)
        if wrong.any():
            self.cells += np.count_nonzero(wrong, axis=0)
            self.rows.add_mask(piece.first_row, wrong.any(1))

    def findings(self) -> Iterator[Finding]:
        """The findings."""
        count = int(self.cells.sum())
        if count:
            layers = self.shape.layer_index[self.cells > 0]
            what = f"Ids of {self.shape.num_experts} or above stand in {many(count, 'cell')}."
            if self.shape.experts.min() < self.shape.num_experts:
                what = f"Ids beyond the layer's own experts stand in {many(count, 'cell')}."
            yield finding("impossible-id", what, count, layers, self.rows)


class DuplicateIds:
    """`duplicate-ids`: cells that hold an id twice, except in layers in which every cell is all zeros (dense ones)."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.cells = np.zeros(shape.layers, np.int64)
        self.zero_cells = np.zeros(shape.layers, np.int64)  # of all zeros
        self.made = np.zeros(shape.layers, np.int64)  # cells with any id
        self.zero_until = np.full(shape.layers, -1)  # row until which all cells with ids were zeros
        self.rows = Ranges()

    def see(self, piece: Piece) -> None:
        """Look at the next rows."""
        if self.shape.top_k == 1:
            return
        all_absent = piece.missing == self.shape.top_k if piece.missing is not None else None
        self.made += piece.rows - (0 if all_absent is None else np.count_nonzero(all_absent, axis=0))
        twice = _holds_twice(piece.slots, self.shape.absent)
        if twice.any():
            self.cells += np.count_nonzero(twice, axis=0)
            self.zero_cells += np.count_nonzero(np.maximum.reduce(piece.slots, axis=0) == 0, axis=0)
        ended = (self.zero_until < 0) & (self.zero_cells < self.made)
        self.zero_until[ended] = piece.first_row
        open_layers = self.zero_until >= 0
        if twice.any():
            self.rows.add_mask(piece.first_row, twice[:, open_layers].any(1))

    def zero_layers(self) -> np.ndarray:
        """bool [layers]: every choice is of zeros only, which is how engines fill layers without a router."""
        return (self.zero_cells == self.made) & (self.made > 0)

    def findings(self) -> Iterator[Finding]:
        """The findings."""
        wrong = (self.cells > 0) & ~self.zero_layers()
        count = int(self.cells[wrong].sum())
        if not count:
            return
        before = self.zero_until[wrong].max()  # up to this row a layer held only zeros
        rows = Ranges()
        if before > 0:
            rows.add(0, int(before))
        for start, stop in self.rows.ranges:
            rows.add(start, stop)
        zeros = int(self.zero_cells[wrong].sum())
        padding = f", {zeros:,} of them zeros only (padding)" if zeros else ""
        what = f"An expert stands twice or more in {many(count, 'cell')}{padding}."
        yield finding("duplicate-ids", what, count, self.shape.layer_index[wrong], rows)


class ImpossibleRows:
    """`impossible-row`: negative requests or positions, and phases or recorded residencies that don't exist."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.counts: dict[str, int] = {}
        self.rows = Ranges()

    def see(self, piece: Piece) -> None:
        """Look at the next rows."""
        wrong = {
            "negative requests": piece.request < 0,
            "negative positions": piece.position < 0,
            "phases that are not those of the step": (piece.phase > DECODE)
            | ((piece.phase != piece.step_phase) & (piece.step_phase != MIXED)),
        }
        if piece.recorded is not None and piece.recorded.max() > PREFETCHED:
            odd = piece.recorded > PREFETCHED
            odd &= ~((piece.recorded == NOT_RECORDED) & (piece.experts == self.shape.absent))
            wrong["recorded residencies that are not 0, 1 or 2"] = odd.any((1, 2))
        for what, mask in wrong.items():
            if count := int(np.count_nonzero(mask)):
                self.counts[what] = self.counts.get(what, 0) + count
        any_wrong = np.logical_or.reduce(list(wrong.values()))
        if any_wrong.any():
            self.rows.add_mask(piece.first_row, any_wrong)

    def findings(self) -> Iterator[Finding]:
        """The findings."""
        if self.counts:
            parts = [f"{what} in {many(count, 'row')}" for what, count in self.counts.items()]
            yield finding(
                "impossible-row", f"There are {', '.join(parts)}.", sum(self.counts.values()), None, self.rows
            )


def _holds_twice(slots: np.ndarray, absent: int) -> np.ndarray:
    """bool [rows, layers]: cells of `slots` [top_k, rows, layers] with an id more than once, absent ones aside."""
    if len(slots) > _PAIRS_UP_TO:
        ordered = np.sort(slots, axis=0)
        return ((ordered[1:] == ordered[:-1]) & (ordered[1:] != absent)).any(0)
    twice, equal = np.zeros(slots.shape[1:], bool), np.empty(slots.shape[1:], bool)
    some_absent = slots.max() == absent
    for one in range(len(slots)):
        for other in range(one):
            np.equal(slots[one], slots[other], out=equal)
            if some_absent:
                equal &= slots[one] != absent
            twice |= equal
    return twice
