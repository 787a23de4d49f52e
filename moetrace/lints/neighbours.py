"""Layers that are parts of one layer: ids read with a smaller top_k than the model has."""

from collections.abc import Iterator

import numpy as np

from moetrace.lints.finding import Finding, finding
from moetrace.lints.piece import Piece, Shape

SAMPLE_ROWS, SAMPLE_BYTES = 2048, 4 << 20
_ROWS_OF_A_PIECE = 512
_EXPECTED = 40.0  # experts that two layers should share, in all sampled rows, before they are judged
# As above, for few and not none. Rows of one request are no sample of a model's: in captures of sound layers three of
# five pairs shared less than half of 89, 172 and 150 in 396 rows of three requests.
_EXPECTED_OF_FEW, _TOTAL_OF_FEW = 100.0, 800.0  # of a pair, and of all that share few
_NONE, _FEW = 0.05, 0.55  # of the expected number of common experts
# Shares of pairs of neighbours: 8 layers read as 4 parts affect every second pair, 6 read as 4 two of three.
_PAIRS_NONE, _PAIRS_FEW = 1 / 4, 1 / 2
_LEAST_ROWS, _COPY = 32, 0.5  # rows of copied layers, and the share of common choices that popularity may explain
_MOST_PARTS = 16  # of a layer, each read as one
_EXPECTED_OF_PARTS = 80.0  # as above, in all pairs of parts together: of 200 or so sets of pairs, one may be chance


class Neighbours:
    """`wrong-stride` and `copied-layer`: neighbouring layers that share far fewer experts in a row than others, or all.

    A router chooses an expert once, so two halves of one layer share none, while layers of their own share as many as
    their popularities let expect (0.56 to 1.4 times that, pair by pair, in captures). Judged by distinct rows, 2,048 at
    most.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        row_bytes = shape.layers * shape.top_k * 2
        self.room = min(SAMPLE_ROWS, max(1, SAMPLE_BYTES // row_bytes))
        self.sample: list[np.ndarray] = []
        self.digests: list[np.ndarray] = []

    def see(self, piece: Piece, digests: np.ndarray) -> None:
        """Look at the next rows; `digests` uint64 [rows] stand for their choices."""
        count = min(self.room, _ROWS_OF_A_PIECE, piece.rows)
        if count <= 0 or self.shape.top_k == self.shape.num_experts:
            return
        rows = np.linspace(0, piece.rows - 1, count).astype(np.int64)
        self.room -= count
        self.sample.append(piece.experts[rows])
        self.digests.append(digests[rows])

    def ids(self) -> np.ndarray:
        """The ids of the sampled rows, no two of which choose alike in all layers: [rows, layers, top_k]."""
        if not self.sample:
            return np.zeros((0, self.shape.layers, self.shape.top_k), np.uint16)
        return np.concatenate(self.sample)[np.unique(np.concatenate(self.digests), return_index=True)[1]]

    def findings(self, without: np.ndarray) -> Iterator[Finding]:
        """The findings in layers other than `without` [layers]."""
        ids = self.ids()
        if self.shape.layers == 1 or not len(ids):
            return
        pairs = [_shared(ids[:, at : at + 2], self.shape.num_experts) for at in range(self.shape.layers - 1)]
        expected, shared = np.array(pairs).T
        known = ~without[1:] & ~without[:-1]
        parts = _parts(np.where(known, expected, 0), np.where(known, shared, 0), known)
        if parts.any():
            yield self._found(parts, int(np.count_nonzero(parts)))
            return
        for most, least, total, pairs_needed in (
            (_NONE, _EXPECTED, 0.0, _PAIRS_NONE),
            (_FEW, _EXPECTED_OF_FEW, _TOTAL_OF_FEW, _PAIRS_FEW),
        ):
            judged = (expected >= least) & known
            apart = judged & (shared <= most * expected)
            count = int(np.count_nonzero(apart))
            if count and count >= pairs_needed * np.count_nonzero(judged) and expected[apart].sum() >= total:
                yield self._found(apart, count)
                return

    def copied(self, without: np.ndarray) -> Iterator[Finding]:
        """`copied-layer`: neighbours other than `without` [layers] that choose alike in every row."""
        ids = self.ids()
        if len(ids) < _LEAST_ROWS:
            return
        alike = (ids[:, 1:] == ids[:, :-1]).all(2)
        routed = (ids.min(2) < self.shape.num_experts).sum(0)
        some = (routed[1:] >= _LEAST_ROWS) & ~without[1:] & ~without[:-1]
        for at in np.flatnonzero(alike.all(0) & some).tolist():
            expected, shared = _shared(ids[:, at : at + 2], self.shape.num_experts)
            if expected <= _COPY * shared:
                index = self.shape.layer_index[at : at + 2]
                what = f"Layers {index[0]} and {index[1]} choose alike in all {len(ids):,} rows that were compared."
                yield finding("copied-layer", what, len(ids), index)

    def _found(self, apart: np.ndarray, count: int) -> Finding:
        index = self.shape.layer_index
        first = int(np.flatnonzero(apart)[0])
        what = (
            f"{count} of {self.shape.layers - 1} pairs of neighbouring layers (such as {index[first]} and "
            f"{index[first + 1]}) share far too few experts in a row, as if they were parts of one layer."
        )
        return finding("wrong-stride", what, count, index[np.r_[apart, False] | np.r_[False, apart]])


def _parts(expected: np.ndarray, shared: np.ndarray, known: np.ndarray) -> np.ndarray:
    """bool [pairs]: pairs of neighbours that are parts of a layer, as all pairs at such places together show.

    Places repeat with the number of parts, or with some parts that have a layer's first and another's last ids.
    """
    place, most, best = np.arange(1, expected.size + 1), 0, np.zeros(expected.size, bool)
    for parts in range(2, min(_MOST_PARTS, expected.size + 1) + 1):
        for at in range(parts):
            pairs = known & ((place % parts != 0) if at == 0 else (place % parts == at))
            count = int(np.count_nonzero(pairs))
            if count <= most or count < _PAIRS_NONE * np.count_nonzero(known):
                continue
            total = expected[pairs].sum()
            if total >= _EXPECTED_OF_PARTS and shared[pairs].sum() <= _NONE * total / 2:
                most, best = count, pairs
    return best


def _shared(ids: np.ndarray, num_experts: int) -> tuple[float, int]:
    """How many experts the rows of `ids` [rows, 2, top_k] should have in common in both layers, and how many they have.

    Rows that skip one of the layers, as a draft pass does, and absent or impossible ids do not count.
    """
    ids = ids[(ids.min(2) < num_experts).all(1)]
    if not len(ids):
        return 0.0, 0
    one, other = (np.bincount(ids[:, at].ravel(), minlength=num_experts)[:num_experts] for at in (0, 1))
    equal = (ids[:, 0, :, None] == ids[:, 1, None, :]) & (ids[:, 0] < num_experts)[:, :, None]
    return float(one @ other) / len(ids), int(np.count_nonzero(equal))
