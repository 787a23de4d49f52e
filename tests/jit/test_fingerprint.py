"""A fingerprint follows all that a function compiles in, and nothing else."""

import importlib.util
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numba
import numpy as np
import pytest

from moetrace.engine import layer
from moetrace.jit.compile import PURE_PYTHON, kernel
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
def test_unused_values_do_not_change_it(before, monkeypatch, name, value):
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


def test_a_kernel_without_a_fingerprint_is_compiled_each_time():
    assert fingerprint_of(opened) is None


def test_rooms_have_fingerprints_of_their_own():
    assert room_fingerprint("engine") != room_fingerprint("jit")
    assert room_fingerprint("engine", "jit") not in (room_fingerprint("engine"), room_fingerprint("jit"))


def helper_under(**options):
    helper = numba.njit(**options)(lambda x: x / 2)
    return lambda x: helper(x)


@pytest.mark.skipif(PURE_PYTHON, reason="options are for what is compiled")
@pytest.mark.parametrize("options", [{"fastmath": True}, {"error_model": "numpy"}, {"locals": {"y": numba.float32}}])
def test_options_of_a_function_that_is_called_count(options):
    assert fingerprint_of(helper_under(**options)) != fingerprint_of(helper_under())


def test_tuples_differ_by_where_they_end():
    def of(a, b):
        return lambda x: x + a[0] + b[0]

    assert fingerprint_of(of((1, 2), (3,))) != fingerprint_of(of((1,), (2, 3)))


def test_a_user_s_module_may_be_named_as_one_of_python(tmp_path, monkeypatch):
    """And modules may name each other."""
    found = []
    for body in ("return x", "return -x"):
        (tmp_path / "trace.py").write_text(f"import trace\n\ndef helper(x):\n    {body}\n")
        spec = importlib.util.spec_from_file_location("trace", tmp_path / "trace.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "trace", module)
        spec.loader.exec_module(module)
        helper = module.helper
        found += [
            fingerprint_of(lambda x, helper=helper: helper(x)),
            fingerprint_of(lambda x, m=module: m.helper(m.trace)),
        ]
    assert None not in found and len({*found}) == 4
