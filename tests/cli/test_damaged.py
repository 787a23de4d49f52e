"""A damaged trace is never copied: whatever writes it anew would give it hashes that match."""

import shutil
from pathlib import Path

import h5py
import pytest

from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace

TRACES = Path(__file__).parents[2] / "traces"


@pytest.fixture
def damaged(tmp_path) -> Path:
    """A trace in which one id became another possible one."""
    path = tmp_path / "t.h5"
    shutil.copy(TRACES / "tiny-olmoe.h5", path)
    with h5py.File(path, "r+") as raw:
        ids = raw["/experts"]
        ids[100, 2] = ids[100, 2][::-1]
    return path


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("lint", ["-o", "copy.h5", "--drop-dense"]),
        ("lint", ["-o", "copy.h5", "--drop-warmup"]),
        ("rebatch", ["-o", "copy.h5", "--batch", 4]),
        ("select", ["-o", "copy.h5", "--rows", "0:200"]),
        *(("export", ["-o", f"copy{ending}"]) for ending in (".npz", ".parquet", ".bin", ".json")),
    ],
)
def test_commands_copy_no_damaged_trace(run, monkeypatch, damaged, command, options):
    monkeypatch.chdir(damaged.parent)
    said = "moetrace: t.h5: /experts differs from its sha256, so the file was damaged.\n"
    assert run(command, "t.h5", *options) == (1, "", said)
    assert [path.name for path in damaged.parent.iterdir()] == ["t.h5"]


def test_write_copies_no_damaged_trace(damaged):
    with Trace.open(damaged) as trace, pytest.raises(MoetraceError, match="/experts differs from its sha256"):
        trace.write(damaged.with_name("copy.h5"))
    assert [path.name for path in damaged.parent.iterdir()] == ["t.h5"]


def test_a_dataset_without_sha256_is_copied(run, damaged):
    with h5py.File(damaged, "r+") as raw:
        del raw["/experts"].attrs["sha256"]
    assert run("lint", damaged, "--drop-dense", "-o", damaged.with_name("copy.h5"))[0] == 0
    with Trace.open(damaged) as trace, pytest.raises(MoetraceError, match="/experts has no sha256"):
        trace.verify()
