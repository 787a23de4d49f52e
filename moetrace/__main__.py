"""``python -m moetrace`` is the ``moetrace`` command."""

from moetrace.cli import main

main()
