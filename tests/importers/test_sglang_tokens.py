"""Which request a row of a per_token dump is of, against a scheduler that knows."""

from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moetrace.importers.sglang_tokens import _Pass, _requests
from moetrace.trace.schema import DECODE, PREFILL


class Request(NamedTuple):
    rank: int
    arrives: int  # pass
    prompt: int
    chunk: int
    output: int


def scheduled(requests: list[Request]) -> tuple[list[list[tuple[int, _Pass]]], list[int], bool]:
    """Passes of a continuous batch: what is to be prefilled goes first, then all decode; the truth of each row; and
    whether two requests of a rank ever expected the same position, one of them perhaps at its end."""
    done = [0] * len(requests)  # rows of each
    steps, truth, doubtful = [], [], False
    for step in range(200):
        ranks = []
        for rank in (0, 1):
            mine = [n for n, r in enumerate(requests) if r.rank == rank and r.arrives <= step]
            prompts = [n for n in mine if done[n] < requests[n].prompt]
            decodes = [n for n in mine if requests[n].prompt <= done[n] < requests[n].prompt + requests[n].output]
            expected = [done[n] for n in mine if done[n]]
            doubtful |= len(set(expected)) < len(expected)
            run = [(n, min(requests[n].chunk, requests[n].prompt - done[n])) for n in prompts] or [
                (n, 1) for n in decodes
            ]
            position = [p for n, rows in run for p in range(done[n], done[n] + rows)]
            who = [n for n, rows in run for _ in range(rows)]
            for n, rows in run:
                done[n] += rows
            if run:
                phase = np.full(len(who), PREFILL if prompts else DECODE, np.uint8)
                none = np.empty(0)
                ranks.append((rank, _Pass("", none, none, none, np.array(position), phase, [r for _, r in run], 0)))
                truth += who
        if ranks:
            steps.append(ranks)
    return steps, truth, doubtful


def numbered(values: list[int]) -> list[int]:
    """The same partition, numbered in order of appearance."""
    return [list(dict.fromkeys(values)).index(value) for value in values]


one = st.builds(
    Request,
    rank=st.integers(0, 1),
    arrives=st.integers(0, 20),
    prompt=st.integers(1, 40),
    chunk=st.sampled_from([4, 100]),
    output=st.integers(0, 20),
)


@given(st.lists(one, min_size=1, max_size=6))
def test_requests_are_those_of_the_scheduler_wherever_positions_tell(requests):
    steps, truth, doubtful = scheduled(requests)
    found = _requests(steps)
    position = [p for step in steps for _, one in step for p in one.position.tolist()]
    assert found == numbered(found), "in order of appearance"
    for request in set(found):
        own = [p for p, who in zip(position, found, strict=True) if who == request]
        assert own == list(range(len(own))), "each begins at 0 and lacks none"
    assert len(set(found)) == len(set(truth))
    if not doubtful:
        assert found == numbered(truth)
