"""Who is in which step: the first pass over a trace, over rows and steps only."""

from typing import NamedTuple

import numpy as np

from moetrace.engine.turns import Turns, new_book, note_rows, turns_of
from moetrace.jit.compile import kernel
from moetrace.trace.format import Block, Rows, Trace
from moetrace.trace.schema import check_requests

PREFILL, DECODE, MIXED = 0, 1, 2


class Requests(NamedTuple):
    """One entry a request, by ascending id; steps are -1 where undefined."""

    id: np.ndarray  # int64
    prompt_rows: np.ndarray  # int64
    output_rows: np.ndarray  # int64
    first_step: np.ndarray  # int64
    last_step: np.ndarray  # int64
    first_prefill_step: np.ndarray  # int64
    last_prefill_step: np.ndarray  # int64
    first_decode_step: np.ndarray  # int64
    last_decode_step: np.ndarray  # int64


class Schedule(NamedTuple):
    """The steps of a trace and the requests in them."""

    rows: np.ndarray  # int64 [steps]: T
    kv_tokens: np.ndarray  # int64 [steps]: C, cached tokens attended to
    phase: np.ndarray  # uint8 [steps]
    prompt_ends: np.ndarray  # uint8 [steps]: whether a prefill ends in the step
    requests: Requests
    turns: Turns


class _Latest(NamedTuple):
    """For each request, int64 [requests]: its latest step so far, and its highest position + 1 in that."""

    step: np.ndarray
    position: np.ndarray


def schedule_of(trace: Trace) -> Schedule:
    """Read who is in which step, in blocks; memory grows with steps and requests, not with rows.

    Data is compared with its sha256 when read; raises MoetraceError if it differs.
    """
    ids = np.zeros(0, np.int64)
    for block in trace.row_blocks(compare=True):
        ids = np.union1d(ids, block.request)
        check_requests(trace.shown, len(ids))
    n = len(ids)
    requests = Requests(
        ids.astype(np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64), *(np.full(n, -1) for _ in range(6))
    )
    kv_tokens = np.zeros(trace.steps, np.int64)
    latest = _Latest(np.full(n, -1), np.zeros(n, np.int64))
    book = new_book(n)
    for block in trace.row_blocks():
        offset = np.ascontiguousarray(block.offset, np.int64)
        position = np.ascontiguousarray(block.position, np.int32)
        rows = (request_index(requests, block), position, np.ascontiguousarray(block.phase, np.uint8))
        _scan(block.first_step, offset, *rows, requests, kv_tokens, latest)
        book = note_rows(book, block.first_step, offset, rows)
    prompt_ends = np.zeros(trace.steps, np.uint8)
    prompt_ends[requests.last_prefill_step[requests.last_prefill_step >= 0]] = 1
    return Schedule(np.diff(trace.offset), kv_tokens, trace.phase, prompt_ends, requests, turns_of(book))


def request_index(requests: Requests, block: Block | Rows) -> np.ndarray:
    """Return int64 [rows]: where the request of each row of a block stands in ``requests``."""
    ids = requests.id
    if len(ids) and ids[0] == 0 and ids[-1] == len(ids) - 1:
        return block.request.astype(np.int64)
    return np.searchsorted(ids, block.request)


def places_of(first_step: np.ndarray, last_step: np.ndarray) -> tuple[np.ndarray, int]:
    """Return a place of each request (int32 [requests], -1 where ``first_step`` is) and how many places there are.

    Requests that are never under way together share a place, so memory grows with concurrency, not with requests.
    """
    place = np.full(len(last_step), -1, np.int32)
    order = np.argsort(last_step, kind="stable")
    free: list[int] = []
    places, over = 0, 0
    for request in np.argsort(first_step, kind="stable"):
        if first_step[request] < 0:
            continue
        while last_step[order[over]] < first_step[request]:
            if place[order[over]] >= 0:
                free.append(int(place[order[over]]))
            over += 1
        if not free:
            free.append(places)
            places += 1
        place[request] = free.pop()
    return place, places


@kernel
def _scan(first_step, offset, request, position, phase, requests, kv_tokens, latest):
    """Note the rows of a block (int [rows]) in ``requests`` and kv_tokens int64 [steps]."""
    seen_in, highest = latest.step, latest.position
    for s in range(offset.size - 1):
        step = first_step + s
        for row in range(offset[s], offset[s + 1]):
            r = request[row]
            tokens = np.int64(position[row]) + 1
            if seen_in[r] != step:
                seen_in[r] = step
                highest[r] = 0
            if tokens > highest[r]:
                kv_tokens[step] += tokens - highest[r]
                highest[r] = tokens
            if requests.first_step[r] < 0:
                requests.first_step[r] = step
            requests.last_step[r] = step
            if phase[row] == PREFILL:
                requests.prompt_rows[r] += 1
                requests.last_prefill_step[r] = step
                if requests.first_prefill_step[r] < 0:
                    requests.first_prefill_step[r] = step
            else:
                requests.output_rows[r] += 1
                requests.last_decode_step[r] = step
                if requests.first_decode_step[r] < 0:
                    requests.first_decode_step[r] = step
