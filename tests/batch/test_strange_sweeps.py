"""Sweep folders of strangers, and cells that meet a fault: nothing outside is written, the other cells go on."""

import json
import os
from concurrent.futures import Future

import pytest

import moetrace as mt
from moetrace.batch import cell as cells
from moetrace.batch import executors, work
from moetrace.batch import sweep as sweep_module
from moetrace.batch.sweep_folder import SweepFolder, _sha256


def cell_of(folder):
    (path,) = (folder / "cells").iterdir()
    return path


@pytest.fixture
def grid(small):
    return {"trace": small, "policy": "monde", "slots": 4}


@pytest.mark.parametrize("what", ["link", "link to nothing", "fifo", "device"])
def test_a_cell_that_is_no_ordinary_file_is_replaced_itself(grid, tmp_path, what):
    mt.sweep(grid, tmp_path / "probe")
    (tmp_path / "out" / "cells").mkdir(parents=True)
    place, outside = tmp_path / "out" / "cells" / cell_of(tmp_path / "probe").name, tmp_path / "victim"
    outside.write_text("precious")
    if what == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to({"link": outside, "link to nothing": tmp_path / "made", "device": "/dev/zero"}[what])
    found = mt.sweep(grid, tmp_path / "out")
    assert (found.computed, found.reused, found.failed) == (1, 0, {})
    assert outside.read_text() == "precious" and not (tmp_path / "made").exists()
    assert place.is_file() and not place.is_symlink()
    assert place.read_bytes() == cell_of(tmp_path / "probe").read_bytes()
    assert mt.sweep(grid, tmp_path / "out").reused == 1


def test_cells_behind_a_link_are_refused(grid, tmp_path):
    mt.sweep(grid, tmp_path / "other")
    mt.sweep(grid, tmp_path / "out")
    before = cell_of(tmp_path / "other").read_bytes()
    cell_of(tmp_path / "out").unlink()
    (tmp_path / "out" / "cells").rmdir()
    (tmp_path / "out" / "cells").symlink_to(tmp_path / "other" / "cells")
    with pytest.raises(mt.MoetraceError, match="cells is a symbolic link, and a sweep writes inside its folder only"):
        mt.sweep(grid | {"slots": [4, 5]}, tmp_path / "out")
    with pytest.raises(mt.MoetraceError, match="cells is not a folder"):
        mt.gate(tmp_path / "out", tmp_path / "b.json", update=True)
    assert SweepFolder(tmp_path / "out", reads=True).finished(cell_of(tmp_path / "other").stem) is None
    assert cell_of(tmp_path / "other").read_bytes() == before


def test_tables_behind_links_are_replaced_and_a_folder_that_is_named_is_followed(grid, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "victim").write_text("precious")
    for name in ("sweep.json", "cells.parquet", "search.json"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "victim")
    (tmp_path / "named").symlink_to(tmp_path / "out")
    mt.sweep(grid, tmp_path / "named")
    assert (tmp_path / "victim").read_text() == "precious"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cells", "cells.parquet", "sweep.json"]
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def forged(path, change):
    """Change what a cell holds, and make its hash right again."""
    cell = json.loads(path.read_text())
    change(cell)
    cell["found_sha256"] = _sha256({key: cell[key] for key in ("result", "costs", "warnings")})
    path.write_text(json.dumps(cell))


@pytest.mark.parametrize(
    "change",
    [
        lambda cell: cell.update(result={}),
        lambda cell: cell["result"].update(policies=[]),
        lambda cell: cell["result"]["policies"][0].update(total_s=-1.0),
        lambda cell: cell["result"]["policies"][0].update(hits=-1),
        lambda cell: cell.update(costs={"price": "free"}),
        lambda cell: cell["result"]["policies"].append(cell["result"]["policies"][0] | {"name": "twice"}),
    ],
)
def test_a_cell_with_a_right_hash_and_wrong_figures_is_replayed_again(grid, tmp_path, change):
    mt.sweep(grid, tmp_path)
    path = cell_of(tmp_path)
    before = path.read_bytes()
    forged(path, lambda cell: None)
    assert mt.sweep(grid, tmp_path).reused == 1
    forged(path, change)
    assert mt.sweep(grid, tmp_path).computed == 1
    assert path.read_bytes() == before


def test_temporary_files_of_killed_sweeps_are_removed_after_a_day(grid, tmp_path):
    mt.sweep(grid, tmp_path)
    name = cell_of(tmp_path).name
    old, young, other = (tmp_path / "cells" / f".{kind}.tmp" for kind in (f"{name}.00000000", f"{name}.11111111", "x"))
    for path in (old, young, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (0, 0))
    mt.sweep(grid, tmp_path)
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)


def test_an_exception_in_one_cell_does_not_end_the_sweep(small, tmp_path, monkeypatch):
    evaluate = work.evaluate

    def faulty(trace, setups):
        if any(setup.slots == 2 for setup in setups):
            raise KeyError("a fault")
        return evaluate(trace, setups)

    grid = {"trace": small, "policy": ["monde", "edge-ndp"], "slots": [1, 2, 3]}
    with monkeypatch.context() as patch:
        patch.setattr(work, "evaluate", faulty)
        found = mt.sweep(grid, tmp_path)
    assert list(found.failed) == ["small/edge-ndp/monde/slots=2", "small/edge-ndp/edge-ndp/slots=2"]
    assert set(found.failed.values()) == {
        "moetrace has a fault that this cell meets (KeyError: 'a fault'): please report it."
    }
    assert found.computed == 4 and found.cells["total_s"].null_count() == 2
    assert mt.sweep(grid, tmp_path).computed == 2


def test_a_fault_while_a_cell_is_resolved_or_its_outcome_is_read_is_of_that_cell(small, tmp_path, monkeypatch):
    check = cells.check_setup

    def faulty(trace, setup):
        if setup.slots == 2:
            raise ZeroDivisionError
        return check(trace, setup)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "check_setup", faulty)
        found = mt.sweep({"trace": small, "policy": "monde", "slots": [1, 2, 3]})
    assert (found.computed, list(found.failed)) == (2, ["small/edge-ndp/monde/slots=2"])

    class Garbled(executors.Inline):
        """An executor whose first outcome cannot be read back."""

        first = True

        def submit(self, fn, /, *args, **kwargs):
            if not Garbled.first:
                return super().submit(fn, *args, **kwargs)
            Garbled.first = False
            future: Future = Future()
            future.set_exception(TypeError("cannot unpickle"))
            return future

    monkeypatch.setattr(work, "LOGS_BYTES", 1)
    monkeypatch.setattr(sweep_module, "local_farm", lambda jobs: executors.Farm(Garbled, 1, 1))
    found = mt.sweep({"trace": small, "policy": "monde", "slots": [1, 2, 3]})
    assert (found.computed, len(found.failed)) == (2, 1) and "cannot unpickle" in next(iter(found.failed.values()))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_signal_behind_an_error_still_ends_the_sweep(small, monkeypatch, stop):
    def stopped(trace, setups):
        try:
            raise stop
        except stop:
            raise RuntimeError("compiling failed") from None  # as Numba says it: the signal is its context

    monkeypatch.setattr(work, "evaluate", stopped)
    with pytest.raises(stop):
        mt.sweep({"trace": small, "policy": "monde", "slots": [1, 2]})


def test_an_exception_in_one_trial_does_not_end_a_search(small, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    evaluate = work.evaluate

    def faulty(trace, setups):
        if any(setup.slots == 2 for setup in setups):
            raise KeyError("a fault")
        return evaluate(trace, setups)

    monkeypatch.setattr(work, "evaluate", faulty)
    space = {"trace": small, "policy": "monde", "slots": [1, 2, 3], "search": {"trials": 3, "parts": 1}}
    found = mt.search(space, tmp_path)
    assert [(trial.state, trial.error is None) for trial in found.trials].count(("failed", False)) == 1
    assert found.best is not None
