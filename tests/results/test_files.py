"""The files of a result: what they hold, that they are reproducible, and all there or not at all."""

import json
import resource
import shutil
from itertools import islice
from pathlib import Path

import polars as pl
import pytest

import moetrace as mt
from moetrace.results import frames, write

TRACE = Path(__file__).parents[2] / "traces" / "tiny-olmoe.h5"
FILES = ["experts.parquet", "layers.parquet", "requests.parquet", "steps.parquet", "summary.json", "units.parquet"]
POLICIES = ["monde", "edge-ndp", "on-demand", "ndp-tp"]


@pytest.fixture(scope="module")
def result():
    return mt.replay(TRACE, slots=48, jobs=1, policies=POLICIES)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_files_hold_the_frames(result, tmp_path):
    result.write(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert names(folder) == FILES
    for name in ("steps", "units", "layers", "requests", "experts"):
        assert pl.read_parquet(folder / f"{name}.parquet").equals(getattr(result, name)), name
    text = (folder / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=no_constant) == result.to_dict()


def test_summary_has_what_the_contract_says(result):
    summary = result.to_dict()
    assert summary["schema"] == "moetrace.result/1"
    assert summary["moetrace"] == mt.__version__
    assert (summary["trace"]["rows"], summary["trace"]["steps"], summary["trace"]["requests"]) == (16414, 6981, 64)
    assert summary["model"]["name"] == "tiny-olmoe"
    assert summary["system"]["ndp"]["units"] == 6
    assert [policy["name"] for policy in summary["policies"]] == POLICIES
    keys = """name total_s prefill_s decode_s mixed_s tokens_per_s hits misses step_s ttft_s tpot_s hit_rate
        demand_bytes prefetch_bytes late wasted imbalance_mean utilization work_bound_s clairvoyant_s speedup"""
    for policy in summary["policies"]:
        assert set(keys.split()) <= set(policy)
        assert list(policy["step_s"]) == ["mean", "p50", "p95", "p99", "max"]
        assert list(policy["utilization"]) == ["gpu", "ndp", "link_in", "link_out", "cpu"]
        assert len(policy["utilization"]["ndp"]) == 6
    # A policy that runs only on units is its own clairvoyant, to the last bit.
    assert summary["policies"][3]["clairvoyant_s"] == summary["policies"][3]["total_s"]


def test_same_bytes_for_any_jobs_slice_and_place(result, tmp_path, monkeypatch):
    result.write(tmp_path / "a")
    copy = tmp_path / "other-name.h5"
    shutil.copy(TRACE, copy)
    monkeypatch.setattr(frames, "SLICE_STEPS", 5000)
    mt.replay(copy, slots=48, jobs=4, policies=POLICIES).write(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "b").values())


def test_a_policy_file_is_named_without_its_folder(tmp_path):
    (tmp_path / "mine.py").write_text("def on_units(state, view, layer, load, plan):\n    pass\n")
    result = mt.replay(TRACE, policies=f"{tmp_path / 'mine.py'}:on_units")
    assert result.to_dict()["policies"][0]["choices"]["dispatch"] == "mine.py:on_units"


def test_old_files_are_replaced_and_others_stay(result, tmp_path):
    for name in ("summary.json", "notes.txt"):
        (tmp_path / name).write_text("old")
    result.write(tmp_path)
    assert names(tmp_path) == sorted([*FILES, "notes.txt"])
    assert (tmp_path / "notes.txt").read_text() == "old"
    assert (tmp_path / "summary.json").read_text() != "old"


@pytest.fixture
def before(tmp_path):
    """A folder with an older result in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text("old")
    return folder


def test_full_disk_changes_nothing(result, before):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Enough for the summary, not for the steps; writing further is refused like on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, hard))
    try:
        for folder in (before, before.parent / "new"):
            with pytest.raises(
                mt.MoetraceError, match="could not be written: File too large; nothing was changed"
            ) as error:
                result.write(folder)
            assert str(folder) in str(error.value)
            assert ".moetrace-" not in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(before.parent) == ["out"]
    assert contents(before) == dict.fromkeys(FILES, b"old")


def test_ctrl_c_changes_nothing(result, before, monkeypatch):
    whole = frames.step_slices

    def interrupted(run):
        yield from islice(whole(run), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(frames, "step_slices", interrupted)
    for folder in (before, before.parent / "new" / "er"):
        with pytest.raises(KeyboardInterrupt):
            result.write(folder)
    assert names(before.parent) == ["out"]
    assert contents(before) == dict.fromkeys(FILES, b"old")


def test_places_that_cannot_be_written(result, before):
    with pytest.raises(mt.UsageError, match="is a file, but results are written into a folder"):
        result.write(before / "summary.json")
    with pytest.raises(mt.MoetraceError, match="could not be written: Not a directory; nothing was changed"):
        result.write(before / "summary.json" / "below")
    (before / "units.parquet").unlink()
    (before / "units.parquet").mkdir()
    with pytest.raises(mt.UsageError, match=r"units\.parquet is a folder"):
        result.write(before)
    assert (before / "summary.json").read_text() == "old"
    assert names(before) == FILES


def test_json_has_no_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        write.to_json({"hit_rate": float("nan")})
