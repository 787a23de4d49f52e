"""Find the answers of one request: chunks of a stream, prefill and decode servers, and turns of a conversation."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from moetrace.importers.captured import Part
from moetrace.importers.reading.spool import Spool
from moetrace.importers.reading.told import ALIKE, Told
from moetrace.trace.schema import BLOCK_BYTES

_COMPARED_ROWS = 4096  # at most, of the end of what two answers share
_FEWEST_ROWS = 4  # without ids, fewer rows than these that are equal may be chance
_SAMPLED = 8  # ids of a row that find it again; then all are compared

# Ids [rows, planes, top_k] of the positions first:stop of a stretch.
Stored = Callable[["Stretch", int, int], np.ndarray]
# Ids of the rows of an answer that an index selects.
Ids = Callable[[slice | np.ndarray], np.ndarray]
_PRIMES = np.array([1, 65537, 1000003, 15485863, 179424673, 2038074743, 32416190071, 99999999977], np.uint64)


class Stretch(NamedTuple):
    """Successive rows of a request, as one answer brought them."""

    row: int  # in the spool
    first: int  # position
    rows: int
    prompt: int | None  # tokens; later positions are decode


class Request:
    """The stretches of one request so far."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.stretches: list[Stretch] = []
        self.places: list[int] = []  # of the stretches among all
        self.prompt: int | None = None  # of the last turn
        self.begin = 2**31  # the position of the first row
        self.end = 0  # the position after the last row
        self.key: tuple[int, int | bytes] | None = None  # by which its next turn finds it
        self._claimed: list[tuple[int, int]] = []  # positions (from, to) of the stretches, in order

    def claim(self, first: int, stop: int) -> None:
        """Take note that the rows of these positions are there."""
        before = [part for part in self._claimed if part[1] < first]
        after = [part for part in self._claimed if part[0] > stop]
        touched = [(first, stop), *self._claimed[len(before) : len(self._claimed) - len(after)]]
        self._claimed = [*before, (min(a for a, _ in touched), max(b for _, b in touched)), *after]

    def unclaimed(self, first: int, stop: int) -> list[tuple[int, int]]:
        """The ranges of these positions of which no row is there yet."""
        found = []
        for start, end in self._claimed:
            found.append((first, min(start, stop)))
            first = max(first, end)
        return [(start, end) for start, end in [*found, (first, stop)] if start < end]

    def take(self, later: "Request") -> None:
        """Take all that a request has which turned out to be a later turn of this one."""
        self.stretches += later.stretches
        self.places += later.places
        self.begin, self.end = min(self.begin, later.begin), max(self.end, later.end)
        for part in later._claimed:
            self.claim(*part)
        later.stretches, later.places, later.end = [], [], 0

    def shift(self, by: int) -> None:
        """Move all that there is to later positions."""
        self.begin += by
        self.end += by
        self._claimed = [(start + by, end + by) for start, end in self._claimed]


class Conversations:
    """Finds the request that an answer continues.

    It has the id of an earlier answer and begins where that ended or later, or repeats its rows, or has the same prompt
    and ends where that began or earlier; or its prompt begins with all that an earlier answer routed, prompt and
    output: the same tokens, or the same rows where tokens are unknown.
    """

    def __init__(self, absent: int, stored: Stored) -> None:
        self._absent, self._stored = absent, stored
        self._of_id: dict[tuple[str, int], Request] = {}
        self._of_tokens: dict[tuple[int, int | bytes], Request] = {}
        self._of_rows: dict[tuple[int, int | bytes], Request] = {}
        self._lengths: tuple[list[int], list[int]] = ([], [])  # of the keys of tokens, of rows; they increase

    def of_id(self, told: Told) -> Request | None:
        """The request of an answer's id and choice, if there is one."""
        return self._of_id.get((told.id, told.choice)) if told.id else None

    def choices(self, told: Told) -> list[Request]:
        """The requests of an answer's id, of its choice and those after it."""
        found: list[Request] = []
        while told.id and (request := self._of_id.get((told.id, told.choice + len(found)))):
            found.append(request)
        return found

    def found(self, first: int, told: Told, ids: Ids, rows: int) -> Request | None:
        """The request that an answer of `rows` from position `first` on continues; `ids` gives its own."""
        known = self.of_id(told)
        if known and (
            first >= known.end
            or (first + rows <= known.begin and told.prompt == known.prompt)
            or self._alike(known, first, ids, rows, ALIKE)
        ):
            return known
        return self.earlier(first, told, ids, rows)

    def earlier(self, first: int, told: Told, ids: Ids, rows: int) -> Request | None:
        """The request of which an answer, as of `found`, is a further turn, for any id."""
        if told.prompt_ids:
            found = [self._of_tokens.get(key) for key in _prefixes(told.prompt_ids, self._lengths[0])]
            if known := next((request for request in reversed(found) if request), None):
                return known
        if first or told.prompt is None:
            return None
        lengths = self._lengths[1][: bisect_left(self._lengths[1], min(told.prompt, rows))]
        if not lengths:
            return None
        last = zip(lengths, _mixed(ids(np.array(lengths) - 1)), strict=True)
        found = sorted((self._of_rows.keys() & set(last)), reverse=True)
        requests = (self._of_rows[key] for key in found)
        return next((request for request in requests if self._alike(request, first, ids, rows, 1)), None)

    def _alike(self, request: Request, first: int, ids: Ids, rows: int, share: float) -> bool:
        """Whether an answer repeats the rows of a request where both have some; its output decides if it is there."""
        stop = min(first + rows, request.end)
        start = max(first, stop - _COMPARED_ROWS)
        same: list[np.ndarray] = []
        decoded: list[np.ndarray] = []
        for stretch in request.stretches:
            low, high = max(start, stretch.first), min(stop, stretch.first + stretch.rows)
            if low >= high:
                continue
            theirs, mine = self._stored(stretch, low, high), ids(slice(low - first, high - first))
            known = ((theirs != self._absent) & (mine != self._absent)).any(axis=(1, 2))
            same.append((theirs == mine).all(axis=2)[known])
            decoded.append(np.arange(low, high)[known] >= (2**31 if stretch.prompt is None else stretch.prompt))
        if not same:
            return False
        cells, output = np.concatenate(same), np.concatenate(decoded)
        cells = cells[output] if output.any() else cells
        return bool(cells.size == 0 or cells.mean() >= share)

    def forget(self, request: Request) -> None:
        """A request that was joined to another has no next turn."""
        for known in (self._of_tokens, self._of_rows):
            if request.key is not None and known.get(request.key) is request:
                del known[request.key]
        request.key = None

    def add(self, request: Request, told: Told, last_row: np.ndarray | None) -> None:
        """Remember how `request`, to which an answer has just been added, can be continued; its last row if known."""
        if told.id:
            self._of_id[told.id, told.choice] = request
        self.forget(request)  # a next turn repeats the whole, so its earlier end is forgotten
        if told.prompt is None or request.end <= told.prompt:  # nothing of its output was routed, so nothing repeats it
            return
        tokens, length = [*told.prompt_ids, *told.output_ids], request.end
        if told.prompt_ids and len(tokens) >= length:
            _add(self._lengths[0], length)
            request.key = next(_prefixes(tokens, [length]))
            self._of_tokens[request.key] = request
        elif length >= _FEWEST_ROWS and request.begin == 0:
            _add(self._lengths[1], length)
            if last_row is None:
                last = next(one for one in request.stretches if one.first + one.rows == length)
                rows = self._stored(last, length - 1, length)
            else:
                rows = last_row[None]
            request.key = (length, _mixed(rows)[0])
            self._of_rows[request.key] = request


def _add(lengths: list[int], length: int) -> None:
    at = bisect_left(lengths, length)
    if at == len(lengths) or lengths[at] != length:
        lengths.insert(at, length)


def _prefixes(tokens: Sequence[int], lengths: list[int]) -> Iterator[tuple[int, bytes]]:
    """The keys of the first tokens, of each of these increasing numbers of them."""
    data, done, digest = np.array(tokens, np.int64), 0, blake2b(digest_size=16)
    for length in lengths[: bisect_right(lengths, data.size)]:
        digest.update(data[done:length].tobytes())
        done = length
        yield length, digest.digest()


def _mixed(rows: np.ndarray) -> list[int]:
    """A number a row, of some of its ids."""
    flat = rows.reshape(len(rows), -1)
    some = flat[:, :: -(-flat.shape[1] // _SAMPLED)].astype(np.uint64)
    return (some @ _PRIMES[: some.shape[1]]).tolist()


def blocks_of(spool: Spool, stretches: Sequence[Stretch], layers: np.ndarray | None) -> Iterator[Part]:
    """The rows of all stretches, of some planes or all, some MiB at a time where these are in the spool's order."""
    at_once = max(1, BLOCK_BYTES // spool.row_bytes)
    if all(one.row + one.rows == other.row for one, other in pairwise(stretches)):
        parts = spool.parts()
    else:
        runs = ((at, stop) for row, _, rows, _ in stretches for at, stop in _cut(row, row + rows, at_once))
        parts = (spool.read(at, stop) for at, stop in runs)
    for part in parts:
        yield part if layers is None else {"experts": part["experts"][:, layers]}


def _cut(start: int, stop: int, at_once: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + at_once, stop)) for at in range(start, stop, at_once))
