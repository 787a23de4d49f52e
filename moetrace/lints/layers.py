"""Layers that did not route, or not every row: dense ones, the last layer of a llama.cpp prompt, padding."""

from collections.abc import Iterator

import numpy as np

from moetrace.lints.finding import Finding, Ranges, finding, many
from moetrace.lints.piece import Piece, Shape
from moetrace.trace.schema import PREFILL

# In captured layers at most 26 successive rows chose alike, and in none more than 17 % of the rows did.
LEAST_ROWS = 32
_CHANCE = 1e-6


class DenseLayers:
    """`dense-layer`: layers without any choice, with the same one in every row, or with zeros only."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.first = np.zeros((shape.layers, shape.top_k), np.uint16)  # the first choice of each layer
        self.made = np.zeros(shape.layers, np.int64)  # cells with any id, as long as all are equal
        self.constant = np.ones(shape.layers, bool)
        self.equal = np.zeros(shape.layers, np.int64)  # cells that are equal to the one of the row before
        self.pairs = 0

    def see(self, piece: Piece) -> np.ndarray:
        """Look at the next rows; return which cells are those of the row before, bool [rows - 1, layers]."""
        equal = piece.slots[0, 1:] == piece.slots[0, :-1]
        for slot in piece.slots[1:]:
            equal &= slot[1:] == slot[:-1]
        self.equal += np.count_nonzero(equal, axis=0)
        self.pairs += piece.rows - 1
        for layer in np.flatnonzero(self.constant):
            ids = piece.experts[:, layer]
            if piece.missing is not None:
                ids = ids[piece.missing[:, layer] < self.shape.top_k]
            if len(ids) == 0:
                continue
            if self.made[layer] == 0:
                self.first[layer] = ids[0]
            self.made[layer] += len(ids)
            self.constant[layer] = bool((ids == self.first[layer]).all())
        return equal

    def dense(self, zero_layers: np.ndarray) -> np.ndarray:
        """bool [layers]: the dense ones; `zero_layers` are those of `DuplicateIds`.

        A trace whose layers all stand still has another ailment (`repeated-rows`). Too few rows show nothing: the
        number must be so large that equal choices have a probability of at most 1e-6, judged by the steadiest of the
        other layers.
        """
        still = self.constant & (self.made >= LEAST_ROWS)
        goes_on = self.equal[~self.constant].max(initial=0) / max(self.pairs, 1)
        still &= self.shape.layers * goes_on ** np.maximum(self.made - 1, 0) <= _CHANCE
        if self.shape.top_k == self.shape.num_experts or still.all():
            still[:] = False
        return (self.constant & (self.made == 0)) | zero_layers | still

    def findings(self, zero_layers: np.ndarray) -> Iterator[Finding]:
        """The findings."""
        dense = self.dense(zero_layers)
        count = int(np.count_nonzero(dense))
        if not count:
            return
        none = int(np.count_nonzero(dense & (self.made == 0)))
        zeros = int(np.count_nonzero(dense & (self.made > 0) & (self.first[:, 0] == 0) & (self.first.max(1) == 0)))
        parts = [(none, "without any choice"), (zeros, "of zeros only")]
        parts.append((count - none - zeros, "with the same choice in every row"))
        said = ", ".join(f"{number} {what}" for number, what in parts if number)
        what = f"{count} of {self.shape.layers} layers did not route: {said}."
        effect = None
        if (dense & zero_layers).any():
            effect = "A dense layer has no router, and zeros as its ids are no choice: a replay refuses the trace."
        yield finding("dense-layer", what, count, self.shape.layer_index[dense], None, effect)


class AbsentRows:
    """Choices that are not there: `empty-rows`, `absent-rows`, `unequal-layers`, `skipped-layers`; and single ids."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.empty = 0  # rows without a choice in any layer
        self.absent = np.zeros(shape.layers, np.int64)  # of other rows, cells without a choice
        self.last_of_prefill = 0  # of those, in the last layer and in prefill rows
        self.partial = np.zeros(shape.top_k, np.int64)  # cells by how many of their ids are missing
        self.most_missing = np.zeros(shape.layers, np.int64)  # in a cell that has any id
        self.least_missing = np.full(shape.layers, shape.top_k)  # the same; top_k: no cell has any
        self.some = np.zeros(shape.layers, np.int64)  # cells that lack some of their ids, but not all
        self.runs = np.zeros(shape.layers, np.int64)  # runs of successive rows without a choice
        self.drafts = Drafts(shape.layers)
        self.ranges = {name: Ranges() for name in ("empty", "last", "others", "partial")}

    def see(self, piece: Piece) -> None:
        """Look at the next rows."""
        k, missing = self.shape.top_k, piece.missing
        if missing is None:
            self.partial[0] += piece.rows * self.shape.layers
            self.least_missing[:] = 0
            return
        empty = piece.empty()
        gone = (missing == k) & ~empty[:, None]
        last = gone[:, -1] & (piece.phase == PREFILL)
        some = np.where(missing < k, missing, 0)
        self.empty += int(np.count_nonzero(empty))
        self.absent += np.count_nonzero(gone, axis=0)
        self.last_of_prefill += int(np.count_nonzero(last))
        self.partial += np.bincount(missing.ravel(), minlength=k + 1)[:k]
        np.maximum(self.most_missing, some.max(0), out=self.most_missing)
        np.minimum(self.least_missing, missing.min(0), out=self.least_missing)
        self.some += np.count_nonzero(some, axis=0)
        self.runs += gone[0] + np.count_nonzero(gone[1:] & ~gone[:-1], axis=0)
        self.drafts.see(gone)
        others = gone[:, :-1].any(1) | (gone[:, -1] & ~last)
        for name, mask in (("empty", empty), ("last", last), ("others", others), ("partial", some.any(1))):
            self.ranges[name].add_mask(piece.first_row, mask)

    def made(self) -> np.ndarray:
        """int64 [layers]: rows with a choice."""
        return self.shape.rows - self.empty - self.absent

    def own_top_k(self) -> np.ndarray:
        """bool [layers]: layers whose cells all lack the same number of ids, as a layer that chooses fewer."""
        return (self.least_missing == self.most_missing) & (self.most_missing > 0)

    def layer_top_k(self) -> np.ndarray:
        """int64 [layers]: ids of a cell of each layer."""
        return self.shape.top_k - np.where(self.own_top_k(), self.most_missing, 0)

    def is_free(self, dense: np.ndarray) -> bool:
        """Whether the number of ids in a cell varies in all layers except `dense` ones.

        So does expert choice, and so does a router that drops tokens at capacity: 1 % of the cells or more in each
        layer lack some or all ids, here and there, while a recorder that loses rows loses several together, or in one
        layer. An unused last slot, as of padding, lacks in every cell and does not count.
        """
        some = np.where(self.own_top_k(), 0, self.some)
        lacking = self.absent + (some if self.partial[0] else 0 * some)
        if not self.partial[0] and np.count_nonzero(self.partial) > 2:
            lacking = self.absent + some
        scattered = (self.runs >= self.absent / 4) & (lacking >= 0.01 * self.shape.rows) & (lacking >= 4)
        return bool(np.count_nonzero(scattered & ~dense) >= max(2, 0.75 * np.count_nonzero(~dense)))

    def is_skipping(self, absent: np.ndarray) -> bool:
        """Whether rows skip layers here and there, of cells without a choice `absent` [layers].

        So they do where some layers drop tokens at capacity, or where rows exit early. A recorder that loses rows
        loses several together, or a few: 1 % of the rows or more must be absent in a layer, and in each runs be short.
        """
        together = (absent >= 4) & (self.runs < absent / 4)
        return bool(not together.any() and absent.max() >= max(4, 0.01 * self.shape.rows))

    def findings(self, dense: np.ndarray) -> Iterator[Finding]:
        """The findings; layers that are `dense` [layers] are reported as such."""
        index, free = self.shape.layer_index, self.is_free(dense)
        absent = np.where(dense, 0, self.absent)
        few = free and 2 * self.empty <= (absent + self.empty)[~dense].min(initial=self.shape.rows)
        if self.empty and not few:
            what = f"{self.empty:,} of {self.shape.rows:,} rows made no choice in any layer."
            yield finding("empty-rows", what, self.empty, None, self.ranges["empty"])
        if absent.any() and not absent[:-1].any() and absent[-1] == self.last_of_prefill:
            what = f"{many(int(absent[-1]), 'prefill row')} made no choice in the last layer."
            yield finding("absent-rows", what, absent[-1], index[-1:], self.ranges["last"])
        elif absent.any() and (last := self.drafts.last_layers()):
            what = f"{many(self.drafts.rows, 'row')} made choices in the last {many(last, 'layer')} only."
            yield finding("draft-rows", what, self.drafts.rows, index[-last:], self._unequal_rows(dense))
        elif absent.any() and not free:
            low, high = (int(f(self.shape.rows - self.empty - absent[~dense])) for f in (np.min, np.max))
            code = "skipped-layers" if self.is_skipping(absent) else "unequal-layers"
            what = f"Layers differ in length: they routed {low:,} to {high:,} of {self.shape.rows - self.empty:,} rows."
            yield finding(code, what, absent.sum(), index[absent > 0], self._unequal_rows(dense))
        yield from self._free(dense) if free else self._slots()

    def _free(self, dense: np.ndarray) -> Iterator[Finding]:
        """`partial-cells` where the number of ids is free."""
        made = np.flatnonzero(self.partial)
        least = 0 if self.absent[~dense].any() or self.empty else self.shape.top_k - int(made[-1])
        most, count = self.shape.top_k - int(made[0]), int((self.absent + self.some)[~dense].sum())
        what = f"Cells hold {least} to {most} of {self.shape.top_k} ids, {count:,} of them fewer than top_k."
        yield finding("partial-cells", what, count, self.shape.layer_index[~dense])

    def _unequal_rows(self, dense: np.ndarray) -> Ranges | None:
        """The rows concerned; a layer that is absent as a whole would make them all rows."""
        if (dense & (self.absent > 0)).any():
            return None
        rows = Ranges()
        for start, stop in sorted([*self.ranges["others"].ranges, *self.ranges["last"].ranges]):
            rows.add(start, stop)
        return rows

    def _slots(self) -> Iterator[Finding]:
        made = np.flatnonzero(self.partial)
        if not made.size:
            return
        unused = int(made[0])
        if unused:
            what = f"No cell holds more than {self.shape.top_k - unused} of {self.shape.top_k} ids."
            yield finding("unused-slots", what, unused)
        own = self.own_top_k()
        count = int(self.partial[unused + 1 :].sum() - self.some[own & (self.most_missing > unused)].sum())
        if count:
            what = f"In {many(count, 'cell')}, some of the {self.shape.top_k - unused} ids are lacking."
            layers = self.shape.layer_index[(self.most_missing > unused) & ~own]
            rows = None if unused or own.any() else self.ranges["partial"]
            yield finding("partial-cells", what, count, layers, rows)


class Drafts:
    """Rows that choose in the last layers only: draft passes of a model with multi-token prediction.

    The other rows choose in all layers, or in all except those. Such passes alternate, so rows that a recorder has lost
    at one place do not count.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.first = np.zeros(layers + 1, np.int64)  # rows by how many of the first layers they skip, and only these
        self.last = np.zeros(layers + 1, np.int64)  # of the last layers
        self.others = self.runs = self.rows = 0

    def see(self, gone: np.ndarray) -> None:
        """Look at the next rows; `gone` bool [rows, layers] where one made no choice, though it did elsewhere."""
        number = np.count_nonzero(gone, axis=1)
        skips = np.flatnonzero(number)
        steps = np.count_nonzero(
            gone[skips, 1:] != gone[skips, :-1], axis=1
        )  # one, if only first or last ones are gone
        first = (steps == 1) & gone[skips, 0]
        last = (steps == 1) & ~gone[skips, 0]
        self.first += np.bincount(number[skips[first]], minlength=self.layers + 1)
        self.last += np.bincount(number[skips[last]], minlength=self.layers + 1)
        self.others += int(np.count_nonzero(steps != 1))
        at = skips[first]
        self.rows += at.size
        self.runs += int(np.count_nonzero(np.diff(at) > 1)) + bool(at.size)

    def last_layers(self) -> int:
        """How many layers draft passes choose in, 0 if there are no such passes."""
        skipped = np.flatnonzero(self.first)
        if skipped.size != 1 or self.others or self.layers < 3 or self.runs < 4:
            return 0
        drafted = self.layers - int(skipped[0])
        others = np.flatnonzero(self.last)
        return drafted if 2 * drafted <= self.layers and (others == drafted).all() else 0


def layer_numbers(layer_index: np.ndarray) -> Iterator[Finding]:
    """`first-layer-not-0` and `layer-gap`: absolute layer numbers that are not 0, 1, 2, ..."""
    first, last = int(layer_index[0]), int(layer_index[-1])
    if first:
        yield finding("first-layer-not-0", f"The first MoE layer is layer {first}.", first, [first])
    gaps = np.flatnonzero(np.diff(layer_index.astype(np.int64)) > 1)
    if gaps.size:
        lacking = last - first + 1 - layer_index.size
        what = f"The trace lacks {many(lacking, 'layer')} between {first} and {last}."
        yield finding("layer-gap", what, lacking, layer_index[gaps])
