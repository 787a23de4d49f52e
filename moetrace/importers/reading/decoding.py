"""Phases, requests and steps as the user says them: which rows, or which passes, decode."""

from collections.abc import Sequence

import numpy as np

from moetrace.importers.captured import Capture
from moetrace.trace.ranges import Range, inside, merged
from moetrace.trace.schema import DECODE, PREFILL

# How requests are found in passes that do not name the request of a row.
LANES = "not recorded: row j of a decode pass is taken to continue row j of the pass before, after a prompt the prompts"


def phase_after(request: np.ndarray, decode_after: int, counted: np.ndarray) -> np.ndarray:
    """Phase uint8 [rows] where the first `decode_after` `counted` (bool [rows]) rows of each request are its prompt."""
    order = np.argsort(request, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(request[order])) + 1]
    before = np.cumsum(counted[order]) - counted[order]
    number = np.empty(request.size, np.int64)  # of each row among the counted ones of its request
    number[order] = before - np.repeat(before[starts], np.diff(np.r_[starts, request.size]))
    return np.where(~counted | (number < decode_after), PREFILL, DECODE).astype(np.uint8)


def steps_of(request: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """bool [rows]: where a step begins: with a run of prefill rows of one request, and each decode row."""
    return np.r_[True, (phase[1:] == DECODE) | (phase[:-1] == DECODE) | (request[1:] != request[:-1])]


def kept_passes(capture: Capture, request: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """Rows int64 [steps] of each step where `phase` [rows] is the user's and the source recorded passes.

    A pass stays a step, unless a row decodes in it that the source calls prefill and is not its request's only one: a
    text that was fed in at once, of which each decode row becomes a step.
    """
    assert capture.step_rows is not None
    sizes = capture.step_rows
    begins = np.zeros(request.size, bool)
    begins[np.cumsum(sizes) - sizes] = True
    step = np.cumsum(begins) - 1
    _, pair, count = np.unique(step * (int(request.max()) + 1) + request, return_inverse=True, return_counts=True)
    fed = np.zeros(sizes.size, bool)
    fed[step[(phase == DECODE) & (capture.phase == PREFILL) & (count[pair] > 1)]] = True
    begins |= fed[step] & steps_of(request, phase)
    return np.diff(np.r_[np.flatnonzero(begins), request.size])


def decoding_passes(total: int, first: int, ranges: Sequence[Range]) -> np.ndarray:
    """bool [total - first]: which of the passes from number `first` on lie in `ranges`."""
    rows = merged("steps", ranges, total)
    assert rows is not None
    return inside(np.arange(first, total), rows)


def lanes(capture: Capture, request: np.ndarray, decodes: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Requests and positions int64 [rows] where `decodes` (bool [passes]) decode, if the source does not know them.

    It does not if a request has several rows in such a pass. Then row j continues row j of the pass before, and those
    that prefilled since come behind; rows beyond them begin requests.
    """
    assert capture.step_rows is not None
    sizes, position = capture.step_rows, np.array(capture.position, np.int64)
    step = np.repeat(np.arange(sizes.size), sizes)
    rows = np.flatnonzero(decodes[step])
    pairs = np.stack([step[rows], request[rows]])
    if np.unique(pairs, axis=1).shape[1] == rows.size:
        return None
    request = np.array(request, np.int64)
    fresh = int(request.max()) + 1
    live: list[int] = []
    ends: dict[int, int] = {}
    new: list[int] = []  # that prefilled since the last decode pass
    start = 0
    for size, decode in zip(sizes.tolist(), decodes.tolist(), strict=True):
        part = slice(start, start + size)
        start += size
        if not decode:
            for one, at in zip(request[part].tolist(), position[part].tolist(), strict=True):
                if one not in ends:
                    new.append(one)
                ends[one] = at + 1
            continue
        live = (live + new)[:size]
        new = []
        while len(live) < size:
            live.append(fresh)
            fresh += 1
        request[part] = live
        position[part] = [ends.get(one, 0) for one in live]
        ends |= {one: ends.get(one, 0) + 1 for one in live}
    return request, position
