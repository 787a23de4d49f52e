"""How long a request waits before it is tried again."""

import threading

import pytest

from moetrace.live.crew import persistent
from moetrace.live.exchange import RequestError


class Clock(threading.Event):
    """Keeps the waits, and does not wait."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def wait(self, timeout=None):
        self.waits.append(timeout)
        return False


@pytest.mark.parametrize(
    ("said_s", "waits"),
    [
        (None, [0.01 * 2**n for n in range(13)] + [60] * 7),
        (0, [0.01 * 2**n for n in range(13)] + [60] * 7),
        (30, [30] * 12 + [0.01 * 2**12] + [60] * 7),
        (60, [60] * 20),
    ],
)
def test_waits_grow_to_at_most_a_minute_even_if_the_server_asks_for_more(said_s, waits):
    clock = Clock()

    def ask():
        raise RequestError("busy", again=True, wait_s=said_s)

    with pytest.raises(RequestError):
        persistent(ask, 20, clock)
    assert clock.waits == pytest.approx(waits)  # from FIRST_WAIT_S of tests
