"""Checks of ids, against the words of the rule."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import check_ids


def first_wrong(experts: np.ndarray, num_experts: int) -> str | None:
    for row, layer in np.ndindex(experts.shape[:2]):
        cell = [i for i in experts[row, layer].tolist() if i != 255]
        if any(i >= num_experts for i in cell):
            return f"row {row}, layer entry {layer} holds the id {next(i for i in cell if i >= num_experts)},"
    for row, layer in np.ndindex(experts.shape[:2]):
        cell = [i for i in experts[row, layer].tolist() if i != 255]
        if twice := [i for i in cell if cell.count(i) > 1]:
            return f"row {row}, layer entry {layer} chooses expert {min(twice)} more than once"
    return None


ids = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 9, 255])


shapes = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 40))


@given(shapes.flatmap(lambda shape: arrays(np.uint8, shape, elements=ids)))
def test_ids_are_checked_by_the_words_of_the_rule(experts):
    expected = first_wrong(experts, 8)
    if expected is None:
        check_ids("x", 0, experts, 8)
        return
    with pytest.raises(MoetraceError) as found:
        check_ids("x", 0, experts, 8)
    assert expected in str(found.value)
