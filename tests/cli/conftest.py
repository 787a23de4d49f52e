"""What the tests of commands share."""

import pytest

from moetrace.cli import main


@pytest.fixture
def run(capsys):
    """Run a command; return its exit code, and what it said on stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
