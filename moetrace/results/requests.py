"""Latencies of requests, from what the schedule says of their turns and what a policy made of the steps."""

from typing import NamedTuple

import numpy as np

from moetrace.engine.gaps import gap_quantiles
from moetrace.engine.run import AnyLane, Run
from moetrace.engine.tokens import NONE
from moetrace.engine.turns import Turns

QUANTILES = (0.5, 0.95, 0.99)

# Counts of a request that are the same under every policy.
REQUEST_COUNTS = ("turns", "tokens", "recomputed_rows", "drafted_rows", "accepted_rows")


class RequestTimes(NamedTuple):
    """Figures of each request, float64 [requests], NaN where undefined (timing model, section 4)."""

    ttft_s: np.ndarray
    ttft_max_s: np.ndarray
    tpot_s: np.ndarray
    tokens_per_s: np.ndarray
    e2e_s: np.ndarray


class Gaps(NamedTuple):
    """Seconds between tokens: each value stands for a number of gaps, its weight, in no order."""

    seconds: np.ndarray  # float64 [n]
    weight: np.ndarray  # int64 [n]


def edges_of(lane: AnyLane) -> np.ndarray:
    """Return float64 [steps + 1]: step s is from edge s to edge s + 1."""
    duration_s = lane.duration_s
    edge_s = np.zeros(len(duration_s) + 1)
    np.cumsum(duration_s, out=edge_s[1:])
    return edge_s


def request_times(run: Run, edge_s: np.ndarray) -> RequestTimes:
    """Return the latencies of each request, by ascending id."""
    requests, turns = run.schedule.requests, run.schedule.turns
    each, count = turns.each, len(requests.id)
    prompts, answers = each[each["prompt_step"] != NONE], each[each["first_decode_step"] != NONE]
    first_token_s = edge_s[prompts["prompt_step"] + 1] - edge_s[prompts["first_step"]]
    ttft_s, ttft_max_s = np.full((2, count), np.nan)
    np.fmax.at(ttft_max_s, prompts["request"], first_token_s)
    _, first_turn = np.unique(each["request"], return_index=True)
    has_prompt = each["prompt_step"][first_turn] != NONE
    _, first_prompt = np.unique(prompts["request"], return_index=True)
    ttft_s[has_prompt] = first_token_s[first_prompt[has_prompt[prompts["request"][first_prompt]]]]
    since = np.where(answers["prompt_step"] != NONE, answers["prompt_step"] + 1, answers["first_decode_step"])
    answer_s = np.zeros(count)
    np.add.at(answer_s, answers["request"], edge_s[answers["last_decode_step"] + 1] - edge_s[since])
    tpot_s = np.where(turns.tokens > 0, answer_s / np.maximum(turns.tokens, 1), np.nan)
    return RequestTimes(
        ttft_s=ttft_s,
        ttft_max_s=ttft_max_s,
        tpot_s=tpot_s,
        tokens_per_s=np.divide(1.0, tpot_s, out=np.full(count, np.nan), where=tpot_s > 0),
        e2e_s=edge_s[requests.last_step + 1] - edge_s[requests.first_step],
    )


def request_gaps(turns: Turns, edge_s: np.ndarray) -> np.ndarray:
    """Return float64 [requests, 3]: QUANTILES of the seconds between a request's tokens, NaN where it has no gaps."""
    count = len(turns.turns)
    found = np.full((count, len(QUANTILES)), np.nan)
    bounds = np.searchsorted(turns.spans["request"], np.arange(count + 1))
    gap_quantiles(edge_s, turns.spans, bounds, np.array(QUANTILES), found)
    return found


def all_gaps(turns: Turns, edge_s: np.ndarray) -> Gaps:
    """Return the seconds between the tokens of all requests.

    Nearly all gaps are one step long, and many requests share a step: memory grows with steps, and with gaps of more.
    """
    short = turns.spans["stride"] == 1
    steps, others = turns.spans[short], turns.spans[~short]
    weight = np.zeros(len(edge_s), np.int64)
    np.add.at(weight, steps["first"], 1)
    np.add.at(weight, steps["first"] + steps["count"], -1)
    weight = np.cumsum(weight)[:-1]
    stride = np.repeat(others["stride"], others["count"])
    before = np.repeat(np.cumsum(others["count"]) - others["count"], others["count"])
    first = np.repeat(others["first"], others["count"]) + (np.arange(len(before)) - before) * stride
    used = weight > 0
    seconds = np.concatenate((np.diff(edge_s)[used], edge_s[first + stride] - edge_s[first]))
    return Gaps(seconds, np.concatenate((weight[used], np.ones(len(first), np.int64))))


def weighted_quantiles(values: np.ndarray, weight: np.ndarray) -> list[float]:
    """Return QUANTILES, linear, of each value taken as often as its weight (at least 1); there is a value."""
    order = np.argsort(values, kind="stable")
    values, end = values[order], np.cumsum(weight[order])
    at = np.array(QUANTILES) * (end[-1] - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, end[-1] - 1)
    below, above = (values[np.searchsorted(end, index, side="right")] for index in (low, high))
    return (below + (at - low) * (above - below)).tolist()
