"""Standard streams that the caller has closed, as some daemons do, or whose reader goes away."""

import io
import os
import stat
import sys
from typing import Any


class _Pipe(io.FileIO):
    """A pipe whose reader may go away (`moetrace gate results | head -1`); from then on nothing is written.

    The command goes on to its end, so that its exit code says what it found.
    """

    def write(self, data: Any) -> int:
        """Write, to the null device once nobody reads."""
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(memoryview(data).cast("B"))


def outlive_readers() -> None:
    """Let the command outlive the readers of its stdout and stderr, where these are pipes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            number = stream.fileno()
            mode = os.fstat(number).st_mode
        except (AttributeError, OSError, ValueError):  # no number stands behind it, in a notebook or a test
            continue
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            stream.flush()
            pipe = io.TextIOWrapper(
                io.BufferedWriter(_Pipe(number, "wb", closefd=False)),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
            )
            setattr(sys, name, pipe)


def open_missing_streams() -> None:
    """Open closed ones of stdin, stdout and stderr on the null device.

    Else Python has None for a stream, and the next file that is opened gets its number: what a C library writes to
    stderr would go into a trace.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False, encoding="utf-8"))  # noqa: SIM115
