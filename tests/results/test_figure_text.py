"""Digits and units for people: what is not zero never reads as zero, and nothing is told wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrace.results.figure import Figure
from moetrace.results.figure_text import amount, beyond, digits, percent, shown_unit

BYTES, SECONDS, USD = (Figure(unit, "") for unit in ("bytes", "s", "USD"))
VALUES = st.lists(st.none() | st.just(0.0) | st.floats(1e-12, 1e12) | st.floats(-1e6, -1e-9), max_size=6)


@given(VALUES, st.integers(0, 3), st.integers(1, 4), st.booleans())
def test_no_figure_above_zero_is_shown_as_zero(values, places, significant, signed):
    texts = digits(values, places, significant, signed)
    plain = {text.partition(".")[2] for text in texts if text != "-" and "e" not in text}
    assert len({len(behind) for behind in plain}) <= 1  # the same digits behind the point
    for value, text in zip(values, texts, strict=True):
        if value is None:
            assert text == "-"
            continue
        read = float(text.replace(",", ""))
        assert (read == 0) == (value == 0)
        assert not text.startswith("-0.0") or read != 0
        behind = len(text.partition(".")[2])
        assert abs(read - value) <= (0.5 * abs(value) if "e" in text else 0.5 * 10**-behind + 1e-12 * abs(value))
        assert text.startswith("+") == (signed and value >= 0)


@pytest.mark.parametrize(
    ("values", "asked", "texts"),
    [
        ([12957.5, 0.04, None], (1,), ["12,957.50", "0.04", "-"]),
        ([12957.5, 2e-5], (1,), ["12,957.5", "2e-05"]),
        ([0.71, 1.01], (2,), ["0.71", "1.01"]),
        ([0.0004, 0.5], (1,), ["0.0004", "0.5000"]),
        ([0.004, 0.5], (1,), ["0.004", "0.500"]),
        ([-0.0], (1,), ["0.0"]),
        ([], (1,), []),
    ],
)
def test_a_column_has_the_digits_that_its_smallest_value_needs(values, asked, texts):
    assert digits(values, *asked) == texts


@pytest.mark.parametrize(
    ("figure", "value", "text"),
    [
        (BYTES, 2.3e9, "2.3 GB"),
        (BYTES, 4.1e6, "4.1 MB"),
        (BYTES, 2048.0, "2.0 kB"),
        (BYTES, 7.0, "7.0 B"),
        (BYTES, 0.0, "0.0 GB"),
        (SECONDS, 0.0123, "12.3 ms"),
        (SECONDS, 2.5e-6, "2.5 µs"),
        (SECONDS, 3e-12, "0.0030 ns"),
        (USD, 1.9e-6, "0.0000019 USD"),
    ],
)
def test_units_follow_the_size(figure, value, text):
    assert amount(value, figure) == text


def test_a_column_has_one_unit_by_its_largest_value():
    assert shown_unit(BYTES, [None, 5e5, 5e9]) == (1e-9, "GB")
    assert shown_unit(BYTES, [None, 5e5, 0.0]) == (1e-6, "MB")
    assert shown_unit(BYTES, []) == (1e-9, "GB")
    assert shown_unit(USD, [1e-9]) == (1.0, "USD")


def test_shares_in_sentences():
    assert [percent(share) for share in (0.0, 0.034, 0.00004, 1.5)] == ["0.0 %", "3.4 %", "0.004 %", "150.0 %"]


def test_differences_within_rounding_are_zero_and_larger_ones_stay():
    assert beyond(0.1 + 0.2, 0.3) == 0.0 == beyond(0.0, 0.0)
    assert beyond(1.0 + 1e-9, 1.0) == pytest.approx(1e-9)
