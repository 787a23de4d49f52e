"""What all tests share."""

import os
import signal

import pytest


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
