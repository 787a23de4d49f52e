"""Turns, restarts and drafts: the steps between which latencies of requests are measured, for any policy.

A request may have more than one prompt, be preempted and computed again, and guess ahead (timing model, section 4). The
scan keeps a few numbers for each request and turn. Tokens that a later row may still take back stand in runs: a request
that decodes one token a step is one run, however long it is.
"""

from typing import NamedTuple

import numpy as np

from moetrace.engine.gaps import SPAN, measure_gaps
from moetrace.engine.state import records
from moetrace.engine.tokens import NONE, PAGES, RUN, RUNS, TURN, TURNS, accept, append
from moetrace.jit.compile import kernel
from moetrace.jit.random import mix
from moetrace.trace.schema import PREFILL

# The positions of a request that were seen, by pages of 64, apart from its run from `low` to `stop` - 1.
_PAGE = np.dtype([("key", "u8"), ("bits", "u8")])

_REQUEST = np.dtype(
    [
        ("turn", "i8"),
        ("turns", "i8"),
        ("highest", "i8"),
        ("low", "i8"),  # positions low to stop - 1 were seen, and what pages say
        ("stop", "i8"),
        ("has_pages", "i8"),
        ("recomputed", "i8"),
        ("decode_rows", "i8"),
        ("decode_steps", "i8"),
        ("last_decode_step", "i8"),
        # A run of prefill rows after a decode row is a restart or a new turn: that shows when it ends.
        ("in_doubt", "i8"),
        ("before", "i8"),  # the highest position before it
        ("first_step", "i8"),
        ("last_step", "i8"),
        ("next_rows", "i8"),  # at position before + 1, which a restart computes as its next token
        ("next_seen", "i8"),
        ("next_steps", "i8"),
        ("next_first_step", "i8"),
        ("next_last_step", "i8"),
    ]
)

_ROOM = 4  # runs and turns that a row may need
_ONE, _SHIFT, _LOW_BITS = np.uint64(1), np.uint64(32), np.uint64(63)


class Turns(NamedTuple):
    """The ends of the measured latencies, by ascending id of the request."""

    turns: np.ndarray  # int64 [requests]
    tokens: np.ndarray  # int64 [requests]: accepted positions of decode rows
    recomputed_rows: np.ndarray  # int64 [requests]
    drafted_rows: np.ndarray  # int64 [requests]
    accepted_rows: np.ndarray  # int64 [requests]
    each: np.ndarray  # TURN, by time; its requests are places in the arrays above
    spans: np.ndarray  # SPAN, by request


class Book(NamedTuple):
    """The state of the scan; the last three grow."""

    requests: np.ndarray  # _REQUEST
    ends: np.ndarray  # int64 [4]
    turns: np.ndarray  # TURN
    runs: np.ndarray  # RUN
    pages: np.ndarray  # _PAGE [a power of two], a hash table; key 0 = free


def new_book(requests: int) -> Book:
    """Return an empty book for that many requests."""
    state = records(requests, _REQUEST)
    for name in ("turn", "highest", "low", "stop", "last_decode_step"):
        state[name] = NONE
    first = requests + _ROOM
    return Book(state, np.array([0, 0, NONE, 0]), records(first, TURN), records(first, RUN), records(64, _PAGE))


def note_rows(book: Book, first_step: int, offset: np.ndarray, rows: tuple[np.ndarray, ...]) -> Book:
    """Note a block of rows: request (its place), position and phase, [rows] each; return the book, which may grow."""
    done = 0
    while done < len(rows[0]):
        book = _grown(book)
        done = _note(book, first_step, offset, rows[0], rows[1], rows[2], done)
    return book


def turns_of(book: Book) -> Turns:
    """Close the book after the last row."""
    done = 0
    while done < len(book.requests):
        book = _grown(book)
        done = _settle_all(book, done)
    turns, state = book.turns[: book.ends[TURNS]], book.requests
    spans = records(2 * book.ends[RUNS] + len(turns), SPAN)
    tokens, token_steps = np.zeros((2, len(state)), np.int64)
    spans = spans[: measure_gaps(book, tokens, token_steps, np.full(len(state), NONE), spans)]
    return Turns(
        turns=state["turns"].copy(),
        tokens=tokens,
        recomputed_rows=state["recomputed"].copy(),
        drafted_rows=state["decode_rows"] - state["decode_steps"],
        accepted_rows=tokens - token_steps,
        each=turns.copy(),
        spans=spans[np.argsort(spans["request"], kind="stable")],
    )


def _grown(book: Book) -> Book:
    """Return the book with room for one more row at least."""
    turns, runs, pages = book.turns, book.runs, book.pages
    if len(turns) - book.ends[TURNS] < _ROOM:
        turns = _longer(turns)
    if len(runs) - book.ends[RUNS] < _ROOM:
        runs = _longer(runs)
    if _is_full(book.ends[PAGES], len(pages)):
        pages = records(2 * len(pages), _PAGE)
        _move_pages(book.pages, pages)
    return book._replace(turns=turns, runs=runs, pages=pages)


def _longer(array: np.ndarray) -> np.ndarray:
    longer = records(2 * len(array), array.dtype)
    longer[: len(array)] = array
    return longer


@kernel
def _is_full(used, size):
    """Whether a hash table of ``size`` places wants to be larger before another is used."""
    return 2 * (used + 1) > size


@kernel
def _has_room(book):
    """Whether any row finds room in the book."""
    ends = book.ends
    return (
        book.turns.size - ends[TURNS] >= _ROOM
        and book.runs.size - ends[RUNS] >= _ROOM
        and not _is_full(ends[PAGES], book.pages.size)
    )


@kernel
def _note(book, first_step, offset, request, position, phase, done):
    """Note the rows of a block from row ``done`` on, while there is room; return how many are done."""
    requests = book.requests
    for s in range(offset.size - 1):
        for row in range(max(offset[s], done), offset[s + 1]):
            if not _has_room(book):
                return row
            step, at, r = first_step + s, np.int64(position[row]), request[row]
            state = requests[r]
            if state.turn == NONE:
                _begin_turn(book, r, step)
            was_seen = _see(book, r, at)
            if phase[row] != PREFILL:
                if state.in_doubt:
                    _settle(book, r)
                _count_decode(book, r, 1, 1, step, step)
                accept(book, state.turn, step, at)
            elif book.turns[state.turn].first_decode_step == NONE:
                book.turns[state.turn].prompt_step = step
                state.recomputed += was_seen
            else:
                _doubt(state, step, at, was_seen)
            state.highest = max(state.highest, at)
    return offset[-1]


@kernel
def _begin_turn(book, r, step):
    """Begin a turn of request ``r`` in the step."""
    number = book.ends[TURNS]
    book.ends[TURNS] = number + 1
    turn = book.turns[number]
    turn.request = r
    turn.first_step = step
    turn.prompt_step = turn.first_decode_step = turn.last_decode_step = turn.last_run = NONE
    book.requests[r].turn = number
    book.requests[r].turns += 1


@kernel
def _doubt(state, step, at, was_seen):
    """Note a prefill row at position ``at`` that comes after a decode row of the request."""
    if not state.in_doubt:
        state.in_doubt = 1
        state.before = state.highest
        state.first_step = step
        state.next_rows = state.next_seen = state.next_steps = 0
        state.next_first_step = state.next_last_step = NONE
    state.last_step = step
    if at == state.before + 1:
        state.next_rows += 1
        state.next_seen += was_seen
        if state.next_last_step != step:
            state.next_steps += 1
        if state.next_first_step == NONE:
            state.next_first_step = step
        state.next_last_step = step
    else:
        state.recomputed += was_seen


@kernel
def _settle(book, r):
    """Decide what the run of prefill rows that ends here was: a turn if it went beyond the next position."""
    state = book.requests[r]
    state.in_doubt = 0
    if state.highest > state.before + 1:
        state.recomputed += state.next_seen
        _begin_turn(book, r, state.first_step)
        book.turns[state.turn].prompt_step = state.last_step
    elif state.next_rows:
        # The next token. No row took anything back, but the last of several at its position.
        _count_decode(book, r, state.next_rows, state.next_steps, state.next_first_step, state.next_last_step)
        append(book, state.turn, state.next_last_step, state.before + 1)


@kernel
def _settle_all(book, done):
    """Settle the requests from ``done`` on, while there is room; return how many are done."""
    for r in range(done, book.requests.size):
        if not _has_room(book):
            return r
        if book.requests[r].in_doubt:
            _settle(book, r)
    return book.requests.size


@kernel
def _count_decode(book, r, rows, steps, first_step, last_step):
    """Count decode rows of the turn under way, in ``steps`` steps from the first to the last."""
    state, turn = book.requests[r], book.turns[book.requests[r].turn]
    state.decode_rows += rows
    state.decode_steps += steps - (1 if state.last_decode_step == first_step else 0)
    state.last_decode_step = last_step
    if turn.first_decode_step == NONE:
        turn.first_decode_step = first_step
    turn.last_decode_step = last_step


@kernel
def _see(book, r, at):
    """Note that request ``r`` has a row at position ``at``; return 1 if it had one before, else 0."""
    state = book.requests[r]
    if state.stop == NONE:
        state.low = at
        state.stop = at + 1
        return 0
    if state.low <= at < state.stop:
        return 1
    if at == state.stop and not state.has_pages:
        state.stop += 1
        return 0
    state.has_pages = 1
    key = (np.uint64(r) << _SHIFT) + (np.uint64(at) // np.uint64(64)) + _ONE
    place = _place(book.pages, key)
    page = book.pages[place]
    if page.key == 0:
        page.key = key
        book.ends[PAGES] += 1
    bit = _ONE << (np.uint64(at) & _LOW_BITS)
    if page.bits & bit:
        return 1
    page.bits |= bit
    return 0


@kernel
def _place(pages, key):
    """Where a key stands in the hash table, or would."""
    mask = np.uint64(pages.size - 1)
    place = mix(key) & mask
    while pages[place].key != 0 and pages[place].key != key:
        place = (place + _ONE) & mask
    return place


@kernel
def _move_pages(old, new):
    """Copy a hash table into a larger one."""
    for i in range(old.size):
        if old[i].key != 0:
            place = _place(new, old[i].key)
            new[place].key = old[i].key
            new[place].bits = old[i].bits
