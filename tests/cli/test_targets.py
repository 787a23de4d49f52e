"""Files that cannot be written, or hold what is read, are noticed before anything is read."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from moetrace.spec.errors import MoetraceError
from moetrace.trace.atomic import write_whole

TINY = Path(__file__).parents[2] / "traces" / "tiny-olmoe.h5"
# Where {} stands, a file is written.
WRITERS = [
    "analyze cache in.h5 --plot {}.png",
    "analyze balance in.h5 --plot {}.png",
    "analyze balance in.h5 --placement ep --export {}.json",
    "analyze locality in.h5 --plot {}.png",
    "analyze locality in.h5 --format csv -o {}.csv",
    "export in.h5 -o {}.npz",
    "rebatch in.h5 --batch 2 -o {}.h5",
    "select in.h5 --rows 0:9 -o {}.h5",
    "lint in.h5 --drop-dense -o {}.h5",
    "import in.npz -o {}.h5",
    "record http://127.0.0.1:9 --prompts in.npz -o {}.h5",
    "generate {}.h5 --requests 1 --prompt 1 --output 1 --like in.h5",
    "generate out.h5 --requests 1 --prompt 1 --output 1 --like in.h5 --save-profile {}.toml",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(TINY, "in.h5")
    Path("in.npz").touch()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("read")

    for reader in ("trace.format.Trace.open", "importers.importing.import_traces"):
        monkeypatch.setattr(f"moetrace.{reader}", refuse)
    return tmp_path


@pytest.mark.parametrize("command", WRITERS)
def test_an_unwritable_output_is_refused_first(run, here, command):
    if command.startswith("analyze"):
        pytest.importorskip("altair")
        pytest.importorskip("vl_convert")
    ending = command.partition("{}")[2].split()[0]
    Path(f"folder{ending}").mkdir()
    before = sorted(here.rglob("*"))
    for name, sentence in (("none/a", "there is no folder none"), ("folder", "it is not an ordinary file")):
        code, out, err = run(*command.format(name).split())
        if command.startswith("generate") and name == "folder":
            assert (code, out) == (2, "") and f"'folder{ending}' is a directory" in err  # click says so
        else:
            assert (code, out) == (1, "") and f"{name}{ending} could not be written: {sentence}" in err
        assert err.count("\n") == 1
    if os.geteuid():
        here.chmod(0o500)
        code, out, err = run(*command.format("a").split())
        here.chmod(0o700)
        assert code == 1 and "could not be written: Permission denied" in err
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("command", WRITERS)
def test_an_input_is_not_replaced(run, here, command):
    if command.startswith("analyze"):
        pytest.importorskip("altair")
        pytest.importorskip("vl_convert")
    ending = command.partition("{}")[2].split()[0]
    Path(f"link{ending}").symlink_to("in.npz" if "in.npz" in command else "in.h5")
    code, out, err = run(*command.format("link").split())
    assert (code, out) == (2, "") and f"link{ending} is also an input" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "analyze balance in.h5 --placement ep --plot a.html --export ./a.html",
        "analyze locality in.h5 --format csv --plot a.html -o a.html",
        "generate a.toml --requests 1 --prompt 1 --output 1 --like in.h5 --save-profile a.toml",
    ],
)
def test_two_outputs_are_two_files(run, here, command):
    code, out, err = run(*command.split())
    assert (code, out) == (2, "") and "must be different files" in err and err.count("\n") == 1


def test_the_bias_of_a_router_is_read(run, here):
    Path("bias.npy").touch()
    code, out, err = run("import", "in.npz", "-o", "bias.npy", "--router", "softmax,bias=bias.npy")
    assert (code, out) == (2, "") and "bias.npy is also an input" in err and err.count("\n") == 1


def test_files_are_written_all_or_none(tmp_path, monkeypatch):
    write_whole({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert (tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes() == b"12"
    with pytest.raises(MoetraceError, match=r"there is no folder .*none"):
        write_whole({tmp_path / "a": b"3", tmp_path / "none" / "b": b"4"})

    def write(self, data):
        if data == b"6":
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moetrace.trace.atomic.AtomicFile.write", write)
    for files in ({tmp_path / "a": b"5", tmp_path / "b": b"6"}, {tmp_path / "a": b"6", tmp_path / "b": b"5"}):
        with pytest.raises(MoetraceError, match="No space left on device; nothing was changed"):
            write_whole(files)
    assert (tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes() == b"12"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
