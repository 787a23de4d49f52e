"""Output tokens of a turn: positions that decode rows brought, until a later step takes them back.

They stand in runs, so that a request that decodes one token a step is one run, however long it is.
"""

import numpy as np

from moetrace.jit.compile import kernel

NONE = -1

# A turn; an undefined step is NONE. prompt_step: the step of the last prefill row before the first decode row.
TURN = np.dtype(
    [
        ("request", "i8"),
        ("first_step", "i8"),
        ("prompt_step", "i8"),
        ("first_decode_step", "i8"),
        ("last_decode_step", "i8"),
        ("last_run", "i8"),  # its last run of tokens
    ]
)

# Accepted positions `low`, `low` + 1, ... in steps that lie `stride` apart; 0: all in one step.
RUN = np.dtype([("step", "i8"), ("low", "i8"), ("count", "i8"), ("stride", "i8"), ("before", "i8")])

TURNS, RUNS, FREE, PAGES = 0, 1, 2, 3  # of a book's `ends`: how many are used; the first run that is free again


@kernel
def accept(book, number, step, at):
    """Accept position ``at`` in a turn, and take back those from it on that earlier steps had accepted."""
    turn, runs = book.turns[number], book.runs
    aside = NONE  # higher ones of this very step
    while turn.last_run != NONE:
        last = turn.last_run
        run = runs[last]
        if last_step_of(run) < step:
            if run.low + run.count <= at:
                break
            if run.low < at:
                run.count = at - run.low
                break
            turn.last_run = run.before
            _free(book, last)
            continue
        if run.low + run.count <= at:
            break
        if run.stride == 0 or run.count == 1:
            if run.low <= at:
                at = NONE  # there already
                break
            turn.last_run = run.before
            run.before = aside
            aside = last
            continue
        if run.low + run.count - 1 == at:
            at = NONE
            break
        run.count -= 1  # its last one is of this step
        aside = _new_run(book, step, run.low + run.count, aside)
    if at != NONE:
        append(book, number, step, at)
    while aside != NONE:
        run = runs[aside]
        after = run.before
        run.before = turn.last_run
        turn.last_run = aside
        aside = after


@kernel
def append(book, number, step, at):
    """Append position ``at``, which is higher than all of the turn, to its last run or as a run of its own."""
    turn = book.turns[number]
    if turn.last_run != NONE:
        run = book.runs[turn.last_run]
        stride = step - last_step_of(run)
        if run.low + run.count == at and (run.count == 1 or run.stride == stride):
            run.stride = stride
            run.count += 1
            return
    turn.last_run = _new_run(book, step, at, turn.last_run)


@kernel
def last_step_of(run):
    """The step of the last position of a run."""
    return run.step + (run.count - 1) * run.stride


@kernel
def _new_run(book, step, at, before):
    """Make a run of one position; return its number."""
    number = book.ends[FREE]
    if number != NONE:
        book.ends[FREE] = book.runs[number].before
    else:
        number = book.ends[RUNS]
        book.ends[RUNS] = number + 1
    run = book.runs[number]
    run.step = step
    run.low = at
    run.count = 1
    run.stride = 0
    run.before = before
    return number


@kernel
def _free(book, number):
    """Give a run back."""
    book.runs[number].before = book.ends[FREE]
    book.ends[FREE] = number
