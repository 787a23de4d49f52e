"""Tell the user why a first run takes seconds: Numba compiles what later runs find in its cache."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

_MOMENT_S = 1.0


@contextmanager
def announce_compiling() -> Iterator[None]:
    """Print one line on stderr if compiling, rather than loading, takes more than a moment inside the ``with`` block.

    A kernel compiles when it is first called: call it inside the block.
    """
    from numba.core.event import Event, Listener, install_listener

    def announce() -> None:
        print("moetrace: compiling for this machine, as a first run does.", file=sys.stderr, flush=True)

    timer = Timer(_MOMENT_S, announce)
    timer.daemon = True

    class Start(Listener):
        def on_start(self, event: Event) -> None:
            if timer.ident is None:
                timer.start()

        def on_end(self, event: Event) -> None:
            pass

    try:
        with install_listener("numba:compile", Start()):
            yield
    finally:
        timer.cancel()
