"""The trace file: what goes in comes out, in blocks of any size; what doesn't fit is one sentence."""

import json
import os
import re
import resource
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.drawn_traces import change, draw_trace

from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace


def joined(trace: Trace, rows: int | None, ahead: int = 0) -> dict[str, np.ndarray]:
    """The blocks put together again, without what each has ahead."""
    blocks = list(trace.blocks(rows, ahead))
    parts = {name: [getattr(b, name)[: b.offset[b.steps]] for b in blocks] for name in ("request", "position", "phase")}
    parts["experts"] = [b.experts[: b.offset[b.steps]] for b in blocks]
    parts["offset"] = [np.diff(b.offset[: b.steps + 1]) for b in blocks]
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    num_experts=st.sampled_from([2, 8, 255, 256, 300]),
    rows=st.integers(1, 60),
    layers=st.integers(1, 4),
    mixed=st.booleans(),
    compress=st.sampled_from([None, "zstd", "gzip"]),
)
def test_round_trip_is_exact(tmp_path_factory, seed, num_experts, rows, layers, mixed, compress):
    trace = draw_trace(seed, num_experts, rows, layers, top_k=2, mixed=mixed)
    path = tmp_path_factory.mktemp("round") / "t.h5"
    trace.write(path, compress)
    with Trace.open(path) as back:
        back.verify()
        for name in ("model", "source", "num_experts", "top_k", "layers", "rows", "steps", "has", "created_by"):
            assert getattr(back, name) == getattr(trace, name)
        for name in ("offset", "phase", "layer_index", "expert_bytes"):
            assert np.array_equal(getattr(back, name), getattr(trace, name))
        for name in ("experts", "request", "position", *trace.has):
            ours, theirs = trace.read(name, 0, rows), back.read(name, 0, rows)
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 70),
    ahead=st.integers(0, 5),
    compress=st.sampled_from([None, "zstd"]),
)
def test_blocks_of_any_size_are_the_whole(tmp_path_factory, seed, rows, ahead, compress):
    trace = draw_trace(seed, 8, rows=50, mixed=True)
    path = tmp_path_factory.mktemp("blocks") / "t.h5"
    trace.write(path, compress)
    with Trace.open(path) as back:
        whole, parts = joined(trace, 10**9), joined(back, rows, ahead)
        assert np.array_equal(parts["offset"], np.diff(trace.offset))
        for name, array in whole.items():
            assert np.array_equal(array, parts[name])
        for block in back.blocks(rows, ahead):
            assert block.offset[block.steps] <= max(rows, block.offset[1])
            assert block.offset.size == min(block.steps + ahead, trace.steps - block.first_step) + 1
            assert block.offset[-1] == len(block.experts) == len(block.request) == len(block.phase)
        first_pass = list(back.row_blocks())
        assert np.array_equal(np.concatenate([part.phase for part in first_pass]), whole["phase"])
        assert np.array_equal(np.concatenate([part.request for part in first_pass]), whole["request"])


def test_default_block_is_about_four_mib():
    trace = Trace.from_arrays(np.zeros((100_000, 48, 2), np.uint8), num_experts=300)
    sizes = [block.experts.nbytes for block in trace.blocks()]
    assert max(sizes) <= 4 << 20 and sizes[0] > 3 << 20 and sum(sizes) == 100_000 * 48 * 4


def test_mapped_ids_are_an_ordinary_array_and_the_file_is_safe(file):
    before = file.read_bytes()
    with Trace.open(file) as trace:
        block = next(trace.blocks())
        assert trace.storage == "mapped" and type(block.experts) is np.ndarray
        assert block.experts.flags.c_contiguous and block.experts.flags.aligned and block.experts.flags.writeable
        block.experts[:] = 7
    assert block.experts[0, 0, 0] == 7, "what was read stays valid after close"
    assert file.read_bytes() == before


def test_any_number_of_blocks_may_be_kept(tmp_path):
    path = tmp_path / "t.h5"
    experts = np.zeros((100, 65535, 4), np.uint8) + np.arange(4, dtype=np.uint8)  # each row is large enough to map
    Trace.from_arrays(experts, num_experts=4).write(path)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, before[1]))
    try:
        with Trace.open(path) as trace:
            kept = list(trace.blocks(rows=1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(kept) == 100 and all(np.array_equal(block.experts[0], experts[0]) for block in kept)


def test_a_file_that_becomes_shorter_while_open_is_an_error(file):
    with Trace.open(file) as trace:
        os.truncate(file, 5000)
        with pytest.raises(MoetraceError, match="became shorter while it was read"):
            list(trace.blocks())


def test_memory_does_not_grow_with_the_rows_read(tmp_path):
    path = tmp_path / "large.h5"
    experts = np.broadcast_to(np.arange(8, dtype=np.uint8), (150_000, 60, 8))
    Trace.from_arrays(experts, num_experts=8).write(path)

    def anonymous_kb() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    del experts
    with Trace.open(path) as trace:
        most = before = anonymous_kb()
        total = 0
        for block in trace.blocks():
            total += int(block.experts[:, 0, 1].sum())
            most = max(most, anonymous_kb())
        assert total == 150_000
        assert path.stat().st_size > 72e6 and most - before < 20_000


def test_same_data_same_bytes(tmp_path, monkeypatch):
    for compress in (None, "zstd", "gzip"):
        trace = draw_trace(2, 8, rows=9000, layers=1)
        paths = [tmp_path / f"{compress}{i}.h5" for i in range(2)]
        trace.write(paths[0], compress)
        monkeypatch.setattr("moetrace.trace.format.BLOCK_BYTES", 3000)  # appends of another size
        monkeypatch.setattr("time.time", lambda: 4e9)
        trace.write(paths[1], compress)
        monkeypatch.undo()
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_bytes_do_not_hold_the_time(tmp_path):
    import time

    trace = draw_trace(3, 8)
    trace.write(tmp_path / "a.h5")
    time.sleep(1.1)  # HDF5 stamps whole seconds, if it does
    trace.write(tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_datasets_are_aligned_and_have_their_sha256(file):
    with h5py.File(file) as raw:
        found = []
        raw.visititems(lambda name, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
        assert len(found) == 11 and all(item.id.get_offset() % 4096 == 0 for item in found)
        assert all(len(item.attrs["sha256"]) == 64 for item in found)


def test_positions_count_up_within_a_request_unless_given():
    trace = Trace.from_arrays(np.zeros((5, 1, 1), np.uint8), num_experts=2, request=np.array([0, 1, 0, 0, 1]))
    assert trace.read("position", 0, 5).tolist() == [0, 0, 1, 2, 1]


def test_counts_open_but_have_no_blocks(file):
    with h5py.File(file, "r+") as raw:
        steps = raw["/steps/phase"].shape[0]
        del raw["/experts"]
        raw["/counts"] = np.ones((steps, 3, 8), np.int64)
    with Trace.open(file) as trace:
        assert trace.has == {"counts"} and trace.rows == 40 and trace.read("counts", 0, 1).sum() == 24
        for read in (trace.blocks, trace.row_blocks):
            with pytest.raises(MoetraceError, match="holds only counts"):
                read()


def test_ids_have_no_blocks_of_counts(file):
    with Trace.open(file) as trace, pytest.raises(MoetraceError, match="has no counts"):
        trace.count_blocks()


def test_a_closed_trace_says_so(file):
    trace = Trace.open(file)
    trace.close()
    with pytest.raises(MoetraceError, match="was closed"):
        next(trace.blocks())


def test_a_source_is_json_that_every_reader_takes(file, tmp_path):
    told = r'{"a": [NaN, 1e999, -Infinity, 0.5], "\ud800": {"b": "x\udfff", "c": [true, null, 3]}}'
    change(file, "source", told)
    change(file, "model", np.array(b"m\xff", dtype=h5py.string_dtype()))
    plain = {"a": [None, None, None, 0.5], "?": {"b": "x?", "c": [True, None, 3]}}
    with Trace.open(file) as trace:
        assert trace.source == plain and trace.model == "m?"
    given = {"a": (np.nan, np.inf, -np.inf, 0.5), "\ud800": {"b": "x\udfff", "c": [True, None, np.int64(3)]}}
    trace = Trace.from_arrays(np.zeros((2, 1, 1), np.uint8), num_experts=2, model="m\udcff", source=given)
    assert trace.source == plain and trace.model == "m?"
    with pytest.raises(MoetraceError, match="source holds a set, which JSON does not have"):
        Trace.from_arrays(np.zeros((2, 1, 1), np.uint8), num_experts=2, source={"a": {1}})


def test_source_survives_as_json(file):
    with h5py.File(file) as raw:
        assert json.loads(raw.attrs["source"]) == {"engine": "none", "seed": 1}


def test_content_is_hashed_alike_however_it_is_stored(tmp_path):
    trace = draw_trace(1, 20, mixed=True)
    assert trace.content_sha256 is None
    content = trace.hash_content()
    for compress in (None, "zstd", "gzip"):
        path = tmp_path / f"{compress}.h5"
        trace.write(path, compress)
        with Trace.open(path) as stored:
            assert stored.content_sha256 == content == stored.hash_content()
    trace.source = {"engine": "another"}
    assert trace.hash_content() == content
    trace.model = "another"
    assert trace.hash_content() != content
    assert draw_trace(2, 20, mixed=True).hash_content() != content
    with h5py.File(path, "r+") as raw:
        del raw["/experts"].attrs["sha256"]
    with Trace.open(path) as lacking:
        assert lacking.content_sha256 is None
        assert lacking.hash_content() == content


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 50))
def test_the_head_of_a_trace_is_its_first_steps(seed, steps):
    trace = draw_trace(seed, 20, mixed=True)
    head = trace.head(steps)
    steps = min(steps, trace.steps)
    rows = int(trace.offset[steps])
    assert (head.steps, head.rows, head.has, head.content_sha256) == (steps, rows, trace.has, None)
    assert head.offset.tolist() == trace.offset[: steps + 1].tolist()
    for name in ("experts", "request", "position", *head.has):
        np.testing.assert_array_equal(head.read(name, 0, 10**6), trace.read(name, 0, rows))
    head.verify()
