"""Checks of whole requests: their number, positions and phases, and repeated requests."""

from collections.abc import Iterator

import numpy as np

from moetrace.jit.random import mix_64
from moetrace.lints.finding import Finding, Ranges, finding, many
from moetrace.lints.piece import Piece, Shape
from moetrace.lints.request_runs import RequestRuns
from moetrace.trace.schema import DECODE, PREFILL

MAX_REQUESTS = 1 << 18  # that are followed; of further ones only the number of rows is known
SHORT_MEAN = 20  # choices of an expert below which its count is mostly chance
LEAST_ROWS = 8  # of two requests that are called the same


class RequestCheck:
    """`identical-requests`, `single-request`, `short`, `position-jumps`, `prefill-only` and `decode-only`."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.ids = np.zeros(0, np.int32)  # in order; the arrays below go with it
        self.last = np.zeros(0, np.int64)  # position of the last row
        self.rows = np.zeros(0, np.int64)
        self.digest = np.zeros(0, np.uint64)
        self.previous = np.zeros(0, np.uint64)  # digest of the last row
        self.changes = np.zeros(0, np.int64)  # rows that differ from the row before
        self.phases = np.zeros(2, np.int64)
        self.jumps = 0
        self.jumped = Ranges()
        self.first_row = np.zeros(0, np.int64)
        self.runs = RequestRuns(shape)

    def see(self, piece: Piece, order: np.ndarray, digests: np.ndarray) -> None:
        """Look at the next rows; `order` sorts them by request, `digests` uint64 [rows] stand for their choices."""
        self.phases += np.bincount(np.minimum(piece.phase, DECODE), minlength=2)
        request = piece.request[order]
        begins = np.flatnonzero(np.r_[True, request[1:] != request[:-1]])
        place = self._places(request[begins], piece.first_row + order[begins])
        group = np.repeat(place, np.diff(np.r_[begins, request.size]))
        known = group >= 0
        self._follow(piece, order, request, begins, place, group)
        number = np.arange(request.size) - np.repeat(begins, np.diff(np.r_[begins, request.size])) + self.rows[group]
        digest = digests[order]
        before = np.r_[np.uint64(0), digest[:-1]]
        before[begins] = np.where(self.rows[place] > 0, self.previous[place], ~digest[begins])
        changed = known & (digest != before)
        same = known & ~changed
        if piece.missing is not None:
            same &= ~piece.empty()[order]
        self.runs.see(piece, order, same, begins, place)
        # Sums of a hash of number and content, because rows of a request come in several pieces.
        weight = mix_64(digest ^ mix_64(number.astype(np.uint64)))
        np.add.at(self.digest, group[known], weight[known])
        self.changes += np.bincount(group[changed], minlength=self.ids.size)
        self.rows += np.bincount(group[known], minlength=self.ids.size)
        ends = np.r_[begins[1:], request.size] - 1
        followed = place >= 0
        self.previous[place[followed]] = digest[ends[followed]]

    def _places(self, ids: np.ndarray, first_rows: np.ndarray) -> np.ndarray:
        """Where the arrays hold these requests, -1 if they are too many; new ones are put in."""
        new = np.flatnonzero(~np.isin(ids, self.ids, kind="sort"))[: MAX_REQUESTS - self.ids.size]
        if new.size:
            at = np.searchsorted(self.ids, ids[new])
            self.ids = np.insert(self.ids, at, ids[new])
            self.last = np.insert(self.last, at, -1)
            self.first_row = np.insert(self.first_row, at, first_rows[new])
            self.runs.insert(at)
            for name in ("rows", "digest", "previous", "changes"):
                setattr(self, name, np.insert(getattr(self, name), at, 0))
        place = np.minimum(np.searchsorted(self.ids, ids), self.ids.size - 1)
        return np.where(self.ids[place] == ids, place, -1)

    def _follow(self, piece: Piece, order, request, begins, place, group) -> None:
        """Count positions that don't follow that of the request's row before."""
        position = piece.position[order].astype(np.int64)
        expected = np.r_[-1, position[:-1]] + 1
        seen = self.rows[place] > 0
        expected[begins] = np.where(seen, self.last[place] + 1, position[begins])
        jumps = (group >= 0) & (position != expected)
        if jumps.any():
            self.jumps += int(np.count_nonzero(jumps))
            mask = np.zeros(piece.rows, bool)
            mask[order[jumps]] = True
            self.jumped.add_mask(piece.first_row, mask)
        ends = np.r_[begins[1:], request.size] - 1
        followed = place >= 0
        self.last[place[followed]] = position[ends[followed]]

    def copies(self) -> np.ndarray:
        """Places of the requests that are another one again, by their first rows; the first of a kind is no copy."""
        long = np.flatnonzero(self.changes >= LEAST_ROWS)
        long = long[np.argsort(self.first_row[long], kind="stable")]
        keys = np.stack([self.digest[long], self.rows[long].astype(np.uint64)], axis=1)
        copies = np.ones(long.size, bool)
        copies[np.unique(keys, axis=0, return_index=True)[1]] = False
        return long[copies]

    def findings(self) -> Iterator[Finding]:
        """The findings."""
        copies, first_rows = self.copies(), Ranges()
        for row in self.first_row[copies].tolist():
            first_rows.add(row, row + 1)
        if copies.size:
            rows = int(self.rows[copies].sum())
            what = (
                f"{copies.size:,} of {self.ids.size:,} requests ({rows:,} rows) repeat all choices of an earlier one."
            )
            yield finding("identical-requests", what, copies.size, None, first_rows)
        if self.ids.size == 1 and self.shape.rows > 1:
            yield finding("single-request", "The trace holds one request.", 1)
        mean = self.shape.rows * self.shape.top_k / self.shape.num_experts
        if mean < SHORT_MEAN:
            what = f"In {many(self.shape.rows, 'row')} an expert is chosen {mean:.1f} times a layer on average."
            yield finding("short", what, self.shape.rows)
        if self.jumps:
            what = f"In {many(self.jumps, 'row')}, the position is not one after that of the request's row before."
            yield finding("position-jumps", what, self.jumps, None, self.jumped)
        every = "The only row is" if self.shape.rows == 1 else f"All {self.shape.rows:,} rows are"
        if not self.phases[DECODE]:
            yield finding("prefill-only", f"{every} prefill.", self.shape.rows)
        if not self.phases[PREFILL]:
            yield finding("decode-only", f"{every} decode.", self.shape.rows)
