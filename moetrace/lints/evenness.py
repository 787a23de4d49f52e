"""Routing that is even by construction: a flat read of a strided view, and counts too equal to be routed."""

from collections.abc import Iterator
from math import lgamma, log

import numpy as np

from moetrace.lints.finding import Finding, Ranges, finding
from moetrace.lints.piece import Piece, Shape

# Flagged only if uniform random routing would do the same with less than this probability, at one place; a billion
# places make that 1e-6. Skewed routing does it still more rarely.
_LOG_CHANCE = log(1e-15)
_LOG_CHANCE_OF_COUNTS = log(1e-9)
MAX_COUNTED = 1 << 22  # layers x experts


class FlatView:
    """`flat-view`: windows of successive rows whose ids are whole permutations of the experts, one after another.

    A flat read of llama.cpp's `ffn_moe_topk` (a view of an argsort, strided by the number of experts) yields all
    experts of the first token, then all of the second. With E experts and k slots, E / gcd(E, k) rows then hold each
    expert k / gcd(E, k) times. So many windows in a row are needed (1 or 2, and more where E is small) that uniform
    random routing would have them with a probability of less than 1e-15 at any one place; routing that is skewed, or
    sticks to the experts of the row before, has them more rarely still.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        common = int(np.gcd(shape.num_experts, shape.top_k))
        self.window = shape.num_experts // common
        self.times = shape.top_k // common
        self.windows = _windows_needed(shape.num_experts, shape.top_k, self.window, self.times)
        # Sums, which wrap as the ids' dtype does, and exclusive ors: a cheap filter before the exact comparison.
        self.dtype = np.uint8 if shape.num_experts <= 255 else np.uint16
        total = shape.num_experts * (shape.num_experts - 1) // 2 * self.times
        self.total = self.dtype(total % (np.iinfo(self.dtype).max + 1))
        every = np.arange(shape.num_experts, dtype=self.dtype)
        self.parity = np.bitwise_xor.reduce(every) if self.times % 2 else self.dtype(0)
        self.cells = np.zeros(shape.layers, np.int64)
        self.count = 0
        self.rows = Ranges()

    def see(self, piece: Piece) -> None:
        """Look at the next rows; windows that lie in two pieces are not seen."""
        span = self.window * self.windows
        if self.shape.top_k == self.shape.num_experts or piece.rows < span:
            return
        fits = self._windows(piece, np.add) == self.total
        fits &= self._windows(piece, np.bitwise_xor) == self.parity
        starts = fits[: piece.rows - span + 1] & _together(piece, span)[:, None]
        for number in range(1, self.windows):
            first = number * self.window
            starts &= fits[first : first + len(starts)]
        rows, layers = np.divmod(np.flatnonzero(starts), self.shape.layers)  # np.nonzero of two axes takes longer
        if rows.size == 0:
            return
        true = self._permutations(piece, rows, layers)
        if true.any():
            self._mark(piece, rows[true], layers[true], span)

    def _windows(self, piece: Piece, join: np.ufunc) -> np.ndarray:
        """[windows, layers]: the ids of each window, joined; by doubling, which is faster than NumPy's running sums."""
        block = join.reduce(piece.slots, axis=0, dtype=self.dtype)  # of 1, 2, 4, ... rows from each row on
        count, covered, width = piece.rows - self.window + 1, 0, 1
        joined = np.zeros((count, self.shape.layers), self.dtype)
        while covered < self.window:
            if self.window & width:
                join(joined, block[covered : covered + count], out=joined)
                covered += width
            block = join(block[:-width], block[width:])
            width *= 2
        return joined

    def _permutations(self, piece: Piece, rows: np.ndarray, layers: np.ndarray) -> np.ndarray:
        """bool [starts]: whether every window from each start on holds every expert equally often."""
        true = np.ones(rows.size, bool)
        expected = np.repeat(np.arange(self.shape.num_experts, dtype=np.uint16), self.times)
        batch = max(1, (1 << 21) // expected.size)
        for number in range(self.windows):
            candidates = np.flatnonzero(true)
            for start in range(0, candidates.size, batch):
                part = candidates[start : start + batch]
                window = rows[part, None] + np.arange(self.window) + number * self.window
                ids = np.sort(piece.experts[window, layers[part, None]].reshape(part.size, -1), axis=1)
                true[part] = (ids == expected).all(1)
        return true

    def _mark(self, piece: Piece, rows: np.ndarray, layers: np.ndarray, span: int) -> None:
        edges = np.zeros((piece.rows + 1, self.shape.layers), np.int32)
        np.add.at(edges, (rows, layers), 1)
        np.add.at(edges, (rows + span, layers), -1)
        concerned = np.cumsum(edges[:-1], axis=0) > 0
        self.cells += np.count_nonzero(concerned, axis=0)
        self.count += int(np.count_nonzero(concerned.any(1)))
        self.rows.add_mask(piece.first_row, concerned.any(1))

    def layers(self) -> np.ndarray:
        """bool [layers]: the layers concerned."""
        return self.cells > 0

    def findings(self) -> Iterator[Finding]:
        """The findings."""
        if self.count:
            times = "once" if self.times == 1 else f"{self.times} times"
            what = (
                f"In {self.count:,} rows, every {self.window} successive rows hold each of a layer's "
                f"{self.shape.num_experts} experts exactly {times}."
            )
            layers = self.shape.layer_index[self.layers()]
            yield finding("flat-view", what, self.count, layers, self.rows)


class EvennessCheck:
    """`uniform` and `random-routing`: how often each expert was chosen, beside what uniform random draws would give.

    The statistic is Pearson's chi-square over the experts of a layer, divided by (E - k) / (E - 1), because a row draws
    without replacement: chi-square with E - 1 degrees of freedom for uniform random draws. In captures it is 6 to 3,300
    times as large. E is each layer's own, `experts` [layers].
    """

    def __init__(self, num_experts: int, top_k: int, layer_index: np.ndarray, experts: np.ndarray) -> None:
        self.num_experts, self.top_k, self.layer_index, self.experts = num_experts, top_k, layer_index, experts
        # A file may claim more layers and experts than memory could count; no model has 100,000 of them.
        self.counted = layer_index.size * num_experts <= MAX_COUNTED
        self.chosen = np.zeros((layer_index.size if self.counted else 1, num_experts), np.int64)

    def see(self, piece: Piece) -> None:
        """Count the ids of the next rows; impossible ones are left out."""
        if not self.counted:
            return
        for layer in range(self.layer_index.size):
            counts = np.bincount(piece.experts[:, layer].astype(np.intp).reshape(-1), minlength=self.num_experts)
            self.chosen[layer] += counts[: self.num_experts]

    def findings(self, without: np.ndarray, top_k: np.ndarray | None = None) -> Iterator[Finding]:
        """The findings in layers other than `without` [layers]; `top_k` [layers] is theirs, if not all the same."""
        if not self.counted:
            return
        top_k = np.full(len(self.chosen), self.top_k) if top_k is None else top_k
        experts, fewer = self.experts, top_k < self.experts
        dof = np.maximum(experts - 1, 1)
        mean = self.chosen.sum(1) / experts
        judged = (mean >= 1) & ~without & fewer
        mean = np.maximum(mean, 1)
        off = np.where(np.arange(self.num_experts) < experts[:, None], self.chosen - mean[:, None], 0)
        spread = (off**2).sum(1) / mean * dof / np.where(fewer, experts - top_k, 1)
        # Counts are whole: half a step in each of them belongs to the same outcome.
        lower = np.array([_log_chance_below(*of) for of in zip(spread + 0.25 * experts / mean, dof, strict=True)])
        even = judged & (lower < log(1e-3))
        chance = lower[even].sum() + np.count_nonzero(even) * log(even.size)
        if even.any() and chance < _LOG_CHANCE_OF_COUNTS:
            own = self.chosen[even][np.arange(self.num_experts) < experts[even, None]]
            least, most = (int(f(own)) for f in (np.min, np.max))
            what = f"Each expert of a layer was chosen {least:,} to {most:,} times: more equal than by chance."
            yield finding("uniform", what, int(np.count_nonzero(even)), self.layer_index[even])
            return
        ratio, sd = spread / dof, (2 / dof) ** 0.5
        enough = judged & (mean >= 50)
        if not enough.any() or experts[enough].min() < 4 or (enough != judged).any():
            return
        within = (np.abs(ratio - 1) <= 6 * sd)[enough].all()
        if within and abs(ratio[enough].mean() - 1) <= 5 * ((sd[enough] ** 2).sum()) ** 0.5 / np.count_nonzero(enough):
            what = (
                f"Counts spread over experts like uniform random draws ({ratio[enough].mean():.2f} times the spread)."
            )
            yield finding("random-routing", what, int(np.count_nonzero(enough)), self.layer_index[enough])


def _together(piece: Piece, span: int) -> np.ndarray:
    """bool [rows - span + 1]: whether the `span` rows from each on are of one step or of one request.

    Others are not looked at: requests that decode in turns and stick to their experts repeat a lucky window.
    """
    together = np.zeros(piece.rows - span + 1, bool)
    for number in (piece.step, piece.request):
        changes = np.cumsum(np.r_[0, number[1:] != number[:-1]])
        together |= changes[span - 1 :] == changes[: together.size]
    return together


def _windows_needed(num_experts: int, top_k: int, window: int, times: int) -> int:
    """How many successive windows of permutations chance practically never makes.

    An upper bound for one window under uniform random routing: orders of the ids with each expert `times` times,
    divided by all orders of `window` rows of top_k distinct ids.
    """
    orders = lgamma(window * top_k + 1) - num_experts * lgamma(times + 1)
    rows = window * (lgamma(num_experts + 1) - lgamma(num_experts - top_k + 1))
    log_chance = min(orders - rows, log(0.75))
    return max(1, int(np.ceil(_LOG_CHANCE / log_chance)))


def _log_chance_below(x: float, dof: int) -> float:
    """Upper bound of the log of P(chi-square with `dof` degrees of freedom <= x): its density without e^(-x/2)."""
    return min(0.0, dof / 2 * log(max(x, 1e-300) / 2) - lgamma(dof / 2 + 1)) if dof else 0.0
