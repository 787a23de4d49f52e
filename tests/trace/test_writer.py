"""Writing: all or nothing, whatever goes wrong."""

import os
import resource
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest

from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace, Writer, format
from moetrace.trace.atomic import AtomicFile
from moetrace.trace.writer import CountsWriter


def writer(path: Path, rows: int = 4, **options) -> Writer:
    sizes = {"model": "m", "num_experts": 8, "top_k": 2, "layers": 3, "rows": rows, "steps": rows, "source": {}}
    return Writer(path, **sizes | options)


def append(to: Writer, rows: int = 4, **changes) -> None:
    arrays = {
        "experts": np.broadcast_to(np.array([0, 1], np.uint8), (rows, 3, 2)),
        "request": np.zeros(rows, np.int32),
        "position": np.arange(rows),
        "steps": np.ones(rows, int),
        "phase": np.ones(rows, int),
    }
    to.append(**arrays | changes)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.h5"
    path.write_bytes(b"what was there")
    return path


def unchanged(path: Path) -> bool:
    return path.read_bytes() == b"what was there" and list(path.parent.iterdir()) == [path]


def test_a_written_file_takes_the_place_of_the_old_one(old):
    with writer(old) as to:
        append(to, 1)
        append(to, 3)
        assert unchanged_so_far(old)
    with Trace.open(old) as trace:
        assert trace.rows == 4
        trace.verify()
    assert list(old.parent.iterdir()) == [old]


def unchanged_so_far(path: Path) -> bool:
    return path.read_bytes() == b"what was there"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
@pytest.mark.parametrize("compress", [None, "gzip"])
def test_an_interruption_leaves_the_old_file(old, error, compress):
    with pytest.raises(error), writer(old, compress=compress) as to:
        append(to, 2)
        raise error
    assert unchanged(old)


def test_ctrl_c_while_finishing_leaves_the_old_file(old, monkeypatch):
    def interrupt(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt), writer(old) as to:
        append(to)
    assert unchanged(old)


@pytest.mark.parametrize("compress", [None, "zstd"])
@pytest.mark.parametrize("limit", [0, 5000, 200_000])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(old, compress, limit):
    rows = 100_000
    experts = np.random.default_rng(0).integers(0, 8, (rows, 3, 2), np.uint8)  # hardly compresses
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with (
            pytest.raises(MoetraceError, match=r"old\.h5 could not be written: File too large; nothing was changed\."),
            writer(old, rows, compress=compress) as to,
        ):
            append(to, rows, experts=experts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert unchanged(old)


def test_ctrl_c_while_hdf5_writes_waits_for_it(old, monkeypatch):
    def interrupted(file, data):
        os.kill(os.getpid(), signal.SIGINT)
        return write(file, data)

    write = AtomicFile.write
    with pytest.raises(KeyboardInterrupt), writer(old) as to:
        monkeypatch.setattr(AtomicFile, "write", interrupted)
        append(to)
        pytest.fail("append must raise")
    assert unchanged(old)


def test_places_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path, sentence in (
        (tmp_path / "none" / "t.h5", "No such file or directory"),
        (tmp_path / "file" / "t.h5", "Not a directory"),
        (tmp_path, "not an ordinary file"),
        (Path("/dev/full"), "not an ordinary file"),
    ):
        with pytest.raises(MoetraceError, match=sentence), writer(path):
            pytest.fail("the block must not begin")


def test_a_link_to_a_file_stays_a_link(old):
    link = old.with_name("link.h5")
    link.symlink_to(old)
    with writer(link) as to:
        append(to)
    assert link.is_symlink() and Trace.open(old).rows == 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"experts": np.zeros((4, 3, 1), np.uint8)}, "experts has shape"),
        ({"experts": np.full((4, 3, 2), 256)}, "experts holds numbers from 256 to 256"),
        ({"experts": np.zeros((4, 3, 2))}, "experts holds float64"),
        ({"request": np.zeros(3, int)}, "request has shape"),
        ({"steps": np.array([2, 1])}, "steps and phase differ"),
        ({"steps": np.array([2, 1, 0, 1])}, "each step needs one row"),
        ({"steps": np.array([2, 1, 1, 1])}, "the steps have 5 rows, the arrays 4"),
        ({"phase": np.array([0, 1, 2, 1])}, "a mixed step needs"),
        ({"gates": np.zeros((4, 3, 2))}, "expected the arrays"),
    ],
)
def test_rows_that_do_not_fit_are_refused(old, changes, sentence):
    with pytest.raises(MoetraceError, match=sentence), writer(old) as to:
        append(to, **changes)
    assert unchanged(old)


def test_more_or_less_than_announced_is_refused(old):
    with pytest.raises(MoetraceError, match="4 rows in 4 steps were announced, but 3 in 3 came"), writer(old) as to:
        append(to, 3)
    with pytest.raises(MoetraceError, match="more than the announced 4 rows"), writer(old) as to:
        append(to, 5)
    with pytest.raises(MoetraceError, match="the trace is empty"):
        writer(old, rows=0)
    assert unchanged(old)


def test_a_source_is_written_as_json(old):
    with writer(old, model="m\ud800", source={"a": float("nan"), "b": "\ud800"}) as to:
        append(to)
    with h5py.File(old) as raw:
        assert raw.attrs["source"] == b'{"a": null, "b": "?"}' and raw.attrs["model"] == b"m?"


def test_a_source_that_is_too_long_is_refused(old):
    with pytest.raises(MoetraceError, match="attribute source would take"), writer(old, source={"x": "y" * 40000}):
        pass
    assert unchanged(old)


def test_counts_are_written_and_copied(tmp_path, monkeypatch):
    counts = np.random.default_rng(0).integers(0, 9, (5, 3, 4))
    rows, phase = np.array([9, 8, 12, 9, 9]), np.array([2, 1, 1, 0, 2])
    facts = {"model": "m", "num_experts": 4, "top_k": 2, "layers": 3, "rows": 47, "steps": 5, "source": {}}
    with CountsWriter(tmp_path / "a.h5", **facts) as writer:
        writer.append_counts(counts[:2], rows[:2], phase[:2])
        writer.append_counts(counts[2:], rows[2:], phase[2:])
    with Trace.open(tmp_path / "a.h5") as trace:
        trace.verify()
        assert trace.has == {"counts"} and trace.phase.tolist() == phase.tolist() and trace.rows == 47
        assert np.array_equal(trace.read("counts", 0, 5), counts)
        monkeypatch.setattr(format, "BLOCK_BYTES", 2 * 8 * 12)
        blocks = list(trace.count_blocks())
        assert [block.first_step for block in blocks] == [0, 2, 4]
        for name, whole in (("counts", counts), ("rows", rows), ("phase", phase)):
            assert np.array_equal(np.concatenate([getattr(block, name) for block in blocks]), whole)
        trace.write(tmp_path / "b.h5")
    assert (tmp_path / "b.h5").read_bytes() == (tmp_path / "a.h5").read_bytes()
    for wrong, what in ((counts[:, :2], "has shape"), (-1 - counts, "negative")):
        with pytest.raises(MoetraceError, match=what), CountsWriter(tmp_path / "c.h5", **facts) as writer:
            writer.append_counts(wrong, rows, phase)
    assert not (tmp_path / "c.h5").exists()
