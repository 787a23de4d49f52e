"""How the files of a result take their places: whenever a write ends, one whole result is read; and what it leaves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

import moetrace as mt
from moetrace.results import publish
from moetrace.results.folder import read_cells
from moetrace.results.publish import COMMITTED, file_in, staged
from moetrace.results.record import RESULT_FILES, SWEEP_FILES, TIMELINE_FILE
from moetrace.results.replayed import read_replayed
from moetrace.results.swept import read_swept

NAMES = sorted(RESULT_FILES)


def put(folder, text, names=NAMES):
    """A result, each of whose files holds the same text."""
    with staged(folder) as temporary:
        for name in names:
            (temporary / name).write_text(text)


def seen(folder):
    """What is read of each file of a result, by name."""
    places = {name: file_in(folder, name) for name in NAMES}
    return {name: place.read_text() for name, place in places.items() if os.path.lexists(place)}


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


class Killed(BaseException):
    """The process is no more."""


def killed_at(number, monkeypatch, folder, names):
    """Write a new result, and from the call of this number on change nothing on the disk; whether it came so far."""
    count = 0

    def counted(real):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count >= number:
                raise Killed
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for call in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
            patch.setattr(os, call, counted(getattr(os, call)))
        try:
            put(folder, "new", names)
        except Killed:
            return True
    return False


def test_a_kill_at_any_call_leaves_one_result_and_the_next_write_finishes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    outcomes = []
    names = [name for name in NAMES if name != TIMELINE_FILE]
    for number in range(1, 60):
        folder = tmp_path / str(number)
        put(folder, "old")
        (folder / "notes.txt").write_text("mine")
        if not killed_at(number, monkeypatch, folder, names):
            break
        found = seen(folder)
        assert found in (dict.fromkeys(NAMES, "old"), dict.fromkeys(names, "new")), number
        outcomes.append(set(found.values()) == {"new"})
        put(folder, "third", names)
        assert seen(folder) == {name: (folder / name).read_text() for name in names} == dict.fromkeys(names, "third")
        assert COMMITTED not in hidden(folder) and (folder / "notes.txt").read_text() == "mine"
    assert outcomes == sorted(outcomes) and outcomes.count(False) > 8 and outcomes.count(True) > 8


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_between_renames_waits_for_the_last(tmp_path, monkeypatch, number):
    put(tmp_path, "old")
    handler = signal.signal(getattr(signal, number), lambda *_: sys.exit(7))
    replace = os.replace

    def signalled(*arguments):
        replace(*arguments)
        signal.raise_signal(getattr(signal, number))

    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(os, "replace", signalled)
            put(tmp_path, "new", NAMES[1:])
    finally:
        signal.signal(getattr(signal, number), handler)
    assert stop.value.code == 7
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(NAMES[1:], "new")


def test_a_refusal_between_renames_leaves_the_new_result_to_be_read(tmp_path, monkeypatch):
    put(tmp_path, "old")
    replace = os.replace

    def refused(source, target):
        if Path(source).name == "requests.parquet":
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(mt.MoetraceError, match=r"error; the new files are in its fold"):
        patch.setattr(os, "replace", refused)
        put(tmp_path, "new")
    assert seen(tmp_path) == dict.fromkeys(NAMES, "new")
    put(tmp_path, "third", NAMES[:2])
    assert seen(tmp_path) == dict.fromkeys(NAMES[:2], "third") and hidden(tmp_path) == []


def test_a_report_and_a_gate_read_what_a_kill_left_to_move_up(tmp_path):
    old, new = (
        mt.replay(mt.generate_trace("tiny-olmoe", requests=2, prompt=3, output=3), policies="on-demand", slots=slots)
        for slots in (8, 48)
    )
    old.write(tmp_path / "out")
    new.write(tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / "out" / COMMITTED)
    waiting = tmp_path / "out" / COMMITTED
    for name in ("summary.json", "units.parquet"):  # the kill came after these two
        (waiting / name).replace(tmp_path / "out" / name)
    assert read_cells(tmp_path / "out").cells[0].inputs["slots"] == 48
    read = read_replayed(tmp_path / "out")
    assert read.layers is not None and read.layers["moe_s"].equals(new.layers["moe_s"])
    assert not read.layers["moe_s"].equals(old.layers["moe_s"])


def test_files_of_two_results_are_refused(tmp_path):
    pytest.importorskip("altair")
    from moetrace.show.charts.one_step import one_step

    trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=3, output=3)
    for slots in (8, 48):
        mt.replay(trace, policies="on-demand", slots=slots, timeline=True).write(tmp_path / f"{slots}")
    for name in RESULT_FILES[1:-1]:
        mixed = shutil.copytree(tmp_path / "8", tmp_path / name)
        shutil.copy(tmp_path / "48" / name, mixed)
        with pytest.raises(mt.MoetraceError, match=f"{re.escape(name)} is of another result"):
            read_replayed(mixed)
    marks = [read_replayed(tmp_path / f"{slots}").sha256 for slots in (8, 48)]
    assert one_step(tmp_path / "8" / TIMELINE_FILE, marks[0])
    with pytest.raises(mt.MoetraceError, match=r"timeline\.json\.gz is of another result"):
        one_step(tmp_path / "48" / TIMELINE_FILE, marks[0])


def test_tables_of_two_sweeps_are_refused(tmp_path):
    mt.generate(tmp_path / "t.h5", "tiny-olmoe", requests=1, prompt=2, output=2)
    for slots in (8, 48):
        mt.sweep({"trace": str(tmp_path / "t.h5"), "policy": "monde", "slots": slots}, tmp_path / f"{slots}")
    shutil.copy(tmp_path / "8" / "cells.parquet", tmp_path / "48")
    with pytest.raises(mt.MoetraceError, match=r"cells\.parquet is of another result"):
        read_swept(tmp_path / "48")
    # A file of an older version has no mark.
    pl.read_parquet(tmp_path / "8" / "cells.parquet").write_parquet(tmp_path / "48" / "cells.parquet")
    assert read_swept(tmp_path / "48").cells["slots"].to_list() == [8]


def strange(folder, what):
    """Something under the name of a committed folder that no write of ours leaves."""
    place = folder / COMMITTED
    if what == "link":
        (folder.parent / "elsewhere").mkdir()
        place.symlink_to(folder.parent / "elsewhere")
        return
    if what == "file":
        place.write_text("x")
        return
    place.mkdir()
    if what == "other name":
        (place / "notes.txt").write_text("theirs")
    elif what == "link inside":
        (place / "summary.json").symlink_to(folder / "notes.txt")
    elif what == "folder inside":
        (place / "summary.json").mkdir()


@pytest.mark.parametrize("what", ["link", "file", "other name", "link inside", "folder inside"])
def test_a_strangers_committed_folder_moves_nothing(tmp_path, what):
    folder = tmp_path / "out"
    put(folder, "old")
    (folder / "notes.txt").write_text("mine")
    strange(folder, what)
    before = sorted(folder.rglob("*"))
    with pytest.raises(mt.MoetraceError, match="is not what a write of moetrace leaves"), staged(folder):
        pytest.fail("it is seen before the work, not after it")
    assert sorted(folder.rglob("*")) == before
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "units.parquet").read_text() == "old"


def test_links_in_a_result_are_replaced_and_not_followed(tmp_path):
    folder, outside = tmp_path / "out", tmp_path / "precious"
    outside.write_text("precious")
    folder.mkdir()
    for name in NAMES:
        (folder / name).symlink_to(outside)
    put(folder, "new", NAMES[:3])
    assert outside.read_text() == "precious"
    assert seen(folder) == dict.fromkeys(NAMES[:3], "new") and not any(path.is_symlink() for path in folder.iterdir())
    (tmp_path / "named").symlink_to(folder)  # which the user names: it is followed
    put(tmp_path / "named", "newer")
    assert seen(folder) == dict.fromkeys(NAMES, "newer") and (tmp_path / "named").is_symlink()


def aged(path, days=2.0):
    long_ago = path.stat(follow_symlinks=False).st_mtime - days * 86400
    os.utime(path, (long_ago, long_ago), follow_symlinks=False)
    return path


def test_leftovers_of_killed_runs_are_removed_after_a_day(tmp_path):
    folder = tmp_path / "out"
    put(folder, "old")
    for name in (".moetrace-abcdefgh", ".moetrace-ijklmnop", ".moetrace-abc"):
        (folder / name).mkdir()
        (folder / name / "steps.parquet").write_text("half")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("precious")
    (folder / ".moetrace-link____").symlink_to(tmp_path / "precious")
    for name in (".moetrace-abcdefgh", ".moetrace-abc", ".moetrace-link____"):
        aged(folder / name)
    put(folder, "new")
    assert sorted(hidden(folder)) == [".moetrace-abc", ".moetrace-ijklmnop", ".moetrace-link____"]
    assert (tmp_path / "precious" / "file").read_text() == "precious"

    with staged(folder) as temporary:  # a replay that takes longer than a day
        aged(temporary)
        put(folder, "meanwhile")
        (temporary / "summary.json").write_text("at last")
    assert seen(folder) == {"summary.json": "at last"}


def test_temporary_files_of_killed_runs_are_removed_after_a_day(tmp_path):
    target = tmp_path / "trace.h5"
    old, young, other = (
        tmp_path / f".{name}.tmp" for name in ("trace.h5.00c0ffee", "trace.h5.deadbeef", "x.h5.00c0ffee")
    )
    for path in (old, young, other):
        path.write_text("half")
    aged(old), aged(other)
    link = tmp_path / ".trace.h5.12345678.tmp"
    link.symlink_to(other)
    mt.generate(target, "tiny-olmoe", requests=1, prompt=2, output=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([young.name, other.name, link.name, "trace.h5"])


def test_another_writer_is_waited_for(tmp_path, monkeypatch):
    put(tmp_path, "old")
    monkeypatch.setattr(publish, "_PATIENCE_S", 0.0)
    script = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "\n"
        with pytest.raises(mt.MoetraceError, match="held by another process"):
            put(tmp_path, "new")
        assert seen(tmp_path) == dict.fromkeys(NAMES, "old") and hidden(tmp_path) == []
        other.communicate("\n")
    put(tmp_path, "new")
    assert seen(tmp_path) == dict.fromkeys(NAMES, "new")


def test_a_sweep_leaves_no_search_of_before(tmp_path):
    mt.generate(tmp_path / "t.h5", "tiny-olmoe", requests=1, prompt=2, output=2)
    for name in SWEEP_FILES[2:]:
        (tmp_path / name).write_text(json.dumps({}))
    mt.sweep({"trace": str(tmp_path / "t.h5"), "policy": "monde", "slots": 4}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells", "cells.parquet", "sweep.json", "t.h5"]
