"""The ``moetrace`` command, also as ``python -m moetrace``: Ctrl-C is heard before the first import that takes time."""

import os
import signal


def main() -> None:
    """Run the command line."""
    heard = signal.getsignal(signal.SIGINT)
    if heard is not signal.SIG_IGN:  # in the background of a shell
        signal.signal(signal.SIGINT, _interrupted)
    from moetrace.cli import main as run  # 60 ms, in which a KeyboardInterrupt would be a traceback

    try:
        signal.signal(signal.SIGINT, heard)
        run()
        _leave(0)
    except SystemExit as stop:
        _leave(stop.code)
        raise
    except KeyboardInterrupt:
        _interrupted()


def _leave(code: object) -> None:
    """End the process, unless a thread still works or a debugger watches: unloading imported modules takes 0.2 s.

    Exit handlers run.
    """
    import atexit
    import sys
    import threading

    if not isinstance(code, int) or threading.active_count() > 1 or sys.gettrace() or sys.getprofile():
        return
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # Python knows what to do
        return
    os._exit(code)


def _interrupted(*_: object) -> None:
    """End at once; nothing was begun."""
    os.write(2, b"moetrace: interrupted; no file was left half-written.\n")
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
