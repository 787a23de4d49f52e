"""The selected rows of a trace, one layer at a time: the arrays that every kernel of this folder takes.

A trace holds `[rows, layers, top_k]`, but every statistic is of one layer, so ids are turned into
`ids` uint16 [layers, n, k], for any width in the file; `ABSENT` marks a choice that was not made.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moetrace.jit.compile import kernel
from moetrace.trace import Block, Rows, Trace, schema

ABSENT = 65535
SAMPLE_ROWS = 1 << 16  # of a longer trace: 64 MB of ids for DeepSeek-V3, and standard errors below a tenth of a point


class Chosen(NamedTuple):
    """The rows that count: of one phase ("prefill", "decode") or "all", with or without those at position 0."""

    phase: str = "all"
    skip_position_0: bool = False

    def of(self, rows: Rows | Block) -> np.ndarray:
        """Return bool [rows], which rows of a block count (of those that it looks ahead at, none)."""
        keep = np.ones(int(rows.offset[rows.steps]), bool)
        if self.phase != "all":
            keep &= rows.phase[: keep.size] == schema.PHASE_NAMES.index(self.phase)
        if self.skip_position_0:
            keep &= rows.position[: keep.size] > 0
        return keep


class RequestRows(NamedTuple):
    """The requests that have rows that count, by increasing number: request int32 [R], rows int64 [R] of each."""

    request: np.ndarray
    rows: np.ndarray


class Sample(NamedTuple):
    """Whole requests one after another, each in the order of the trace: what shuffles and predictors work on.

    ids: uint16 [layers, n, k].
    first: int32 [n], the index here of the first row of the row's request.
    request: int32 [n], which of the trace's requests (an index of `RequestRows`).
    phase: uint8 [n], 0 prefill, 1 decode.
    position_0: bool [n], rows at position 0.
    """

    ids: np.ndarray
    first: np.ndarray
    request: np.ndarray
    phase: np.ndarray
    position_0: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Where each request starts, int64 [requests]."""
        return np.flatnonzero(self.first == np.arange(self.first.size))


def count_requests(trace: Trace, chosen: Chosen) -> RequestRows:
    """Pass over the rows, without their ids, and count those of each request."""
    request, rows = np.zeros(0, np.int32), np.zeros(0, np.int64)
    for part in trace.row_blocks():
        new, count = np.unique(part.request[chosen.of(part)], return_counts=True)
        merged = np.union1d(request, new)
        total = np.zeros(merged.size, np.int64)
        total[np.searchsorted(merged, request)] += rows
        total[np.searchsorted(merged, new)] += count
        request, rows = merged, total
    return RequestRows(request, rows)


class Sampler:
    """Gather a bounded, seeded sample of whole requests while blocks pass by.

    Takes requests in random order as long as they fit `most` rows; all of them, if they do. If not even the first
    one does, its first `most` rows.
    """

    def __init__(self, trace: Trace, requests: RequestRows, most: int, seed: int) -> None:
        """Choose the requests and make room for them."""
        index = np.arange(requests.request.size)
        if requests.rows.sum() > most:
            order = np.random.default_rng(seed).permutation(index)
            fit = np.searchsorted(np.cumsum(requests.rows[order]), most, side="right")
            index = np.sort(order[: max(1, int(fit))])
        self._request = requests.request[index]
        self._rows = np.minimum(requests.rows[index], most)
        self._start = np.cumsum(self._rows) - self._rows
        self._filled = np.zeros(index.size, np.int64)
        n = int(self._rows.sum())
        self.sample = Sample(
            np.empty((trace.layers, n, trace.top_k), np.uint16),
            np.repeat(self._start, self._rows).astype(np.int32),
            np.repeat(index, self._rows).astype(np.int32),
            np.empty(n, np.uint8),
            np.empty(n, bool),
        )

    def take(self, block: Block, row: np.ndarray, ids: np.ndarray) -> None:
        """Copy the rows of the sample's requests: `row` int64 [n] of the block, with ids uint16 [layers, n, k]."""
        request = block.request[row]
        slot = np.minimum(np.searchsorted(self._request, request), self._request.size - 1)
        index = np.flatnonzero(self._request[slot] == request)
        index = index[np.argsort(slot[index], kind="stable")]
        slot = slot[index]
        within = np.arange(slot.size) - np.searchsorted(slot, slot)
        place = self._filled[slot] + within
        fits = place < self._rows[slot]
        index, slot, place = index[fits], slot[fits], place[fits] + self._start[slot[fits]]
        self._filled += np.bincount(slot, minlength=self._filled.size)
        _put(ids, index, place, self.sample.ids)
        self.sample.phase[place] = block.phase[row[index]]
        self.sample.position_0[place] = block.position[row[index]] == 0


def blocks(trace: Trace, chosen: Chosen) -> Iterator[tuple[Block, np.ndarray, np.ndarray]]:
    """Yield each block, which of its rows count (int64 [n]) and their ids (uint16 [layers, n, k]).

    Raises MoetraceError, naming the row, if an id is impossible; that none is twice in a choice is not checked here.
    """
    for block in trace.blocks():
        row = np.flatnonzero(chosen.of(block))
        ids = np.empty((trace.layers, row.size, trace.top_k), np.uint16)
        if not _turn(block.experts, row, trace.num_experts, ids):
            check(trace, block)
        yield block, row, ids


def check(trace: Trace, block: Block) -> None:
    """Raise a MoetraceError that names row and layer if a choice of the block is impossible."""
    where = trace.shown
    schema.check_ids(where, int(trace.offset[block.first_step]), block.experts, trace.num_experts)


@kernel(inline=False)
def _turn(experts, row, num_experts, ids):
    """Copy rows of experts ([rows, L, k], uint8 or uint16) to ids uint16 [L, n, k]; return whether all are possible."""
    _, layers, k = experts.shape
    absent = 255 if num_experts <= 255 else 65535
    highest = 0
    for start in range(0, row.size, 64):  # 64 rows at a time, so that the rows being written stay in the cache
        for layer in range(layers):
            for i in range(start, min(start + 64, row.size)):
                source, target = experts[row[i], layer], ids[layer, i]
                for slot in range(k):
                    expert = source[slot]
                    highest = max(highest, 0 if expert == absent else expert)
                    target[slot] = 65535 if expert == absent else expert
    return highest < num_experts


@kernel(inline=False)
def _put(ids, row, place, sample):
    """Copy ids[:, row[i]] to sample[:, place[i]]."""
    for layer in range(len(ids)):
        for i in range(row.size):
            for slot in range(ids.shape[2]):
                sample[layer, place[i], slot] = ids[layer, row[i], slot]
