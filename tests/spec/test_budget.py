"""Memory for experts, in the words of people."""

import numpy as np
import pytest

from moetrace.spec import UsageError
from moetrace.spec.budget import slots_of

SIZES = np.array([[100.0, 200.0, 300.0], [100.0, 100.0, 100.0]])


@pytest.mark.parametrize(
    ("said", "slots"),
    [
        (0, 0),
        (7, 7),
        ("7", 7),
        ("0%", 0),
        ("25%", 1),
        ("33.333%", 1),
        ("33.334 %", 2),
        ("100%", 6),
        ("300B", 1),
        ("599 b", 1),
        ("0.6kB", 2),
        ("899B", 2),
        ("900B", 6),  # all of them fit, be they unequal
        ("1KiB", 6),
    ],
)
def test_slots_of(said, slots):
    assert slots_of(said, SIZES) == slots


@pytest.mark.parametrize("said", ["1B", "299B", "0.1kB", "0.01%", "16.6%"])
def test_a_budget_below_one_expert_is_not_rounded_to_zero(said):
    with pytest.raises(UsageError, match=rf"slots = {said} holds not one of the 6 experts, .* takes 0\.0003 MB: give"):
        slots_of(said, SIZES)
    assert slots_of("0B", SIZES) == slots_of("0.0%", SIZES) == 0


@pytest.mark.parametrize("said", [-1, "-1", "1.5", "101%", "100.1%", "many", "", "4 Gbit", "1e3", "4000MiB/s"])
def test_anything_else_is_one_sentence(said):
    with pytest.raises(UsageError, match=r"slots wants a number of experts .*, or memory as 4000MiB, got "):
        slots_of(said, SIZES)
