"""Standard streams that the caller has closed, as some daemons do."""

import os
import sys


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
