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
    except KeyboardInterrupt:
        _interrupted()


def _interrupted(*_: object) -> None:
    """End at once; nothing was begun."""
    os.write(2, b"moetrace: interrupted; no file was left half-written.\n")
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
