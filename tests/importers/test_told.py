"""What answers say of their tokens, with many choices: nothing takes the square of their number."""

from itertools import product

import numpy as np
import pytest

from moetrace.importers.reading import told as told_module
from moetrace.importers.reading.told import Told, of_parts, shared_out
from moetrace.spec.errors import MoetraceError


def test_many_choices_are_not_compared_with_one_another(monkeypatch):
    def shared(count):
        arrays = [np.zeros((2, 1, 1), np.int64)] * count
        return shared_out("w", arrays, [Told(prompt=5, output=count * 2 + 1, choices=count)] * count)

    assert {one.prompt for one in shared(told_module.MOST_ALIGNED + 1)} == {None}
    monkeypatch.setattr(told_module, "_alike", None)  # would be called
    monkeypatch.setattr(told_module, "ALIKE", None)
    assert {one.output for one in shared(500)} == {None}


@pytest.mark.parametrize("choices", [1, 2, 3, 4, 6])
def test_a_batch_of_prompts_is_seen_as_by_trying_all_divisors(choices):
    seen = set()
    for prompt, rows in product(range(9), range(5)):
        parts = [(rows, 1)] * choices
        wanted = any(of * rows * choices == choices * prompt for of in range(2, choices + 1) if choices % of == 0)
        start = 0 if wanted else prompt - rows
        try:
            found = {one.start for one in of_parts("w", parts, [Told(prompt=prompt, choices=choices)] * choices)}
        except MoetraceError:
            found = None
        assert found == ({0} if start == 0 else None)
        seen.add(wanted)
    assert seen == ({False, True} if choices > 1 else {False})
    assert of_parts("w", [], []) == []
