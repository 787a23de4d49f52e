"""A trace that is not what its hashes say, or that changes while it is read: one sentence, and no silent figures."""

import os
import time

import h5py
import numpy as np
import pytest
from support.drawn_traces import draw_trace

import moetrace as mt
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace, format

TINY = "traces/tiny-olmoe.h5"
REPLAY = {"system": "rtx4090-offload", "policies": ["on-demand"]}


def touch(path) -> None:
    """Set the time of the last write to another one, as a write does once the clock of the file system has ticked."""
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 1_000_000_000))


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_a_file_that_changes_while_it_is_read_is_one_sentence(tmp_path, compress):
    path = tmp_path / "t.h5"
    draw_trace(1, 8, rows=100).write(path, compress)
    whole = path.read_bytes()
    for change, sentence in (
        (lambda: os.truncate(path, 5000), "became shorter while it was read"),
        (lambda: os.truncate(path, 10**6), "was changed while it was read"),
        (lambda: (path.write_bytes(whole), touch(path)), "was changed while it was read"),
    ):
        path.write_bytes(whole)
        with Trace.open(path) as trace:
            blocks = trace.blocks(rows=10)
            next(blocks)
            change()
            with pytest.raises(MoetraceError, match=rf"t\.h5 {sentence}: run this again when nothing writes to it"):
                list(blocks)
            with pytest.raises(MoetraceError, match=sentence):
                trace.verify()


def test_a_file_that_is_replaced_while_it_is_read_stays_what_it_was(tmp_path):
    path = tmp_path / "t.h5"
    draw_trace(1, 8, rows=100).write(path)
    with Trace.open(path) as trace:
        before = trace.read("experts", 0, 100)
        draw_trace(2, 8, rows=100).write(path)
        assert np.array_equal(trace.read("experts", 0, 100), before)
        trace.verify()


def changed(path, name: str, at, value) -> None:
    with Trace.open(TINY) as trace:
        trace.head(50).write(path)
    with h5py.File(path, "r+") as raw:
        raw[name][at] = value


def test_a_replay_refuses_what_differs_from_its_hash(tmp_path):
    path = tmp_path / "t.h5"
    with Trace.open(TINY) as trace:
        ids = trace.read("experts", 0, 1)[0, 0]
    other = next(expert for expert in range(32) if expert not in ids)
    for name, at, value in (
        ("/experts", (0, 0, 0), other),
        ("/rows/position", 3, 999),
        ("/rows/request", 2, 7),
        ("/steps/phase", 0, 1),
    ):
        changed(path, name, at, value)
        with pytest.raises(MoetraceError, match=f"{name} differs from its sha256, so the file was damaged"):
            mt.replay(path, **REPLAY)
    changed(path, "/gates", 0, 0)  # a replay does not read them
    assert mt.replay(path, **REPLAY).summary.height == 1
    with pytest.raises(MoetraceError, match="/gates differs"), Trace.open(path) as trace:
        trace.verify()


def test_blocks_are_compared_however_they_are_cut(file, monkeypatch):
    with Trace.open(file) as trace:
        for block_bytes, ahead in ((1 << 20, 0), (1, 3), (50, 100)):
            monkeypatch.setattr(format, "BLOCK_BYTES", block_bytes)
            assert sum(block.steps for block in trace.compared_blocks(ahead)) == trace.steps
        assert sum(part.steps for part in trace.row_blocks(compare=True)) == trace.steps
        assert len(list(trace.head(3).compared_blocks())) == 1  # without hashes
