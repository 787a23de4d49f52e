"""A fingerprint follows all that a function compiles in, and nothing else."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from moetrace.engine import layer
from moetrace.jit.compile import kernel
from moetrace.jit.fingerprint import fingerprint_of, room_fingerprint

FACTOR = 2.0
TABLE = np.arange(3)
KIND = np.dtype([("a", np.int64)])
OTHER = 5


class Pair(NamedTuple):
    a: int
    b: int


@kernel
def scaled(x):
    """Return ``x`` times a factor."""
    return x * FACTOR


def outer(x):
    return scaled(x) + TABLE[0] + Pair(1, 2).a


def by_module(x):
    return np.float64(x) * layer.FACTOR


def with_default(x, by=3):
    return x * by


def opened(x):
    return x + FILE


def defined_by(factor):
    def inner(x):
        return x * factor

    return inner


FILE = SimpleNamespace(whatever=1)


@pytest.fixture
def before():
    return fingerprint_of(outer)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FACTOR", 3.0),
        ("FACTOR", 2),
        ("TABLE", np.arange(1, 4)),
        ("Pair", NamedTuple("Pair", [("b", int), ("a", int)])),
    ],
)
def test_a_constant_array_or_tuple_that_a_callee_names_counts(before, monkeypatch, name, value):
    monkeypatch.setitem(globals(), name, value)
    assert fingerprint_of(outer) != before


@pytest.mark.parametrize(("name", "value"), [("OTHER", 6), ("KIND", np.dtype([("b", np.int64)]))])
def test_what_nobody_names_does_not(before, monkeypatch, name, value):
    monkeypatch.setitem(globals(), name, value)
    assert fingerprint_of(outer) == before


def test_options_defaults_and_closures_count():
    assert fingerprint_of(outer, "checked") != fingerprint_of(outer)
    assert fingerprint_of(defined_by(2)) != fingerprint_of(defined_by(3))
    before = fingerprint_of(with_default)
    with_default.__defaults__ = (4,)
    assert fingerprint_of(with_default) != before


def test_an_attribute_of_a_module_counts(monkeypatch):
    monkeypatch.setattr(layer, "FACTOR", 2.0, raising=False)
    before = fingerprint_of(by_module)
    monkeypatch.setattr(layer, "FACTOR", 3.0)
    assert fingerprint_of(by_module) != before


def test_what_cannot_be_told_is_compiled_each_time():
    assert fingerprint_of(opened) is None


def test_rooms_have_fingerprints_of_their_own():
    assert room_fingerprint("engine") != room_fingerprint("jit")
    assert room_fingerprint("engine", "jit") not in (room_fingerprint("engine"), room_fingerprint("jit"))
