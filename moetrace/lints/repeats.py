"""Rows that are the row before once more: the warm-up of an engine, padding, or a text of one token."""

from bisect import bisect_right
from collections.abc import Iterator
from math import sqrt

import numpy as np

from moetrace.lints.finding import Finding, Ranges, finding, many
from moetrace.lints.piece import Piece, Shape

# vLLM's warm-up has 2,048 to 16,640 rows; in captures at most 2 successive rows were equal, but a text may repeat.
LEAST_ROWS = 32
SHORT_ROWS = 8  # of one request: `RequestRuns`
MAX_RUNS = 1 << 16
_CHANCE = 1e-6


class RepeatedRows:
    """`warm-up` and `repeated-rows`: runs of 32 or more rows that are equal in all layers.

    Warm-up are the runs at the very begin, and later ones of the same choice as the first (another source's).
    Rows without any choice are no repetition. Where layers are few, equal rows may be chance: runs that the trace has
    with a probability above 1e-6, judged by how many runs go on after one row, are ignored. So are they if some parts
    of the trace repeat more than others, which shows in runs that end after 8 to 31 rows, and how far these go.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.last: np.ndarray | None = None  # ids of the last row
        self.start = 0  # of the run that the last row belongs to
        self.longer = np.zeros(5, np.int64)  # runs of at least 1, 2, 8, 16 and 32 rows
        self.found: list[tuple[int, int, bytes]] = []  # start, stop, ids

    def see(self, piece: Piece) -> None:
        """Look at the next rows."""
        flat = piece.experts.reshape(piece.rows, -1)
        same = np.empty(piece.rows, bool)
        same[0] = self.last is not None and bool((flat[0] == self.last).all())
        wide = flat.view(np.uint64) if flat.shape[1] * flat.itemsize % 8 == 0 else flat
        np.all(wide[1:] == wide[:-1], axis=1, out=same[1:])
        if piece.missing is not None:
            same &= ~piece.empty()
        breaks = np.flatnonzero(~same)  # rows that begin another run
        starts = piece.first_row + breaks
        if starts.size:
            self._ended(int(starts[0]), self.last)
            lengths = np.diff(starts, prepend=self.start)
            self.longer += [np.count_nonzero(lengths >= least) for least in (1, 2, 8, 16, LEAST_ROWS)]
            long = np.flatnonzero(np.diff(starts) >= LEAST_ROWS)
            for run in long.tolist():
                self.start = int(starts[run])
                self._ended(int(starts[run + 1]), flat[breaks[run]])
            self.start = int(starts[-1])
        self.last = flat[-1].copy()

    def _ended(self, stop: int, ids: np.ndarray | None) -> None:
        if ids is not None and stop - self.start >= LEAST_ROWS and len(self.found) < MAX_RUNS:
            self.found.append((self.start, stop, ids.tobytes()))

    def finish(self) -> None:
        """The rows are complete."""
        self._ended(self.shape.rows, self.last)
        if self.shape.top_k == self.shape.num_experts:
            self.found.clear()
        again = 0  # runs that repeat the first one, the warm-up of other sources: however many, one reason to go on
        if self.found and self.found[0][0] == 0:
            again = sum(ids == self.found[0][2] for _, _, ids in self.found[1:])
        every, two, eight, sixteen, long = (self.longer - again).tolist()
        goes_on = (two + 1) / (every + 2)
        if eight - long >= 10:  # runs are nothing special here
            goes_on = max(goes_on, _goes_on(eight - long, sixteen - long))
        self.found = [run for run in self.found if self.shape.rows * goes_on ** (run[1] - run[0] - 1) <= _CHANCE]

    def warm_up(self) -> list[tuple[int, int]]:
        """Ranges of the rows of warm-up, after `finish`."""
        rows, joined = Ranges(MAX_RUNS), 0
        for start, stop, ids in self.found:
            if start == joined:
                joined = stop
            elif not joined or ids != self.found[0][2]:
                continue
            rows.add(start, stop)
        return rows.ranges

    def findings(self, short: int, requests: int, places: Ranges, least: int) -> Iterator[Finding]:
        """The findings, with the `short` rows of `RequestRuns.judged`, of this number of requests, at these places.

        Their runs have `least` rows or more.
        """
        warm_up, rest = Ranges(), Ranges()
        known = self.warm_up()
        for start, stop in known:
            warm_up.add(start, stop)
        for start, stop, _ in self.found:
            at = bisect_right(known, start, key=lambda one: one[0]) - 1  # the last range that begins no later
            if at < 0 or start >= known[at][1]:
                rest.add(start, stop)
        count = sum(stop - start for start, stop in known)
        if count:
            share = count / self.shape.rows
            what = f"{count:,} rows ({share:.0%}), from the first on, repeat the same choices in all layers."
            yield finding("warm-up", what, count, None, warm_up)
        others = sum(stop - start for start, stop, _ in self.found) - count
        if not others and not short:
            return
        merged = Ranges()
        for start, stop in sorted([*rest.ranges, *places.ranges]):
            merged.add(start, stop)
        least, whose = (least, f" (in {many(requests, 'request')})") if short else (LEAST_ROWS, "")
        what = (
            f"{others + short:,} rows, in runs of {least} or more, repeat the choices of the row before in all "
            f"layers{whose}."
        )
        yield finding("repeated-rows", what, others + short, None, merged)


def _goes_on(runs: int, reached: int) -> float:
    """The chance of another equal row, if of this many runs that end after 8 to 31 rows this number reaches 16.

    Runs of 32 rows and more are judged, so they are not evidence. With x the chance of eight further rows, the
    share that reaches 16 is (x - x^3) / (1 - x^3) = (x + x^2) / (1 + x + x^2), and two thirds if runs hardly end.
    """
    share = (reached + 1) / (runs + 2)
    eight_more = (sqrt(1 + 4 * share / (1 - share)) - 1) / 2
    return min(eight_more, (runs + 1) / (runs + 2)) ** (1 / 8)


def run_rows(piece: Piece, ranges: list[tuple[int, int]]) -> np.ndarray:
    """bool [rows]: the rows of a piece that lie in `ranges`."""
    inside = np.zeros(piece.rows, bool)
    for start, stop in ranges:
        first, last = start - piece.first_row, stop - piece.first_row
        if last > 0 and first < piece.rows:
            inside[max(first, 0) : last] = True
    return inside
