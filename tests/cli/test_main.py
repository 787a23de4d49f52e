"""The command as a process: pipes, signals, closed output."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "traces" / "qwen3-30b-a3b-b1.h5")
MOETRACE = [sys.executable, "-m", "moetrace"]


def test_a_reader_that_goes_away_is_no_error():
    for arguments in (["list", "models"], ["replay", TINY], ["show", "model", "mixtral-8x7b", "--format", "json"]):
        with subprocess.Popen([*MOETRACE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.close()
            assert process.stderr
            said = process.stderr.read().decode().splitlines()
            assert [line for line in said if "compiling" not in line] == []  # a first run says that it compiles
            assert process.wait() == 0


def test_closed_output_is_no_error():
    process = subprocess.run(["bash", "-c", '"$@" >&-', "bash", *MOETRACE, "list", "models"], capture_output=True)
    assert (process.returncode, process.stderr) == (0, b"")


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_signals_while_it_compiles_or_writes_leave_nothing(tmp_path, stop, code):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    out = tmp_path / "out"
    command = [*MOETRACE, "generate", str(out / "big.h5"), "--model", "qwen3-30b-a3b"]
    out.mkdir()
    sizes = ["--requests", "100000", "--prompt", "512", "--output", "512"]
    for case in ([*command, *sizes], [*MOETRACE, "replay", TINY, "-o", str(out / "result")]):
        process = subprocess.Popen(case, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, text=True)
        time.sleep(3)
        process.send_signal(stop)
        _, said = process.communicate()
        assert process.returncode == code, said
        assert "Traceback" not in said
        assert list(out.iterdir()) == []


def test_wrong_usage_is_one_sentence_with_a_hint():
    process = subprocess.run([*MOETRACE, "replay", TINY, "-o", ""], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert process.stderr.endswith("an empty path names no folder. See `moetrace replay --help`.\n")


def test_debug_shows_the_traceback():
    process = subprocess.run([*MOETRACE, "--debug", "info", "none.h5"], capture_output=True, text=True)
    assert "Traceback" in process.stderr
