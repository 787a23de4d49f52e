"""The command in a shell on a terminal: Tab, Ctrl-C, SIGTERM, a policy that never returns, widths, pipes."""

import os
import pty
import re
import select
import shutil
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "traces/tiny-olmoe.h5"
# The policy tells when it is compiled and about to run: then nothing in Python can stop it.
HANGING = "def endless(state, view, layer, load, plan):\n    while load.size > 0:\n        plan[0] = view.step & 1\n"


class Shell:
    """An interactive bash on a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        command = folder / "moetrace"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moetrace "$@"\n')
        command.chmod(0o755)
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            inherited = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "PS1": "$ ", "TERM": "dumb"}
            os.execve(str(shutil.which("bash")), ["bash", "--norc", "--noprofile"], os.environ | inherited)
        self.said = ""

    def type(self, keys: str, until: str, seconds: float = 60) -> str:
        """Type keys; return what the terminal shows up to where it matches."""
        os.write(self.terminal, keys.encode())
        end = time.monotonic() + seconds
        while not (found := re.search(until, self.said)):
            if not select.select([self.terminal], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError(f"{until!r} did not come: {self.said!r}")
            self.said += os.read(self.terminal, 65536).decode(errors="replace").replace("\r", "")
        shown, self.said = self.said[: found.end()], self.said[found.end() :]
        return shown


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_session_on_a_terminal(tmp_path):
    (tmp_path / "mine.py").write_text(HANGING)
    shell = Shell(tmp_path)
    try:
        shell.type(
            'eval "$(_MOETRACE_COMPLETE=bash_source moetrace)"; bind "set bell-style none"; echo rea""dy\n', "ready\n"
        )
        shell.type("moetrace reb\t", "moetrace rebatch ")
        shell.type(
            "\x15moetrace list models --for\tjson | head -n 1; echo ${PIPESTATUS[*]}.\n",
            r"--format json.*\n\[.*\n0 0\.\n",
        )
        replay = f"moetrace replay {TINY} --slots 48 -o out"
        shown = shell.type(f"COLUMNS=60 {replay} --policy monde 2> note; echo =$?\n", "=0\n")
        lines = shown.partition("=$?\n")[2].split("\n")
        assert "busy" in shown and max(len(line) for line in lines if str(TINY) not in line) <= 60
        hang = f"{replay} --policy mine.py:endless"
        said = "moetrace: {}; no file was left half-written."
        shell.type(f"rm -r out note; {hang}\n", "-o out")
        time.sleep(4)  # it compiles, and begins
        shell.type("\x03", said.format("interrupted"))
        shell.type("echo =$?\n", "=130\n")
        shell.type(f"{hang} & sleep 4; kill %1; wait %1; echo =$?\n", f"{said.format('ended by SIGTERM')}(.|\n)*=143\n")
        shell.type("ls -A\n", r"\nmine\.py  *moetrace\n|\nmine\.py\nmoetrace\n")
        shell.type(f"moetrace info {TINY} | cat; echo =$?\n", "6,981.*(.|\n)*=0\n")
    finally:
        os.kill(shell.pid, 9)
        os.waitpid(shell.pid, 0)
        os.close(shell.terminal)
