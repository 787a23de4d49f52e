"""Sweeps whose workers, process, disk or user fail: nothing finished is lost or repeated."""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest
from support.sweeps import KILLS, files, files_of

import moetrace as mt
from moetrace.batch import executors, work
from moetrace.batch import sweep as sweep_module
from moetrace.trace.atomic import AtomicFile

ROOT = Path(__file__).parents[2]
TINY, MIXTRAL = (str(ROOT / "traces" / f"{name}.h5") for name in ("tiny-olmoe", "mixtral-8x7b-b16"))


def test_a_killed_worker_loses_no_cell(small, tmp_path):
    (tmp_path / "dies.py").write_text(KILLS.format(flag=str(tmp_path / "flag"), times=1))
    grid = {"trace": small, "policy": ["monde", str(tmp_path / "dies.py:dies")], "slots": [0, 1, 2]}
    found = mt.sweep(grid, tmp_path / "out", jobs=2)
    assert (tmp_path / "flag").exists()
    assert (found.computed, found.failed) == (6, {})
    assert files(tmp_path / "out") == files_of(grid, tmp_path / "alone")


def test_a_cell_that_kills_its_workers_fails_and_the_others_go_on(small, tmp_path):
    (tmp_path / "dies.py").write_text(KILLS.format(flag=str(tmp_path / "flag"), times=99))
    grid = {"trace": small, "policy": ["monde", "edge-ndp", str(tmp_path / "dies.py:dies")], "slots": [0, 1]}
    found = mt.sweep(grid | {"exclude": [{"policy": "dies", "slots": 1}]}, tmp_path / "out", jobs=2)
    assert (found.computed, list(found.failed)) == (4, ["small/edge-ndp/dies/slots=0"])
    assert "is killed" in next(iter(found.failed.values()))
    (tmp_path / "flag").write_text("x" * 99)
    found = mt.sweep(grid, tmp_path / "out")
    assert (found.computed, found.reused, found.failed) == (2, 4, {})


def test_workers_killed_again_and_again_are_one_sentence(small, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "_MOST_POOLS", 2)
    (tmp_path / "dies.py").write_text(KILLS.format(flag=str(tmp_path / "flag"), times=99))
    grid = {"trace": small, "policy": ["monde", str(tmp_path / "dies.py:dies")]}
    with pytest.raises(mt.MoetraceError, match="Workers were killed 2 times"):
        mt.sweep(grid, tmp_path / "out", jobs=2)
    (tmp_path / "flag").write_text("x" * 99)
    found = mt.sweep(grid, tmp_path / "out")
    assert found.computed + found.reused == 2


class Fragile(executors.Inline):
    """A pool that breaks, once, after its first task is done: as if a worker died that had nothing to do."""

    broken = 0

    def submit(self, fn, /, *args, **kwargs):
        Fragile.broken += 1
        if Fragile.broken == 2:
            raise BrokenExecutor
        return super().submit(fn, *args, **kwargs)


def test_an_idle_worker_that_dies_loses_no_cell(small, monkeypatch):
    monkeypatch.setattr(work, "LOGS_BYTES", 1)
    monkeypatch.setattr(sweep_module, "local_farm", lambda jobs: executors.Farm(Fragile, 1, 1))
    found = mt.sweep({"trace": small, "slots": [0, 1]})
    assert (found.computed, found.failed) == (4, {})


def test_a_killed_sweep_goes_on(small, tmp_path):
    (tmp_path / "slow.py").write_text(
        f"import pathlib, time\nif not pathlib.Path({str(tmp_path / 'go')!r}).exists():\n    time.sleep(600)\n"
        "def slow(state, view, layer, load, plan):\n    pass\n"
    )
    (tmp_path / "s.toml").write_text(f'trace = "{small}"\npolicy = ["monde", "slow.py:slow"]\nslots = [1, 2, 3]\n')
    process = subprocess.Popen(
        [sys.executable, "-m", "moetrace", "sweep", tmp_path / "s.toml", "-o", tmp_path / "out", "--jobs", "2"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out" / "cells").glob("*.json"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr
        time.sleep(0.05)
    process.kill()
    process.communicate()
    while group_is_alive(process.pid):  # workers follow it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "out" / "sweep.json").exists()
    (tmp_path / "go").write_text("")
    found = mt.sweep(tmp_path / "s.toml", tmp_path / "out")
    assert (found.computed, found.reused) == (3, 3)


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_keeps_finished_cells(small, tmp_path, monkeypatch):
    grid = {"trace": small, "policy": ["monde", "edge-ndp"], "slots": list(range(6))}
    taken = []

    def interrupted(count: int) -> None:
        taken.append(count)
        if len(taken) == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        mt.sweep(grid, tmp_path, progress=interrupted)
    done = len(list((tmp_path / "cells").iterdir()))
    assert done == sum(taken)
    assert mt.sweep(grid, tmp_path).reused == done


def test_a_full_disk_keeps_finished_cells(small, tmp_path, monkeypatch):
    grid = {"trace": small, "slots": list(range(6))}
    written, write = [], AtomicFile.write

    def full(self, data):
        if ".json" in str(self._path):
            written.append(1)
        if len(written) > 4:
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    with (
        monkeypatch.context() as patch,
        pytest.raises(mt.MoetraceError, match="No space left on device; finished cells are kept"),
    ):
        patch.setattr(AtomicFile, "write", full)
        mt.sweep(grid, tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 4
    assert mt.sweep(grid, tmp_path).reused == 4


def test_a_script_without_a_main_guard_does_not_start_itself_again(small, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import moetrace as mt\nprint('once', mt.sweep({{'trace': {small!r}}}, jobs=2).computed)\n")
    run = subprocess.run(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    said = [line for line in run.stderr.splitlines() if "compiling" not in line]
    assert (run.stdout, said) == ("once 2\n", [])
