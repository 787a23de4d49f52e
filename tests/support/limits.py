"""Run the command in a process of its own, under a limit of memory and of time."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

MOETRACE = (sys.executable, "-m", "moetrace")
_POLL_S = 0.01


class Done(NamedTuple):
    """How a process ended: its exit code (minus the signal's number if one ended it), what it wrote, its peak."""

    code: int
    stdout: str
    stderr: str
    peak_bytes: int  # the most memory that was resident at a time, pages of mapped files included


def run_limited(
    *args: object,
    memory_bytes: int | None = None,
    timeout_s: float = 60,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> Done:
    """Run ``moetrace ARGS`` and wait; fail the test if it takes longer than `timeout_s` (it is killed).

    `memory_bytes` bounds the address space (RLIMIT_AS), which is larger than what is resident: the packages alone take
    1 to 2 GiB of addresses. `env` is added to this process's environment.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))

    command = [*MOETRACE, *map(str, args)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:  # files: a full pipe would block the process
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=cwd,
            env=os.environ | (env or {}),
            preexec_fn=limit,
            start_new_session=True,  # so that its children are killed with it
        )
        code, peak_bytes = _wait(process, time.monotonic() + timeout_s)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    assert code is not None, f"{' '.join(command)} took longer than {timeout_s} s: {texts[1][-2000:]}"
    return Done(code, texts[0], texts[1], peak_bytes)


def _wait(process: subprocess.Popen[bytes], until: float) -> tuple[int | None, int]:
    """Return the exit code (None if the process had to be killed) and the peak of its memory in bytes.

    The peak is read while the process runs, since ru_maxrss counts what this process held when it forked.
    """
    peak_bytes = 0
    try:
        while True:
            peak_bytes = _peak_bytes(process.pid) or peak_bytes
            found, status = os.waitpid(process.pid, os.WNOHANG)
            if found:
                process.returncode = os.waitstatus_to_exitcode(status)
                return process.returncode, peak_bytes
            if time.monotonic() > until:
                return None, 0
            time.sleep(_POLL_S)
    finally:
        if process.returncode is None:  # also on Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _peak_bytes(pid: int) -> int | None:
    """Peak of a running process's memory; None of one that has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return None
