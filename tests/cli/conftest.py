"""What the tests of commands share."""

import pytest

from moetrace.cli import main


@pytest.fixture
def run(capsys):
    """Run a command; return its exit code, and what it said on stdout and stderr.

    Whether it also says that it compiles depends on what ran before, and on the machine: that line is left out.
    """

    def run(*arguments) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out, "".join(line for line in said.err.splitlines(True) if "compiling for this" not in line)

    return run
