"""Whether this process was forked off one whose Polars had threads: a fork takes none along, and Polars waits."""

import os
import re
import sys
from pathlib import Path

from moetrace.spec.errors import MoetraceError

_THREAD = re.compile(r"polars-\d")  # how Polars calls those that work


class _Forked:
    """The facts noted before a fork, for the child."""

    had_threads = False
    is_stuck = False


def refuse_if_forked() -> None:
    """Raise a MoetraceError in a child that was forked after Polars had begun to work: it would wait for ever."""
    if _Forked.is_stuck:
        raise MoetraceError(
            "This process was forked after Polars had started its threads, which a fork does not take along: start it "
            'with the method "spawn" or "forkserver" of multiprocessing.'
        )


def _look() -> None:
    _Forked.had_threads = _has_threads()


def _note() -> None:
    _Forked.is_stuck = _Forked.is_stuck or _Forked.had_threads


def _has_threads() -> bool:
    """Whether Polars has started its threads; where the system does not name them, whether it was imported."""
    if "polars" not in sys.modules:
        return False
    try:
        return any(_THREAD.match((task / "comm").read_text()) for task in Path("/proc/self/task").iterdir())
    except OSError:
        return True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_look, after_in_child=_note)
