"""Rows that choose as the row before of their request, in runs that are too short to be called warm-up."""

from collections.abc import Iterator
from math import lgamma, log

import numpy as np

from moetrace.lints.finding import Finding, Ranges, finding
from moetrace.lints.piece import Piece, Shape
from moetrace.lints.repeats import LEAST_ROWS as LONG_ROWS
from moetrace.lints.repeats import SHORT_ROWS as LEAST_ROWS

SURE_ROWS = 16  # a run that is named however small its share of the trace
LEAST_SHARE = 0.01  # of the rows of the trace, from which shorter runs are named
MAX_RUNS = 1 << 16
_MOST_COPIES = 8  # of each row: one for each of 8 ranks
LEAST_TAIL = 4  # equal rows at the end of nearly all requests
_TAILS, _TAIL_REQUESTS, _REPEATING = 0.8, 16, 0.2  # share and number of requests, share of their other rows that repeat
_DOUBLED_RUNS, _DOUBLED, _TRIPLED = 32, 0.5, 0.1  # runs of 2 rows or more, their share of all, and those that go on
_LOG_CHANCE = log(1e-6)
_AROUND = 64  # rows on either side of a run that tell how often rows are equal by chance
_ENOUGH = 16


def _continuations() -> tuple[np.ndarray, np.ndarray]:
    """The share of rows that repeat the one before, in runs of 1 to 7 rows, and the chance that makes it."""
    chance = np.linspace(0, 0.995, 200)
    weights = chance[:, None] ** np.arange(LEAST_ROWS - 1)
    mean = (weights * np.arange(1, LEAST_ROWS)).sum(1) / weights.sum(1)
    return 1 - 1 / mean, chance


_SHARES, _CHANCES = _continuations()


class RequestRuns:
    """Runs of 8 rows or more of one request that are equal in all layers, judged over all requests.

    Rows of a request need not stand together: requests that decode together are followed one by one. Runs of 32 rows
    and more that do stand together are those of `RepeatedRows`. Where few layers, or a sticky router, repeat by chance,
    the rows around a run show it (64 on either side, runs of 8 and more left out): a run is judged by the side that
    repeats more. Reported are runs that the trace has with a probability below 1e-6, one by one or all together.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.length = np.zeros(0, np.int64)  # of the run that the last row of each request belongs to
        self.first = np.zeros(0, np.int64)  # its first row
        self.last = np.zeros(0, np.int64)  # its last row so far
        self.chance = np.zeros(0)  # of another equal row, as the rows around it show
        self.found: list[np.ndarray] = []  # [runs, 5]: first row, last row, length, chance, place of the request
        self.count = self.repeats = 0
        self.lengths = np.zeros(_MOST_COPIES + 2, np.int64)  # runs by rows, in the pieces

    def insert(self, at: np.ndarray) -> None:
        """Make room for new requests at these places."""
        for name in ("length", "first", "last", "chance"):
            setattr(self, name, np.insert(getattr(self, name), at, 0))
        for found in self.found:  # places that are pushed back
            found[:, 4] += np.searchsorted(at, found[:, 4], side="right")

    def see(self, piece: Piece, order: np.ndarray, same: np.ndarray, begins: np.ndarray, place: np.ndarray) -> None:
        """Look at the next rows, sorted by request by `order`.

        `same` bool [rows] says which choose as the row before of their request, `begins` where requests begin, `place`
        [requests] their places, -1 for one that is not followed.
        """
        if self.shape.top_k == self.shape.num_experts:
            return
        starts = ~same
        starts[begins] = True
        self.lengths += np.bincount(
            np.minimum(np.diff(np.flatnonzero(starts), append=same.size), _MOST_COPIES + 1), minlength=_MOST_COPIES + 2
        )
        self.repeats += int(np.count_nonzero(same))
        self._close(place[~same[begins] & (place >= 0)])
        ends = np.r_[begins[1:], same.size] - 1
        length, chance = np.ones(begins.size, np.int64), np.zeros(begins.size)  # of the run that each request ends with
        first = last = piece.first_row + order[ends]
        if (equal := np.flatnonzero(same)).size:
            first = first.copy()
            request = np.searchsorted(begins, equal, side="right") - 1
            goes_on = equal == begins[request]
            begin = np.flatnonzero(np.r_[True, (np.diff(equal) != 1) | goes_on[1:]])
            start, stop = equal[begin], equal[np.r_[begin[1:], equal.size] - 1]  # the last row
            request, goes_on = request[begin], goes_on[begin]
            at = place[request]
            rows = stop - start + 1 + np.where(goes_on, self.length[at], 1)
            begun = np.where(goes_on, self.first[at], piece.first_row + order[start - 1])
            shown = np.where(goes_on, self.chance[at], 0)
            long = rows >= LEAST_ROWS
            if long.any():
                start -= ~goes_on
                shown[long] = np.maximum(shown[long], _chance_around(same, begins, start[long], stop[long]))
            is_open = stop == ends[request]
            runs = np.stack([begun, piece.first_row + order[stop], rows, shown, at], axis=1).astype(np.float64)
            self._keep(runs[long & ~is_open])
            here = request[is_open]
            length[here], first[here], chance[here] = rows[is_open], begun[is_open], shown[is_open]
        known = place >= 0
        at = place[known]
        self.length[at], self.first[at], self.last[at], self.chance[at] = (
            values[known] for values in (length, first, last, chance)
        )

    def _close(self, places: np.ndarray) -> None:
        """The open runs of these requests have ended."""
        ended = places[self.length[places] >= LEAST_ROWS]
        if ended.size:
            columns = (self.first, self.last, self.length, self.chance)
            self._keep(np.stack([*(array[ended] for array in columns), ended], axis=1).astype(np.float64))
        self.length[places] = 0

    def _keep(self, runs: np.ndarray) -> None:
        together = (runs[:, 1] - runs[:, 0] + 1 == runs[:, 2]) & (runs[:, 2] >= LONG_ROWS)
        runs = runs[~together][: MAX_RUNS - self.count]
        if len(runs):
            self.found.append(runs)
            self.count += len(runs)

    def copies(self) -> int:
        """How many times nearly each row stands, one after another; 1 if there is no such number.

        Rows that repeat by chance go on as they began: the share of runs of two rows that have a third is that of rows
        with a second.
        """
        reached = self.lengths[::-1].cumsum()[::-1]  # runs by the rows that they have at least
        for times in range(2, _MOST_COPIES + 1):
            if reached[times] < max(_DOUBLED_RUNS, _DOUBLED * reached[1]):
                break
            if reached[times + 1] <= _TRIPLED * reached[times]:
                return times
        return 1

    def doubled(self) -> Iterator[Finding]:
        """`doubled-rows`."""
        if (times := self.copies()) > 1:
            count = times * int(self.lengths[times])
            what = f"{count:,} of {self.shape.rows:,} rows stand {times} times, one after another in their request."
            yield finding("doubled-rows", what, count)

    def judged(self) -> tuple[int, int, Ranges, int]:
        """Rows and requests that the runs have which are no chance, where they are, and the fewest rows of a run.

        A run of rows that don't stand together is shown by its first row.
        """
        tails = self._tails()
        self._close(np.arange(self.length.size))
        rows = Ranges()
        runs = self._no_chance() if self.count else np.zeros((0, 5))
        count = int(runs[:, 2].sum())
        if not count or (runs[:, 2].max() < SURE_ROWS and count < LEAST_SHARE * self.shape.rows):
            runs = runs[:0]
        least = LEAST_TAIL if len(tails) else LEAST_ROWS
        runs = np.concatenate([runs, tails])
        for first, last, length in runs[np.argsort(runs[:, 0], kind="stable"), :3].astype(np.int64).tolist():
            rows.add(first, last + 1 if last - first + 1 == length else first + 1)
        return int(runs[:, 2].sum()), np.unique(runs[:, 4]).size, rows, least

    def _tails(self) -> np.ndarray:
        """Runs of 4 to 7 rows at the ends of requests, float [runs, 5], if nearly all end so and few others repeat."""
        ends = self.length >= LEAST_TAIL
        requests = np.count_nonzero(self.length)
        others = self.shape.rows - int(self.length[ends].sum())
        repeating = self.repeats - int((self.length[ends] - 1).sum())
        few = requests < _TAIL_REQUESTS or np.count_nonzero(ends) < _TAILS * requests
        if few or repeating > _REPEATING * others:
            return np.zeros((0, 5))
        at = np.flatnonzero(ends & (self.length < LEAST_ROWS))
        columns = (self.first[at], self.last[at], self.length[at], self.chance[at], at)
        return np.stack(columns, axis=1).astype(np.float64)

    def _no_chance(self) -> np.ndarray:
        """The runs that were kept and are no chance, one by one or all together."""
        runs = np.concatenate(self.found)
        log_p = np.log(np.clip(runs[:, 3], 1e-9, 0.995))
        sure = log(self.shape.rows) + log_p * (runs[:, 2] - 1) <= _LOG_CHANCE
        expected = log(self.shape.rows) + float(np.quantile(log_p, 0.9)) * (LEAST_ROWS - 1)  # runs of 8, by chance
        if len(runs) * expected - lgamma(len(runs) + 1) <= _LOG_CHANCE:
            sure[:] = True
        return runs[sure]


def _chance_around(same: np.ndarray, begins: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The chance of another equal row, float [runs], as the rows around each run show, without rows of these runs.

    `starts` and `stops` are the first and last rows of runs. The side that repeats more counts, if it has 16 rows or
    more; else both together. Rows of other requests count only if the own has fewer than 16.
    """
    inside = np.zeros(same.size + 1, np.int8)
    inside[starts] += 1
    inside[stops + 1] -= 1
    around = np.cumsum(inside[:-1]) == 0
    around[begins] = False
    equal = np.r_[0, np.cumsum(same[around])]
    place = np.r_[0, np.cumsum(around)]
    at, request = place[starts], np.searchsorted(begins, starts, side="right") - 1
    low, high = np.maximum(at - _AROUND, 0), np.minimum(at + _AROUND, equal.size - 1)
    own_low, own_high = place[begins][request], place[np.r_[begins[1:], same.size]][request]
    own = own_high - own_low >= _ENOUGH  # requests differ in how much they repeat
    low, high = np.where(own, np.maximum(low, own_low), low), np.where(own, np.minimum(high, own_high), high)
    before = (equal[at] - equal[low] + 1) / (at - low + 2)
    after = (equal[high] - equal[at] + 1) / (high - at + 2)
    both = (equal[high] - equal[low] + 1) / (high - low + 2)
    enough_before, enough_after = at - low >= _ENOUGH, high - at >= _ENOUGH
    share = np.maximum(np.where(enough_before, before, 0), np.where(enough_after, after, 0))
    share = np.where(enough_before | enough_after, share, both)
    return np.interp(share, _SHARES, _CHANCES)
