"""Speculative decoding in a trace: which drafts were rejected, and output rows as steps that verify several at once."""

import numpy as np

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.schema import PREFILL


def kept_thousandths(verify: int | None, accept: float | None) -> int:
    """Tokens that a window of `verify` rows keeps in the mean, in thousandths: whole numbers add up exactly."""
    if verify is None:
        if accept is not None:
            raise UsageError("accept says how many tokens a verified step keeps: give verify as well.")
        return 1000
    if accept is None:
        return 1000 * verify
    if not 1 <= accept <= verify:
        raise UsageError(f"accept is {accept}, but a step that verifies {verify} rows keeps 1 to {verify} tokens.")
    return round(1000 * accept)


def is_rejected(request: np.ndarray, phase: np.ndarray, step: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Whether each row, sorted by request and time, is a draft that was not kept: bool [rows].

    The next step of the same run of output rows begins at its position or before it, but after where its own step
    began; or its own step had it already. A step that begins no later than the one before it takes nothing back: there
    the request restarts.
    """
    run_begins = np.r_[True, (request[1:] != request[:-1]) | (phase[1:] != phase[:-1])]
    run = np.cumsum(run_begins)
    begins = run_begins | np.r_[True, step[1:] != step[:-1]]  # of the rows of a step and run
    part = np.cumsum(begins) - 1
    first = np.minimum.reduceat(position.astype(np.int64), np.flatnonzero(begins))
    first_run = run[begins]
    goes_on = np.r_[(first_run[1:] == first_run[:-1]) & (first[1:] > first[:-1]), False]
    taken_back = goes_on[part] & (position >= np.r_[first[1:], 0][part])
    order = np.lexsort((position, part))
    again = np.zeros(request.size, bool)
    again[order[1:]] = (part[order[1:]] == part[order[:-1]]) & (position[order[1:]] == position[order[:-1]])
    return (phase != PREFILL) & (taken_back | again)


def rows_of_windows(
    run_end: np.ndarray, phase: np.ndarray, verify: int, kept: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lay rows out as steps take them that verify up to `verify` output rows, each `kept` / 1000 after the one before.

    Window i of a run begins at its row i * kept / 1000, rounded, and ends with the run at the latest. A run of prompt
    rows is one window.

    Args:
        run_end: Where runs of one phase of one request end, int64 [runs].
        phase: One for each row, uint8 [rows].
        verify: Rows of a window.
        kept: Tokens that a window keeps in the mean, in thousandths.
        most: Rows that may come out.

    Returns:
        Places of the rows, some more than once, int64 [new rows]; and the ends of runs in them, cut so that each window
        of less than `verify` rows is a run of its own, int64 [new runs].

    Raises:
        MoetraceError: There are more than `most`.
    """
    run_first = np.concatenate(([0], run_end[:-1]))
    size = run_end - run_first
    is_output = phase[run_first] != PREFILL
    windows = np.where(is_output, -((500 - 1000 * size) // kept), 1)
    run = np.repeat(np.arange(size.size), windows)
    number = np.arange(run.size) - np.repeat(np.cumsum(windows) - windows, windows)
    first = (number * kept + 500) // 1000
    take = np.where(is_output[run], np.minimum(verify, size[run] - first), size[run])
    if (total := int(take.sum())) > most:
        raise MoetraceError(
            f"with the rows of rejected drafts there are {total:,}, but at most {most:,} can be put in order."
        )
    end = np.cumsum(take)
    row = np.repeat(run_first[run] + first - (end - take), take) + np.arange(total)
    is_last = np.r_[(run[1:] != run[:-1]) | (take[1:] < verify), True]
    return row, end[is_last]
