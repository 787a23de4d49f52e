"""An empty path is no folder: `Path` would take it for the current one, and files would lie where nobody looks."""

import numpy as np
import pytest

import moetrace as mt


@pytest.mark.parametrize("command", ["write", "sweep", "search", "advise"])
def test_an_empty_path_is_refused_and_nothing_written(command, tmp_path, monkeypatch):
    made = mt.Trace.from_arrays(np.array([[[3, 1, 0, 2]] * 6]), num_experts=32, model="tiny-olmoe")
    mt.generate(tmp_path / "a.h5", "tiny-olmoe", requests=1, prompt=1, output=1)
    grid = {"trace": str(tmp_path / "a.h5"), "policy": ["monde", "ndp-tp"]}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    calls = {
        "write": lambda: mt.replay(made, policies="monde", slots=48).write(""),
        "sweep": lambda: mt.sweep(grid, ""),
        "search": lambda: mt.search(grid | {"search": {"trials": 1}}, ""),
        "advise": lambda: mt.advise(grid["trace"], system="jetson-orin", folder=""),
    }
    with pytest.raises(mt.UsageError, match="An empty path names no folder"):
        calls[command]()
    assert list((tmp_path / "here").iterdir()) == []
