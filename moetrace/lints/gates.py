"""Gate weights: impossible ones, and two habits of models that readers stumble over."""

from collections.abc import Iterator

import numpy as np

from moetrace.lints.finding import Finding, Ranges, finding, many
from moetrace.lints.piece import Piece, Shape

# Eight float16 numbers that should sum to 1 are off by at most 0.003 in captures.
TOLERANCE = 0.02
_INFINITY = np.uint16(0x7C00)  # bits of a float16; greater ones are NaN or have a sign


class Gates:
    """`impossible-gates`, `gates-sum` and `gate-order`, judged by cells without absent ids."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.cells = 0
        self.counts = {
            code: np.zeros(shape.layers, np.int64) for code in ("impossible-gates", "gates-sum", "gate-order")
        }
        self.rows = {code: Ranges() for code in self.counts}
        self.low, self.high = np.inf, -np.inf

    def see(self, piece: Piece) -> None:
        """Look at the next rows."""
        if piece.gates is None:
            return
        whole = np.ones(piece.experts.shape[:2], bool) if piece.missing is None else piece.missing == 0
        self.cells += int(np.count_nonzero(whole))
        bits = piece.gates.view(np.uint16)
        if bits.max() >= _INFINITY:
            bits = np.where(bits == 0x8000, np.uint16(0), bits)  # -0 is harmless
        # Bits of non-negative float16 numbers are in the order of the numbers.
        first, largest, total = bits[:, :, 0], bits[:, :, 0], piece.gates[:, :, 0].astype(np.float32)
        for slot in range(1, self.shape.top_k):
            largest = np.maximum(largest, bits[:, :, slot])
            with np.errstate(invalid="ignore"):  # infinity minus infinity
                total += piece.gates[:, :, slot]
        odd = whole & (largest >= _INFINITY)
        good = whole & ~odd
        if good.any():
            sums = total[good]
            self.low, self.high = min(self.low, float(sums.min())), max(self.high, float(sums.max()))
        off = good & ~(np.abs(total - 1) <= TOLERANCE)
        later = good & (first < largest)
        for code, mask in (("impossible-gates", odd), ("gates-sum", off), ("gate-order", later)):
            if mask.any():
                self.counts[code] += np.count_nonzero(mask, axis=0)
                self.rows[code].add_mask(piece.first_row, mask.any(1))

    def findings(self) -> Iterator[Finding]:
        """The findings."""
        said = {
            "impossible-gates": "a gate is negative, infinite or not a number",
            "gates-sum": f"gates do not sum to 1, but to {self.low:.3g} to {self.high:.3g}",
            "gate-order": "the largest gate is not in the first slot",
        }
        for code, layers in self.counts.items():
            if count := int(layers.sum()):
                what = f"In {many(count, 'cell')} ({count / self.cells:.1%}), {said[code]}."
                yield finding(code, what, count, self.shape.layer_index[layers > 0], self.rows[code])
