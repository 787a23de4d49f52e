"""Text that comes again: a sink at position 0, templates shared by requests, overlap that is periodic in lag."""

from collections.abc import Iterator

import numpy as np

from moetrace.jit.random import mix_64
from moetrace.lints.finding import Finding, Ranges, finding
from moetrace.lints.piece import Piece, Shape

SAMPLE_BYTES = 8 << 20
SAMPLE_REQUESTS = 4096
LEAST_REQUESTS = 8
LATER = 16  # a position at which requests have gone their own ways
SINK_SHARE = 0.9  # of the requests that choose alike at position 0; DeepSeek-V2-Lite has 1.0 in 24 of 26 layers
MAX_WINDOWS = 1 << 14
WINDOW_IDS = 96  # in a window: rows as many as hold them, and at least 8
TEMPLATE_SHARE = 0.01
SERIES, SERIES_ROWS, SERIES_LAYERS, LAGS = 16, 512, 8, 64


class Sink:
    """`position-0-sink`: layers in which nine of ten requests or more choose alike at position 0, and only there.

    Judged by the first 4,096 rows at position 0 (8 MiB of ids at most) and the same number from position 16 on, so that
    a beginning that all prompts share is not taken for chance.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        row_bytes = shape.layers * shape.top_k * (1 if shape.num_experts <= 255 else 2)
        self.limit = min(SAMPLE_REQUESTS, SAMPLE_BYTES // row_bytes)
        self.first: list[np.ndarray] = []
        self.later: list[np.ndarray] = []
        self.rows = Ranges()

    def see(self, piece: Piece) -> None:
        """Look at the next rows."""
        first = piece.position == 0
        self.rows.add_mask(piece.first_row, first)
        for sample, mask in ((self.first, first), (self.later, piece.position >= LATER)):
            room = self.limit - sum(map(len, sample))
            if room > 0 and len(rows := np.flatnonzero(mask)[:room]):
                sample.append(piece.experts[rows])

    def findings(self) -> Iterator[Finding]:
        """The findings."""
        requests = sum(map(len, self.first))
        if min(requests, sum(map(len, self.later))) < LEAST_REQUESTS or self.shape.top_k == self.shape.num_experts:
            return
        at_first = _largest_share(np.concatenate(self.first), self.shape.absent)
        later = _largest_share(np.concatenate(self.later), self.shape.absent)
        sink = (at_first >= SINK_SHARE) & (later <= SINK_SHARE / 2)
        if sink.any():
            share = at_first[sink].min()
            who = (
                f"all {requests:,} requests" if share == 1 else f"{int(share * 100)}% or more of {requests:,} requests"
            )
            what = f"At position 0, {who} choose the same experts."
            yield finding("position-0-sink", what, requests, self.shape.layer_index[sink], self.rows)


class Templates:
    """`repeated-template`: stretches of rows whose choices in all layers are those of rows of another request too.

    A stretch has 8 rows, or as many more as hold 96 ids. Traces with many requests are sampled by hash, so that at most
    16,384 are remembered. Stretches in which rows repeat each other are left out.
    """

    def __init__(self, shape: Shape) -> None:
        self.rows = max(8, -(-WINDOW_IDS // (shape.layers * shape.top_k)))
        self.shape = shape
        self.mask = np.uint64(0)  # the sample: hashes of which these bits are 0
        self.keys = np.zeros(0, np.uint64)
        self.request = np.zeros(0, np.int32)
        self.shared = np.zeros(0, bool)
        self.count = np.zeros(0, np.int64)
        self.where = Ranges()

    def see(self, piece: Piece, order: np.ndarray, digests: np.ndarray) -> None:
        """Look at the next rows; `order` sorts them by request, `digests` uint64 [rows] stand for their choices."""
        if piece.rows < self.rows or self.shape.top_k == self.shape.num_experts:
            return
        request, digest = piece.request[order], digests[order]
        hashes = _window_hashes(digest, self.rows)
        first, last = request[: hashes.size], request[self.rows - 1 :]
        changes = np.cumsum(np.r_[0, digest[1:] != digest[:-1]])
        usable = (first == last) & (changes[self.rows - 1 :] - changes[: hashes.size] >= self.rows // 2)
        usable &= (hashes & self.mask) == 0
        places = np.flatnonzero(usable)
        if not places.size:
            return
        keys, begin, inverse, count = np.unique(
            hashes[places], return_index=True, return_inverse=True, return_counts=True
        )
        ours = request[places[begin]]
        several = np.bincount(inverse, request[places] != ours[inverse]) > 0
        known = self._remember(keys, ours, several, count)
        again = places[self.shared[known][inverse]]
        if again.size:
            mask = np.zeros(piece.rows, bool)
            for row in range(self.rows):
                mask[order[again + row]] = True
            self.where.add_mask(piece.first_row, mask)
        self._thin_out()

    def _remember(self, keys: np.ndarray, request: np.ndarray, several: np.ndarray, count: np.ndarray) -> np.ndarray:
        at = np.searchsorted(self.keys, keys)
        new = np.r_[self.keys, np.uint64(0)][at] != keys
        new[at == self.keys.size] = True
        at = at[new]
        self.keys = np.insert(self.keys, at, keys[new])
        self.request = np.insert(self.request, at, request[new])
        self.shared = np.insert(self.shared, at, False)
        self.count = np.insert(self.count, at, 0)
        known = np.searchsorted(self.keys, keys)
        self.shared[known] |= several | (self.request[known] != request)
        self.count[known] += count
        return known

    def _thin_out(self) -> None:
        while self.keys.size > MAX_WINDOWS:
            self.mask = self.mask * np.uint64(2) + np.uint64(1)
            kept = (self.keys & self.mask) == 0
            self.keys, self.request, self.shared, self.count = (
                array[kept] for array in (self.keys, self.request, self.shared, self.count)
            )

    def findings(self, copied_rows: int) -> Iterator[Finding]:
        """The findings beyond `copied_rows`, the rows of requests that are wholly the same."""
        total = int(self.count.sum())
        if not total:
            return
        share = self.count[self.shared].sum() / total - 2 * copied_rows / self.shape.rows
        if share >= TEMPLATE_SHARE:
            what = f"{share:.0%} of the stretches of {self.rows} rows are routed exactly as in another request."
            yield finding("repeated-template", what, int(self.count[self.shared].sum()), None, self.where)


class Periodic:
    """`periodic-overlap`: successive rows of a request share fewer experts than rows at some lag from 4 to 64.

    Judged by the first rows of the first 16 requests in 8 layers.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        chosen = np.linspace(0, shape.layers - 1, min(SERIES_LAYERS, shape.layers)).round().astype(int)
        self.layers = np.unique(chosen)
        row_bytes = self.layers.size * shape.top_k * 2
        self.limit = min(SERIES_ROWS, SAMPLE_BYTES // SERIES // row_bytes, (SAMPLE_BYTES // 4) // shape.num_experts)
        self.series: dict[int, list[np.ndarray]] = {}

    def see(self, piece: Piece) -> None:
        """Look at the next rows."""
        if len(self.series) < SERIES:
            requests, first = np.unique(piece.request, return_index=True)
            for request in requests[np.argsort(first)][:SERIES].tolist():
                if len(self.series) < SERIES:
                    self.series.setdefault(request, [])
        for request, held in self.series.items():
            room = self.limit - sum(map(len, held))
            if room > 0:
                rows = np.flatnonzero(piece.request == request)[:room]
                held.append(piece.experts[rows][:, self.layers])

    def findings(self) -> Iterator[Finding]:
        """The findings."""
        if self.shape.top_k == self.shape.num_experts:
            return
        shared, pairs = np.zeros(LAGS), 0
        for parts in self.series.values():
            ids = np.concatenate(parts)
            pairs += max(len(ids) - LAGS, 0)
            for layer in range(self.layers.size):
                shared += _shared_by_lag(ids[:, layer], self.shape)
        if pairs < LAGS:
            return
        overlap = shared / (pairs * self.layers.size * self.shape.top_k)
        lag = int(np.argmax(overlap[3:])) + 4
        high, low = overlap[lag - 1], overlap[0]
        # The error is as large as if all layers agreed: successive rows are not independent, so this is on the safe
        # side.
        error = 6 * (2 * high * (1 - high) / (pairs * self.shape.top_k)) ** 0.5
        if high > 1.05 * low + error:
            what = f"Rows of a request share {high:.1%} of their experts at lag {lag}, but {low:.1%} at lag 1."
            yield finding("periodic-overlap", what, lag, self.shape.layer_index[self.layers])


def _largest_share(experts: np.ndarray, absent: int) -> np.ndarray:
    """float [layers]: the share of the rows of `experts` [rows, layers, top_k] that have the most frequent set."""
    ordered = np.sort(experts, axis=-1)
    share = np.zeros(experts.shape[1])
    for layer in range(experts.shape[1]):
        sets = ordered[:, layer]
        sets = np.ascontiguousarray(sets[sets[:, 0] != absent])
        if len(sets):
            _, counts = np.unique(sets.view(f"V{sets.shape[1] * sets.itemsize}").ravel(), return_counts=True)
            share[layer] = counts.max() / len(experts)
    return share


def _window_hashes(digests: np.ndarray, rows: int) -> np.ndarray:
    """uint64 [windows]: a polynomial of the digests of each `rows` successive rows."""
    factor = 0xD1342543DE82EF95
    powers = np.cumprod(np.r_[np.uint64(1), np.full(digests.size, factor, np.uint64)], dtype=np.uint64)
    inverse = pow(factor, -1, 1 << 64)
    shifts = np.cumprod(np.r_[np.uint64(1), np.full(digests.size, inverse, np.uint64)], dtype=np.uint64)
    prefix = np.zeros(digests.size + 1, np.uint64)
    np.cumsum(digests * powers[:-1], dtype=np.uint64, out=prefix[1:])
    return mix_64((prefix[rows:] - prefix[:-rows]) * shifts[: digests.size - rows + 1])


def _shared_by_lag(ids: np.ndarray, shape: Shape) -> np.ndarray:
    """float [LAGS]: experts that rows of `ids` [rows, top_k] share with the row 1, 2, ... later, summed over rows.

    The same rows for every lag: those that have a row LAGS later.
    """
    rows = len(ids) - LAGS
    if rows <= 0:
        return np.zeros(LAGS)
    chosen = np.zeros((len(ids), shape.num_experts + 1), bool)  # the last place is for absent and impossible ids
    np.put_along_axis(chosen, np.minimum(ids, shape.num_experts).astype(np.int64), True, axis=1)
    chosen = np.ascontiguousarray(chosen[:, :-1])
    return np.array([np.count_nonzero(chosen[lag : lag + rows] & chosen[:rows]) for lag in range(1, LAGS + 1)], float)
