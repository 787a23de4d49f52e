"""The slow figures of requests on examples worked out by hand, and what must hold of any."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle_requests import DECODE, PREFILL, Figures, Row, all_figures, figures_of, quantile


def rows_of(*steps: str, request: int = 0) -> list[Row]:
    """One request: a string a step; `p3` is a prefill row at position 3, `d4` a decode row, `p0-3` four rows."""
    rows = []
    for step, text in enumerate(steps):
        for word in text.split():
            first, _, last = word[1:].partition("-")
            positions = range(int(first), int(last or first) + 1)
            rows += [Row(step, request, at, DECODE if word[0] == "d" else PREFILL) for at in positions]
    return rows


def seconds(*durations: float) -> tuple[list[float], list[float]]:
    ends = [math.fsum(durations[: i + 1]) for i in range(len(durations))]
    return [0.0, *ends[:-1]], ends


def of(*steps: str) -> Figures:
    """Figures where step i takes 2**i seconds: it ends at 2**(i + 1) - 1."""
    return figures_of(rows_of(*steps), *seconds(*[2.0**i for i in range(len(steps))]))


def test_a_plain_request():
    figures = of("", "p0-3", "d4", "d5", "d6")
    assert (figures.turns, figures.tokens, figures.recomputed_rows) == (1, 3, 0)
    assert (figures.drafted_rows, figures.accepted_rows) == (0, 0)
    assert figures.ttft_s == figures.ttft_max_s == 2  # all of step 1
    assert figures.gaps == [4, 8, 16]
    assert figures.tpot_s == 28 / 3


def test_a_prompt_in_pieces_with_pauses():
    figures = of("p0-1", "", "p2", "", "d3", "", "d4")
    assert figures.ttft_s == 7
    assert figures.gaps == [31 - 7, 127 - 31]
    assert figures.tpot_s == 60


def test_the_prompt_ends_in_the_step_of_the_first_token():
    figures = of("p0-1", "p2 d3", "d4")
    assert figures.ttft_s == 3
    assert figures.gaps == [0, 4]


def test_without_a_prompt():
    figures = of("", "d7", "d8")
    assert figures.turns == 1
    assert math.isnan(figures.ttft_s)
    assert math.isnan(figures.ttft_max_s)
    assert figures.gaps == [2, 4]  # from the start of its first step
    assert figures.tpot_s == 3


def test_without_an_answer():
    figures = of("p0-2", "p3")
    assert (figures.turns, figures.tokens, figures.ttft_s) == (1, 0, 3)
    assert figures.gaps == []
    assert math.isnan(figures.tpot_s)


def test_two_turns():
    # The second prompt goes on at 6, above the next position: a turn, whose first row is in step 4.
    figures = of("p0-3", "d4", "d5", "", "p6-9", "d10")
    assert (figures.turns, figures.tokens, figures.recomputed_rows) == (2, 3, 0)
    assert (figures.ttft_s, figures.ttft_max_s) == (1, 16)
    assert figures.gaps == [2, 4, 32]  # none across turns
    assert figures.tpot_s == (6 + 32) / 3


def test_a_second_turn_that_computes_the_first_again():
    # Nothing of the first turn was kept: positions 0 to 5 are computed again.
    figures = of("p0-3", "d4", "d5", "p0-9", "d10")
    assert (figures.turns, figures.recomputed_rows) == (2, 6)
    assert figures.ttft_max_s == 8


def test_a_turn_of_two_rows_begins_at_the_next_position():
    # One row at M + 1 is what a restart computes as its next token; a row more is a prompt.
    assert of("p0-3", "d4", "p5-6", "d7").turns == 2
    assert of("p0-3", "d4", "p5", "d6").turns == 1


def test_a_last_turn_without_an_answer():
    figures = of("p0-3", "d4", "p5-9")
    assert (figures.turns, figures.tokens) == (2, 1)
    assert (figures.ttft_s, figures.ttft_max_s) == (1, 4)
    assert figures.gaps == [2]
    assert figures.tpot_s == 2


def test_a_preempted_request():
    # Preempted after step 2, computed again in step 4 with its next token, position 6, in the same run.
    figures = of("p0-3", "d4", "d5", "", "p0-6", "d7")
    assert (figures.turns, figures.tokens, figures.recomputed_rows) == (1, 4, 6)
    assert (figures.ttft_s, figures.ttft_max_s) == (1, 1)
    assert figures.gaps == [2, 4, 31 - 7, 32]
    assert figures.tpot_s == 62 / 4


def test_a_preempted_request_whose_next_token_comes_later():
    figures = of("p0-3", "d4", "d5", "p0-3", "p4-5", "d6")
    assert (figures.turns, figures.tokens, figures.recomputed_rows) == (1, 3, 6)
    assert figures.gaps == [2, 4, 63 - 7]


def test_preempted_at_its_end():
    figures = of("p0-3", "d4", "p0-5")
    assert (figures.turns, figures.tokens, figures.recomputed_rows) == (1, 2, 5)
    assert figures.gaps == [2, 4]


def test_preempted_during_its_prompt():
    # No decode row comes between: one run.
    figures = of("p0-3", "p0-3", "d4")
    assert (figures.turns, figures.tokens, figures.recomputed_rows) == (1, 1, 4)
    assert figures.ttft_s == 3


def test_drafts_that_hold_and_drafts_that_do_not():
    # Step 1 guesses 5 and 6; step 2 begins at 6: the guess 6 was wrong. Step 2's 7 holds, step 3's 9 does too (its
    # last step: nobody takes it back).
    figures = of("p0-3", "d4-6", "d6-7", "d8-9")
    assert figures.tokens == 6  # 4 to 9
    assert figures.drafted_rows == 2 + 1 + 1
    assert figures.accepted_rows == 1 + 1 + 1
    assert figures.gaps == [2, 4, 8]
    assert figures.tpot_s == 14 / 6


def test_a_step_that_was_for_nothing():
    # Position 4 is computed twice: the first time brings no token.
    figures = of("p0-3", "d4", "d4", "d5")
    assert figures.tokens == 2
    assert figures.gaps == [2 + 4, 8]
    assert (figures.drafted_rows, figures.accepted_rows) == (0, 0)


def test_a_restart_takes_drafts_back():
    # 5 and 6 were guesses. M is 6: the run up to 7 is a restart, and 7 is a token.
    figures = of("p0-3", "d4-6", "p0-7", "d8")
    assert (figures.turns, figures.tokens, figures.recomputed_rows) == (1, 5, 7)
    assert figures.drafted_rows == figures.accepted_rows == 2


def test_requests_interleaved():
    mine, other = rows_of("p0-1", "d2", "", "d3"), rows_of("", "p0", "d1", "d2", request=7)
    rows = sorted(mine + other, key=lambda row: row.step)
    start_s, end_s = seconds(1, 2, 4, 8)
    figures = all_figures(rows, start_s, end_s)
    assert list(figures) == [0, 7]
    assert figures[0].gaps == [2, 12]
    assert figures[7].gaps == [4, 8]
    assert (figures[0].ttft_s, figures[7].ttft_s) == (1, 2)


def test_quantiles_interpolate():
    assert quantile([4.0, 1.0, 2.0], 0.5) == 2
    assert quantile([1.0, 2.0], 0.95) == pytest.approx(1.95)
    assert math.isnan(quantile([], 0.5))


@st.composite
def plain_requests(draw) -> list[Row]:
    """One run of prefill rows, then decode rows at ascending positions; any of both may be missing."""
    prompt, answer = draw(st.integers(0, 5)), draw(st.integers(0, 8))
    rows, step = [], 0
    for position in range(prompt + answer):
        step += draw(st.integers(0, 2))
        rows.append(Row(step, 0, position, PREFILL if position < prompt else DECODE))
    return rows


durations = st.lists(st.floats(0.001, 10), min_size=30, max_size=30)


@settings(max_examples=200, deadline=None)
@given(plain_requests().filter(bool), durations)
def test_plain_requests_are_as_in_version_1(rows, durations):
    start_s, end_s = seconds(*durations)
    figures = figures_of(rows, start_s, end_s)
    prompt, answer = ([row.step for row in rows if row.phase == phase] for phase in (PREFILL, DECODE))
    since = end_s[prompt[-1]] if prompt else start_s[rows[0].step]
    if prompt:
        assert figures.ttft_s == figures.ttft_max_s == since - start_s[rows[0].step]
    else:
        assert math.isnan(figures.ttft_s)
    if answer:
        assert figures.tpot_s == pytest.approx((end_s[answer[-1]] - since) / len(answer))
    assert (figures.turns, figures.tokens, figures.recomputed_rows) == (1, len(answer), 0)
    assert figures.drafted_rows == figures.accepted_rows == len(answer) - len(set(answer))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.booleans()), min_size=1, max_size=14), durations)
def test_any_rows_add_up(drawn, durations):
    """The gaps of a request are the times that its TPOT is made of, whatever the trace holds."""
    step, rows = 0, []
    for ahead, position, is_decode in drawn:
        step += ahead
        rows.append(Row(step, 0, position, int(is_decode)))
    figures = figures_of(rows, *seconds(*durations))
    assert 0 <= figures.accepted_rows <= figures.drafted_rows
    assert all(gap >= 0 for gap in figures.gaps)
    if figures.tokens:
        assert math.fsum(figures.gaps) == pytest.approx(figures.tpot_s * figures.tokens)
    else:
        assert figures.gaps == []
    assert len(figures.gaps) <= figures.tokens + figures.turns
