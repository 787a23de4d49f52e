"""Turns, restarts, drafts and latencies of requests against their slow reference, on schedules drawn at random."""

from itertools import pairwise

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.oracle_requests import DECODE, PREFILL, Row, all_figures, quantile

import moetrace as mt
from moetrace.engine.gaps import SPAN
from moetrace.engine.turns import Turns, new_book, note_rows, turns_of
from moetrace.results.requests import QUANTILES, REQUEST_COUNTS, all_gaps, request_gaps, weighted_quantiles

Drawn = list[tuple[int, int, int]]  # step, position, phase of each row


@st.composite
def wild(draw) -> Drawn:
    """Draw rows of one request in any order of positions and phases, several in a step."""
    rows, step = [], 0
    far = draw(st.sampled_from([1, 70]))  # 70: positions on different pages of 64
    for ahead, position, phase in draw(st.lists(st.tuples(*map(st.integers, (0, 0, 0), (1, 7, 1))), max_size=16)):
        step += ahead
        rows.append((step, far * position, phase))
    return rows


@st.composite
def served(draw) -> Drawn:
    """Draw a request as an engine serves it: turns of a prompt in chunks, then tokens with drafts and restarts."""
    rows: Drawn = []
    step, done = draw(st.integers(0, 3)), draw(st.sampled_from([0, 0, 64, 130]))
    for _ in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(0, 3))):
            size = draw(st.integers(1, 4))
            rows += [(step, done + i, PREFILL) for i in range(size)]
            done += size
            step += draw(st.integers(0, 2))
        for _ in range(draw(st.integers(0, 6))):
            step += draw(st.sampled_from([1, 1, 1, 2]))
            drafts = draw(st.sampled_from([0, 0, 0, 1, 3]))
            rows += [(step, done + i, DECODE) for i in range(drafts + 1)]
            done += 1 + draw(st.integers(0, drafts))
            if draw(st.integers(0, 7)) == 0:  # preempted
                step += 1
                rows += [(step, i, PREFILL) for i in range(draw(st.integers(0, 2)), done + 1)]
                done += 1
        step += draw(st.integers(0, 2))
        done += draw(st.sampled_from([0, 0, 1, 70]))
    return rows


@st.composite
def schedules(draw) -> list[Row]:
    """Draw rows of up to four requests in the order of a trace; each step has some."""
    each = draw(st.lists(wild() | served(), min_size=1, max_size=4))
    rows = [Row(step, 10 * r, at, phase) for r, drawn in enumerate(each) for step, at, phase in drawn]
    rows = rows or [Row(0, 0, 0, PREFILL)]
    ordered = sorted(rows, key=lambda row: row.step)  # stable: the rows of a request stay in order
    number = {step: i for i, step in enumerate(sorted({row.step for row in rows}))}
    return [Row(number[row.step], row.request, row.position, row.phase) for row in ordered]


def edges(rows: list[Row], seed: int) -> np.ndarray:
    steps = rows[-1].step + 1
    return np.concatenate(([0.0], np.cumsum(np.random.default_rng(seed).integers(1, 1000, steps)))) / 1024


def turns_from(rows: list[Row], blocks: int = 1) -> Turns:
    """Scan the rows, cut into blocks of whole steps."""
    ids = sorted({row.request for row in rows})
    book = new_book(len(ids))
    cuts = np.unique(np.linspace(0, rows[-1].step + 1, blocks + 1).astype(int))
    for first, stop in pairwise(cuts.tolist()):
        block = [row for row in rows if first <= row.step < stop]
        offset = np.array([sum(row.step < step for row in block) for step in range(first, stop + 1)])
        request = np.array([ids.index(row.request) for row in block])
        position = np.array([row.position for row in block], np.int32)
        book = note_rows(book, first, offset, (request, position, np.array([row.phase for row in block], np.uint8)))
    return turns_of(book)


def check(rows: list[Row], turns: Turns, edge_s: np.ndarray) -> None:
    expected = all_figures(rows, edge_s[:-1].tolist(), edge_s[1:].tolist())
    for name in REQUEST_COUNTS:
        assert getattr(turns, name).tolist() == [getattr(figures, name) for figures in expected.values()], name
    by_request = [[quantile(figures.gaps, q) for q in QUANTILES] for figures in expected.values()]
    np.testing.assert_allclose(request_gaps(turns, edge_s), by_request, rtol=1e-12)
    gaps = [gap for figures in expected.values() for gap in figures.gaps]
    seconds, weight = all_gaps(turns, edge_s)
    assert weight.sum() == len(gaps)
    np.testing.assert_allclose(np.sort(np.repeat(seconds, weight)), sorted(gaps), rtol=1e-12)
    if gaps:
        np.testing.assert_allclose(weighted_quantiles(seconds, weight), np.quantile(gaps, QUANTILES), rtol=1e-12)


@settings(max_examples=300, deadline=None)
@given(schedules(), st.integers(1, 4), st.integers(0, 2**32))
@example([Row(0, 0, 0, PREFILL)], 1, 0)
def test_any_schedule(rows, blocks, seed):
    check(rows, turns_from(rows, blocks), edges(rows, seed))


@settings(max_examples=40, deadline=None)
@given(schedules(), st.integers(0, 2**32))
def test_the_frame_of_a_replay(rows, seed):
    """Every column, by the steps that the replay took, and the figures of the summary."""
    trace = mt.Trace.from_arrays(
        np.random.default_rng(seed).integers(0, 4, (len(rows), 2, 1)).astype(np.uint8),
        num_experts=4,
        request=np.array([row.request for row in rows], np.int32),
        position=np.array([row.position for row in rows], np.int32),
        row_phase=np.array([row.phase for row in rows], np.uint8),
        steps=np.bincount([row.step for row in rows]),
        phase=np.array([phase_of(rows, step) for step in range(rows[-1].step + 1)], np.uint8),
    )
    result = mt.replay(trace, model=small(), system="edge-ndp", policies="ndp-ep")
    start_s = result.steps["start_s"].to_list()
    figures = all_figures(rows, start_s, (result.steps["start_s"] + result.steps["duration_s"]).to_list())
    for column in (*REQUEST_COUNTS, "ttft_s", "ttft_max_s", "tpot_s"):
        theirs = [getattr(each, column) for each in figures.values()]
        ours = result.requests[column].to_numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-15, err_msg=column)
    (policy,) = result.to_dict()["policies"]
    gaps = [gap for each in figures.values() for gap in each.gaps]
    for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        expected = np.quantile(gaps, q) if gaps else None
        assert policy["itl_s"][name] is None if expected is None else np.isclose(policy["itl_s"][name], expected)
    tokens = sum(each.tokens for each in figures.values())
    assert result.to_dict()["trace"]["tokens"] == tokens
    assert np.isclose(policy["tokens_per_s"], tokens / policy["total_s"])


def phase_of(rows: list[Row], step: int) -> int:
    phases = {row.phase for row in rows if row.step == step}
    return phases.pop() if len(phases) == 1 else 2


def small() -> mt.Model:
    return mt.Model(
        name="small",
        moe_layers=2,
        experts=4,
        top_k=1,
        hidden=64,
        expert_intermediate=64,
        expert_matrices=1,
        weight_bits=16,
        dense_weight_bits=16,
        dense_params_per_layer=2**16,
        once_params=0,
        kv_bytes_per_token_layer=0,
    )


def test_a_long_answer_takes_no_memory():
    """A token a step, or every second step, is one span, however long; drafts that fail leave nothing behind."""
    steps = 3000
    plain = [Row(step, 0, step, DECODE) for step in range(steps)]
    every_second = [Row(2 * step, 1, step, DECODE) for step in range(steps)]
    drafts = [Row(step, 2, step + i, DECODE) for step in range(steps) for i in range(3)]
    rows = sorted(plain + every_second + drafts, key=lambda row: row.step)
    turns = turns_from(rows, blocks=3)
    spans = turns.spans.tolist()
    assert [span for span in spans if span[0] == 0] == [(0, 0, 1, steps)]
    assert [span for span in spans if span[0] == 1] == [(1, 1, 2, steps - 1), (1, 0, 1, 1)]
    assert [span for span in spans if span[0] == 2] == [(2, 0, 1, steps)]
    assert turns.drafted_rows.tolist() == [0, 0, 2 * steps]
    assert turns.accepted_rows.tolist() == [0, 0, 2]  # of the last step, which nothing takes back
    assert turns.tokens.tolist() == [steps, steps, steps + 2]


def test_many_positions_apart():
    """Positions that never stand together: what was seen is found again, while the table of them grows."""
    rows = [Row(step, 0, 100 * (step * 7919 % 2000), PREFILL) for step in range(2000)]
    again = [Row(2000 + step, 0, 100 * step, PREFILL) for step in range(2000)]
    assert turns_from(rows).recomputed_rows.tolist() == [0]
    assert turns_from(rows + again, blocks=2).recomputed_rows.tolist() == [2000]


def test_nothing_to_measure():
    edge_s = np.array([0.0, 1.0])
    empty = Turns(*np.zeros((5, 1), np.int64), each=turns_of(new_book(0)).each, spans=np.zeros(0, SPAN))
    assert np.isnan(request_gaps(empty, edge_s)).all()
    assert all_gaps(empty, edge_s).seconds.size == 0
