"""Tests that run with NUMBA_DISABLE_JIT=1 only: each of their random mixes would compile kernels of its own (20 s)."""

from collections.abc import Callable

import pytest

from moetrace.jit.compile import PURE_PYTHON


def as_plain_python(test: Callable) -> Callable:
    """Mark a test to run where kernels are plain Python, in the stage of `-m pure`."""
    test = pytest.mark.skipif(not PURE_PYTHON, reason="with NUMBA_DISABLE_JIT=1: each mix would be compiled")(test)
    return pytest.mark.pure(pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")(test))
