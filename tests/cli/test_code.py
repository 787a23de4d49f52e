"""Files that name Python code: the user is told, and --no-code refuses them. Signals, closed streams and forks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moetrace as mt
from moetrace.spec import policy as policy_module

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "traces" / "qwen3-30b-a3b-b1.h5")
MOETRACE = [sys.executable, "-m", "moetrace"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A policy's file and a sweep's file that name a Python file, which leaves a mark where it runs."""
    monkeypatch.chdir(tmp_path)
    policy_module.note_code.cache_clear()
    Path("own.py").write_text(
        "open('mark', 'w').close()\n\ndef mine(state, view, layer, load, plan):\n    for i in range(load.size):\n"
        "        plan[i] = 1\n"
    )
    Path("fast.toml").write_text('name = "fast"\ndispatch = "own.py:mine"\nresidency = "lru"\n')
    mt.generate("t.h5", "tiny-olmoe", requests=1, prompt=2, output=2)
    Path("s.toml").write_text('trace = "t.h5"\npolicy = ["fast.toml", "own.py:mine"]\nslots = 24\n')
    return Path("mark")


def test_a_dry_run_and_show_run_nothing(stranger, run):
    code, out, err = run("sweep", "s.toml", "--dry-run")
    assert code == 0 and out.count("replay") == 2
    assert "note: fast.toml names own.py: a replay runs its code." in err
    assert "note: s.toml names own.py: a replay runs its code." in err
    assert "2 cells of policies in Python files are not in the estimate" in err
    assert run("show", "policy", "fast.toml")[0] == 0
    assert not stranger.exists()


def test_no_code_refuses_it_everywhere(stranger, run):
    said = "dispatch names the Python file own.py, and no code is to run (--no-code)"
    for arguments in (["replay", "t.h5", "--policy", "fast.toml"], ["show", "policy", "fast.toml"]):
        code, out, err = run(*arguments, "--no-code")
        assert (code, out) == (1, "") and said in err and err.count("\n") == 1
    code, _, err = run("sweep", "s.toml", "-o", "out", "--no-code", "--jobs", 1)
    assert code == 1 and err.count(said) == 2 and "runs its code" not in err
    for call in (
        lambda: mt.replay("t.h5", policies="own.py:mine", code=False),
        lambda: mt.load_policy("fast.toml", code=False),
    ):
        with pytest.raises(mt.MoetraceError, match="no code is to run"):
            call()
    assert len(mt.sweep("s.toml", code=False).failed) == 2
    assert not stranger.exists()
    assert run("replay", "t.h5", "--policy", "monde", "--no-code")[0] == 0


def test_files_that_the_user_named_are_not_announced(stranger, run):
    code, _, err = run("replay", "t.h5", "--policy", "own.py:mine")
    assert (code, err) == (0, "") and stranger.exists()
    assert "fast.toml names own.py" in run("replay", "t.h5", "--policy", "fast.toml")[2]
    assert run("replay", "t.h5", "--policy", "fast.toml", "--set", "policy.dispatch=gpu")[2] == ""


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere(closed, tmp_path):
    command = ["bash", "-c", f'"$@" {closed}', "bash", *MOETRACE, "info", TINY]
    process = subprocess.run(command, capture_output=True, env=ENVIRONMENT)
    assert process.returncode == 0 and bool(process.stdout) == (">&- " not in closed) and process.stderr == b""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_policy_that_never_returns_is_ended(tmp_path, stop):
    (tmp_path / "endless.py").write_text(
        "open('mark', 'w').close()\n\ndef endless(state, view, layer, load, plan):\n    i = 0\n"
        "    while load.size > 0:\n        i += 1\n        plan[0] = i & 1\n"
    )
    command = [*MOETRACE, "replay", TINY, "--policy", "endless.py:endless", "-o", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "mark").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(2)  # it compiles, and begins
    process.send_signal(stop)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + stop
    assert said.endswith("; no file was left half-written.\n") and "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["endless.py", "mark"]


FORKS = """
import multiprocessing, sys
import polars as pl
import moetrace as mt

def child():
    try:
        mt.replay(sys.argv[1], policies="monde")
    except mt.MoetraceError as error:
        print(error, flush=True)

if __name__ == "__main__":
    mt.replay
    pl.DataFrame({"a": [1, 2, 3]}).lazy().group_by("a").agg(pl.len()).collect()
    process = multiprocessing.get_context(sys.argv[2]).Process(target=child)
    process.start()
    process.join()
"""


def test_a_forked_child_is_refused_and_does_not_hang(tmp_path):
    (tmp_path / "forks.py").write_text(FORKS)
    said = [
        subprocess.run(
            [sys.executable, tmp_path / "forks.py", TINY, method],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=120,
        ).stdout
        for method in ("fork", "spawn")
    ]
    assert said[0].count("\n") == 1 and 'with the method "spawn" or "forkserver"' in said[0]
    assert said[1] == ""


def test_a_sweep_of_a_policy_that_never_returns_is_ended(tmp_path):
    """It waits in a process that has imported Polars for processes of which one is done."""
    (tmp_path / "endless.py").write_text(
        "def endless(state, view, layer, load, plan):\n    i = 0\n"
        "    while load.size > 0:\n        i += 1\n        plan[0] = i & 1\n"
    )
    (tmp_path / "endless.toml").write_text('name = "endless"\ndispatch = "endless.py:endless"\n')
    (tmp_path / "grid.toml").write_text(
        f'trace = "{TINY}"\nsystem = "edge-ndp"\npolicy = ["edge-ndp", "endless.toml"]\nslots = 48\n'
    )
    command = [*MOETRACE, "sweep", "grid.toml", "-o", "out", "--jobs", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not list((tmp_path / "out").glob("cells/*")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "1 of 2 cells finished and kept" in said and "Traceback" not in said
