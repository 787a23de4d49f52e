"""SplitMix64 as its authors have it, for numbers and arrays, compiled or not."""

import numpy as np
import pytest

from moetrace.jit.random import GOLDEN, mix, mix_64

# Java's SplittableRandom and the reference in C (Vigna, splitmix64.c) give these for seed 1234567.
REFERENCE = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


@pytest.mark.pure
def test_it_is_splitmix64():
    with np.errstate(over="ignore"):
        states = np.uint64(1234567) + GOLDEN * np.arange(1, 6, dtype=np.uint64)
    assert mix_64(states).tolist() == REFERENCE
    with np.errstate(over="ignore"):
        assert [int(mix(state)) for state in states] == REFERENCE
