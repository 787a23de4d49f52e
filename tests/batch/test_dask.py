"""The same cells on a Dask cluster: the same bytes, also when a worker is killed."""

import socket

import pytest
from support.sweeps import KILLS, files, files_of

import moetrace as mt
from moetrace.batch.executors import dask_farm
from moetrace.spec.errors import UsageError

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("dask")


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as found:
        yield found


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_changes_no_byte(cluster, small, tmp_path):
    grid = {"trace": small, "policy": ["monde", "edge-ndp"], "slots": [0, 4, 8]}
    found = mt.sweep(grid, tmp_path / "dask", dask=cluster.scheduler_address)
    assert (found.computed, found.failed) == (6, {})
    assert files(tmp_path / "dask") == files_of(grid, tmp_path / "here")
    assert mt.sweep(grid, tmp_path / "dask", dask=cluster.scheduler_address).reused == 6


@pytest.mark.filterwarnings("ignore")
def test_a_killed_worker_loses_no_cell(cluster, small, tmp_path):
    (tmp_path / "dies.py").write_text(KILLS.format(flag=str(tmp_path / "flag"), times=1))
    grid = {"trace": small, "policy": ["monde", str(tmp_path / "dies.py:dies")], "slots": [0, 4]}
    found = mt.sweep(grid, tmp_path / "dask", dask=cluster.scheduler_address)
    assert (tmp_path / "flag").exists()
    assert (found.computed, found.failed) == (4, {})
    assert files(tmp_path / "dask") == files_of(grid, tmp_path / "here")


@pytest.mark.filterwarnings("ignore")
def test_a_cell_that_kills_its_workers_fails_and_the_others_go_on(small, tmp_path):
    (tmp_path / "dies.py").write_text(KILLS.format(flag=str(tmp_path / "flag"), times=99))
    grid = {"trace": small, "policy": ["monde", "edge-ndp", str(tmp_path / "dies.py:dies")], "slots": 4}
    how = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": 50}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),  # else each death is tried again by Dask, too
        distributed.LocalCluster(**how) as cluster,
    ):
        found = mt.sweep(grid, tmp_path / "dask", dask=cluster.scheduler_address)
    assert (found.computed, list(found.failed)) == (2, ["small/edge-ndp/dies"])
    assert "is killed" in next(iter(found.failed.values()))


@pytest.mark.filterwarnings("ignore")
def test_no_scheduler_is_one_sentence(small):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(mt.MoetraceError, match="No Dask scheduler answers at") as error:
            mt.sweep({"trace": small}, dask=address)
    assert "\n" not in str(error.value)
    with pytest.raises(mt.MoetraceError, match="No Dask scheduler answers at nonsense"):
        mt.sweep({"trace": small}, dask="nonsense://x:1")


@pytest.mark.parametrize(
    "address", ["", "banana", "tcp://", "tcp://host", "host:port", "a b:1", "tcp://127.0.0.1:123456"]
)
def test_an_impossible_address_is_refused_before_dask_is_asked(address):
    with pytest.raises(UsageError, match="tcp://host:8786"), dask_farm(address):
        pytest.fail("nothing may be opened")
