"""Tell the user why a first run takes seconds: Numba compiles what later runs find in its cache."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def announce_compiling() -> Iterator[None]:
    """Print one line on stderr if anything is compiled, rather than loaded, inside the ``with`` block.

    Kernels with a declared signature compile when their module is imported: import them inside the block.
    """
    from numba.core.event import Event, Listener, install_listener

    class Announcement(Listener):
        made = False

        def on_start(self, event: Event) -> None:
            if not self.made:
                print("moetrace: compiling for this machine; later runs start at once.", file=sys.stderr, flush=True)
            self.made = True

        def on_end(self, event: Event) -> None:
            pass

    with install_listener("numba:compile", Announcement()):
        yield
