"""What all tests share."""

import math
import os
import signal

import pytest
from hypothesis import settings

from moetrace.jit import announce

# CI draws the same cases each time, so that what it says of a change is about that change; elsewhere they are drawn at
# random, to find what nobody thought of.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def silent_compiler():
    """Say nothing of compiling: what is compiled, and for how long, hangs on the tests that ran before."""
    before, announce._MOMENT_S = announce._MOMENT_S, math.inf
    yield
    announce._MOMENT_S = before


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Let Ctrl-C interrupt, as it does in a terminal: a shell that runs tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def piped_width():
    """Print tables as to a pipe: a shell may export the width of its terminal, and pytest-xdist does."""
    os.environ.pop("COLUMNS", None)
