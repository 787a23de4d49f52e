"""Which rows of a trace are looked at, one layer at a time: the arrays that every kernel of this folder takes.

A trace holds `[rows, layers, top_k]`, but every statistic is of one layer, so ids are turned into
`ids` uint16 [layers, n, k], whatever their width in the file; `ABSENT` marks a choice that was not made.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moetrace.engine.compile import kernel
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Block, Rows, Trace, schema

ABSENT = 65535
SAMPLE_BYTES = 256 << 20  # of ids: what is kept in memory of a long trace


class Chosen(NamedTuple):
    """Which rows count: of one phase ("prefill", "decode") or "all", with or without those at position 0."""

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


class Requests(NamedTuple):
    """The requests that have rows that count, by increasing number: request int32 [R], rows int64 [R] of each."""

    request: np.ndarray
    rows: np.ndarray


class Sample(NamedTuple):
    """Whole requests one after another, each in the order of the trace: what shuffles and predictors work on.

    ids: uint16 [layers, n, k].
    first: int32 [n], the index here of the first row of the row's request.
    request: int32 [n], which of the trace's requests (an index of `Requests`).
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


def count_requests(trace: Trace, chosen: Chosen) -> Requests:
    """Pass over the rows, without their ids, and count those of each request."""
    request, rows = np.zeros(0, np.int32), np.zeros(0, np.int64)
    for part in trace.row_blocks():
        new, count = np.unique(part.request[chosen.of(part)], return_counts=True)
        merged = np.union1d(request, new)
        total = np.zeros(merged.size, np.int64)
        total[np.searchsorted(merged, request)] += rows
        total[np.searchsorted(merged, new)] += count
        request, rows = merged, total
    return Requests(request, rows)


class Sampler:
    """Gather a bounded, seeded sample of whole requests while blocks pass by.

    Takes requests in random order as long as they fit `most` rows; all of them, if they do. If not even the first
    one does, its first `most` rows.
    """

    def __init__(self, trace: Trace, requests: Requests, most: int, seed: int) -> None:
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
        self._where = f"{trace.path or 'trace in memory'}"

    def take(self, block: Block, keep: np.ndarray, num_experts: int) -> None:
        """Copy the rows of the sample's requests among those of the block that count."""
        row = np.flatnonzero(keep)
        slot = np.searchsorted(self._request, block.request[row])
        slot[slot == self._request.size] = 0
        ours = self._request[slot] == block.request[row]
        row, slot = row[ours], slot[ours]
        order = np.argsort(slot, kind="stable")
        row, slot = row[order], slot[order]
        within = np.arange(slot.size) - np.searchsorted(slot, slot)
        place = self._filled[slot] + within
        fits = place < self._rows[slot]
        row, slot, place = row[fits], slot[fits], place[fits] + self._start[slot[fits]]
        self._filled += np.bincount(slot, minlength=self._filled.size)
        turn(block.experts, row, place, num_experts, self.sample.ids)
        self.sample.phase[place] = block.phase[row]
        self.sample.position_0[place] = block.position[row] == 0


def blocks(trace: Trace, chosen: Chosen) -> Iterator[tuple[Block, np.ndarray, np.ndarray]]:
    """Yield each block, which of its rows count (bool [rows]) and their ids (uint16 [layers, n, k]).

    Raises MoetraceError, naming the row, if an id is impossible or twice in a choice.
    """
    for block in trace.blocks():
        keep = chosen.of(block)
        row = np.flatnonzero(keep)
        ids = np.empty((trace.layers, row.size, trace.top_k), np.uint16)
        if not turn(block.experts, row, np.arange(row.size), trace.num_experts, ids):
            where, first = str(trace.path or "trace in memory"), int(trace.offset[block.first_step])
            schema.check_ids(where, first, block.experts, trace.num_experts)
            raise MoetraceError(f"{where}: /experts holds an impossible id.")
        yield block, keep, ids


@kernel(inline=False)
def turn(experts, row, place, num_experts, ids):
    """Copy experts[row[i]] ([rows, L, k], uint8 or uint16) to ids[:, place[i]]; return whether all ids are possible."""
    _, layers, k = experts.shape
    absent = 255 if num_experts <= 255 else ABSENT
    good = True
    for start in range(0, row.size, 64):  # so many rows at a time, so that what is written stays in the cache
        stop = min(start + 64, row.size)
        for layer in range(layers):
            for i in range(start, stop):
                source = experts[row[i], layer]
                target = ids[layer, place[i]]
                for slot in range(k):
                    expert = source[slot]
                    target[slot] = ABSENT if expert == absent else expert
                    good &= (expert < num_experts) | (expert == absent)
                for slot in range(1, k):
                    for other in range(slot):
                        good &= (target[slot] != target[other]) | (target[slot] == ABSENT)
    return good
