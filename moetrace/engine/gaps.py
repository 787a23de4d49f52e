"""Gaps between the tokens of requests: which edges of steps they lie between, and how long they are."""

import numpy as np

from moetrace.engine.tokens import NONE, TURNS, last_step_of
from moetrace.jit.compile import kernel

# Gaps between tokens: `count` gaps one after another from edge `first` on, each of `stride` edges. Edge s is where step
# s begins, and s + 1 where it ends.
SPAN = np.dtype([("request", "i8"), ("first", "i8"), ("stride", "i8"), ("count", "i8")])


@kernel
def measure_gaps(book, tokens, token_steps, last_token_step, spans):
    """Add up tokens and the steps that brought some, int64 [requests]; write the gaps into ``spans``; return how many.

    Each turn is walked from its last token to its first, so its spans are in that order.
    """
    used = 0
    for number in range(book.ends[TURNS]):
        turn = book.turns[number]
        r = turn.request
        if turn.last_run == NONE:
            continue
        first_of_turn = used
        later = NONE  # the edge at which the token after those of the run was there
        at = turn.last_run
        newest = oldest = last_step_of(book.runs[at])
        while at != NONE:
            run = book.runs[at]
            tokens[r] += run.count
            edge = last_step_of(run) + 1
            token_steps[r] += 1 if run.stride == 0 else run.count
            if edge == later:
                token_steps[r] -= 1  # in the same step as the ones after it
            elif later != NONE:
                used = _add_gaps(spans, first_of_turn, used, r, edge, later - edge, 1)
            if run.stride and run.count > 1:
                used = _add_gaps(spans, first_of_turn, used, r, run.step + 1, run.stride, run.count - 1)
            oldest = run.step
            later = oldest + 1
            at = run.before
        since = turn.prompt_step + 1 if turn.prompt_step != NONE else turn.first_decode_step
        used = _add_gaps(spans, first_of_turn, used, r, since, later - since, 1)
        if oldest == last_token_step[r]:
            token_steps[r] -= 1  # the turn before ended in this very step
        last_token_step[r] = newest
    return used


@kernel
def _add_gaps(spans, first_of_turn, used, r, first, stride, count):
    """Put gaps before those of the turn that are there; return how many spans are used."""
    if used > first_of_turn:
        last = spans[used - 1]
        if last.stride == stride and stride > 0 and first + stride * count == last.first:
            last.first = first
            last.count += count
            return used
    span = spans[used]
    span.request = r
    span.first = first
    span.stride = stride
    span.count = count
    return used + 1


@kernel(inline=False)
def gap_quantiles(edge_s, spans, bounds, shares, found):
    """Write quantiles [requests, shares] of each request's gaps into ``found``, NaN where it has no gaps.

    edge_s: seconds [steps + 1]; spans: SPAN by request, those of request r from bounds[r] to bounds[r + 1] - 1.
    """
    most = 0
    for r in range(bounds.size - 1):
        gaps = 0
        for i in range(bounds[r], bounds[r + 1]):
            gaps += spans[i].count
        most = max(most, gaps)
    scratch = np.empty(most)
    for r in range(bounds.size - 1):
        size = 0
        for i in range(bounds[r], bounds[r + 1]):
            span = spans[i]
            for gap in range(span.count):
                first = span.first + gap * span.stride
                scratch[size] = edge_s[first + span.stride] - edge_s[first]
                size += 1
        if size == 0:
            found[r] = np.nan
            continue
        gaps_s = np.sort(scratch[:size])
        for q in range(shares.size):
            at = shares[q] * (size - 1)
            low = int(at)
            high = min(low + 1, size - 1)
            found[r, q] = gaps_s[low] + (at - low) * (gaps_s[high] - gaps_s[low])
