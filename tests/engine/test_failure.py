"""Where an error of a replay in plain Python is said to come from."""

from types import SimpleNamespace

import pytest

from moetrace.engine import failure


def raised(where) -> ZeroDivisionError:
    try:
        where()
    except ZeroDivisionError as error:
        return error
    raise AssertionError


def outside():
    return 1 // 0


def decision():
    view, layer = SimpleNamespace(step=12), 3
    assert (view.step, layer) == (12, 3)
    outside()


@pytest.mark.parametrize(("where", "step"), [(outside, ""), (decision, "; step 12, layer 3")])
def test_the_line_is_named_also_outside_a_decision(monkeypatch, where, step):
    monkeypatch.setattr(failure, "PURE_PYTHON", True)
    line = outside.__code__.co_firstlineno + 1
    nothing = SimpleNamespace()
    found = failure.place_of(raised(where), nothing, nothing, nothing, (None, None))
    assert found == f" (test_failure.py, line {line}{step})"
