"""The trace file: what goes in comes out, in blocks of any size; what doesn't fit is one sentence."""

import errno
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

from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace
from moetrace.trace.schema import absent_id, expert_dtype


def draw_trace(
    seed: int, num_experts: int, rows: int = 40, layers: int = 3, top_k: int = 2, mixed: bool = False
) -> Trace:
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((rows, layers, num_experts)), axis=-1)[..., :top_k]
    experts[rng.random(experts.shape) < 0.1] = absent_id(num_experts)
    cuts = np.unique(rng.integers(1, rows, rows // 3)) if rows > 1 else np.array([], int)
    steps = np.diff(np.r_[0, cuts, rows])
    phase = rng.integers(0, 3 if mixed else 2, steps.size)
    row_phase = np.repeat(phase, steps)
    row_phase[row_phase == 2] = rng.integers(0, 2, np.count_nonzero(row_phase == 2))
    recorded = np.where(experts == absent_id(num_experts), 255, rng.integers(0, 3, experts.shape))
    return Trace.from_arrays(
        experts.astype(expert_dtype(num_experts)),
        num_experts=num_experts,
        model="some-model",
        source={"engine": "none", "seed": seed},
        request=rng.integers(0, min(rows, 5), rows),
        steps=steps,
        phase=phase,
        layer_index=np.sort(rng.choice(100, layers, replace=False)),
        expert_bytes=rng.integers(1, 1 << 40, (layers, num_experts) if seed % 2 else layers),
        gates=rng.random(experts.shape).astype(np.float16),
        token=rng.integers(0, 50000, rows),
        recorded=recorded,
        **({"row_phase": row_phase} if mixed else {}),
    )


def joined(trace: Trace, rows: int | None, ahead: int = 0) -> dict[str, np.ndarray]:
    """The blocks put together again, without what each has ahead."""
    blocks = list(trace.blocks(rows, ahead))
    parts = {name: [getattr(b, name)[: b.offset[b.steps]] for b in blocks] for name in ("request", "position", "phase")}
    parts["experts"] = [b.experts[: b.offset[b.steps]] for b in blocks]
    parts["offset"] = [np.diff(b.offset[: b.steps + 1]) for b in blocks]
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "t.h5"
    draw_trace(1, 8, mixed=True).write(path)
    return path


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


def test_reading_takes_no_anonymous_memory(tmp_path):
    path = tmp_path / "large.h5"
    experts = np.broadcast_to(np.arange(8, dtype=np.uint8), (150_000, 60, 8))
    Trace.from_arrays(experts, num_experts=8).write(path)

    def anonymous_kb() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    del experts
    with Trace.open(path) as trace:
        before = anonymous_kb()
        kept = list(trace.blocks())
        assert sum(int(block.experts[:, 0, 1].sum()) for block in kept) == 150_000
        assert path.stat().st_size > 72e6 and anonymous_kb() - before < 20_000


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


def change(path: Path, name: str, value) -> None:
    """Replace a dataset or an attribute of the file (None: delete it)."""
    with h5py.File(path, "r+") as raw:
        place = raw.attrs if not name.startswith("/") else raw
        del place[name]
        if value is not None:
            place[name] = value


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("schema", None, "no attribute 'schema'"),
        ("schema", "moetrace/2", "has schema 'moetrace/2', but this version reads 'moetrace/1'"),
        ("num_experts", 0, "num_experts is 0"),
        ("num_experts", 300, "/experts holds uint8, but must hold uint16"),
        ("num_experts", "8", "num_experts is not a whole number"),
        ("top_k", 9, "top_k is 9, but must be 1 to num_experts"),
        ("top_k", 1, r"/experts has shape \(40, 3, 2\), but \(40, 3, 1\) is needed"),
        ("model", 3, "model is not text"),
        ("source", "{", "source is not JSON"),
        ("source", "[]", "source is not a JSON object"),
        ("source", "[" * 30000, "source is not JSON: maximum recursion"),
        ("source", '{"a":' * 64 + "{}" + "}" * 64, "source is nested deeper than 64 levels"),
        ("source", "x" * 40000, "source is larger than 32768 bytes"),
        ("/experts", None, "has no dataset /experts"),
        ("/experts", np.zeros((40, 3), np.uint8), r"/experts has shape \(40, 3\)"),
        ("/experts", np.zeros((41, 3, 2), np.uint8), r"/rows/request has shape \(40,\), but \(41\) is needed|/gates"),
        ("/experts", np.zeros((40, 3, 2), np.int64), "/experts holds int64, but must hold uint8"),
        ("/experts", np.zeros((0, 3, 2), np.uint8), "/gates|empty"),
        ("/rows/request", np.zeros(40, np.float64), "/rows/request holds float64"),
        ("/rows/request", None, "has no dataset /rows/request"),
        ("/gates", np.zeros((40, 3), np.float16), "/gates has shape"),
        ("/rows/phase", None, "is mixed, so /rows/phase is needed"),
        ("/layers/index", np.zeros(3, np.uint16), "/layers/index must increase"),
        ("/layers/expert_bytes", np.zeros(3, np.int64), "expert_bytes of layer entry 0 is not positive"),
        ("/layers/expert_bytes", np.ones(4, np.int64), r"expert_bytes has shape \(4,\)"),
        ("/steps/offset", np.zeros(3, np.int64), "/steps/offset has shape"),
        ("/steps/offset", None, "has no dataset /steps/offset"),
        ("/steps", np.zeros(3), "has no dataset /steps/offset"),
    ],
)
def test_a_bad_file_is_one_sentence(file, name, value, sentence):
    change(file, name, value)
    with pytest.raises(MoetraceError, match=sentence) as raised:
        Trace.open(file)
    assert str(file) in str(raised.value) and str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("step", "value", "sentence"),
    [
        (0, 1, "must begin with 0, but begins with 1"),
        (-1, 41, r"must end with the number of rows \(40\), but ends with 41"),
        (2, 10**6, r"must increase by one row or more a step, but goes from 1000000 to \d+ at step 2"),
        (3, -5, "but goes from .* to -5 at step 2"),
    ],
)
def test_offsets_that_are_not_monotone(file, step, value, sentence):
    with h5py.File(file, "r+") as raw:
        raw["/steps/offset"][step] = value
    with pytest.raises(MoetraceError, match=f"{re.escape(str(file))}: /steps/offset .*{sentence}"):
        Trace.open(file)


@pytest.mark.parametrize(
    ("path", "at", "value", "sentence"),
    [
        ("/experts", (17, 1, 0), 8, "row 17, layer entry 1 holds the id 8, but the model has 8 experts"),
        ("/rows/request", 17, -1, "/rows/request of row 17 is -1, but must be 0 or more"),
        ("/rows/position", 17, -3, "/rows/position of row 17 is -3"),
        ("/rows/phase", 17, 2, "/rows/phase of row 17 is 2"),
        ("/recorded/resident", (17, 1, 0), 3, "/recorded/resident row 17, layer entry 1 is 3"),
    ],
)
def test_impossible_values_are_named_by_row(file, path, at, value, sentence):
    with h5py.File(file, "r+") as raw:
        raw[path][at] = value
    with Trace.open(file) as trace, pytest.raises(MoetraceError, match="differs from its sha256"):
        trace.verify()
    rewrite_sha256(file, path)
    with Trace.open(file) as trace, pytest.raises(MoetraceError, match=sentence):
        trace.verify()


def rewrite_sha256(file: Path, path: str) -> None:
    import hashlib

    with h5py.File(file, "r+") as raw:
        raw[path].attrs["sha256"] = hashlib.sha256(raw[path][()].tobytes()).hexdigest()


def test_an_expert_chosen_twice_is_named_by_row():
    experts = np.zeros((4, 1, 2), np.uint8) + np.array([0, 1], np.uint8)
    experts[2] = 1
    with pytest.raises(MoetraceError, match="row 2, layer entry 0 chooses expert 1 more than once"):
        Trace.from_arrays(experts, num_experts=4).verify()


def test_row_phase_must_agree_with_a_pure_step():
    experts = np.zeros((2, 1, 1), np.uint8)
    trace = Trace.from_arrays(experts, num_experts=2, phase=[0, 1], row_phase=[0, 0])
    with pytest.raises(MoetraceError, match="/rows/phase of row 1 is 0, but its step is decode"):
        next(trace.row_blocks())


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"steps": [3, 1]}, "must end with the number of rows"),
        ({"steps": [2, 0, 3]}, "must increase by one row or more"),
        ({"phase": [0, 1, 0, 1, 3]}, "/steps/phase of step 4 is 3"),
        ({"phase": [0, 1, 2, 1, 0]}, "is mixed, so /rows/phase is needed"),
        ({"request": np.zeros(4, int)}, "/rows/request has shape"),
        ({"request": np.zeros((5, 1), int)}, "/rows/request has shape"),
        ({"request": np.full(5, 1 << 40)}, "beyond those of int32"),
        ({"gates": np.zeros((5, 1, 2))}, "/gates has shape"),
        ({"gates": np.full((5, 2, 1), 1e6)}, "beyond those of float16"),
        ({"wrong": np.zeros(5)}, "no array 'wrong'"),
        ({"num_experts": 1 << 16}, "num_experts is 65536"),
        ({"num_experts": 4.5}, "num_experts is 4.5, but must be a whole number"),
        ({"num_experts": "4"}, "num_experts is '4', but must be a whole number"),
        ({"steps": [2.5, 2.5]}, "steps holds float64, but must hold int64"),
    ],
)
def test_arrays_in_memory_are_checked_alike(arrays, sentence):
    with pytest.raises(MoetraceError, match=sentence):
        Trace.from_arrays(np.zeros((5, 2, 1), np.uint8), **({"num_experts": 3} | arrays))


def test_what_is_no_trace_file(tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("rows,steps\n1,2\n")
    for path, sentence in (
        (text, "not a trace file: it is not an HDF5 file"),
        (tmp_path / "none.h5", "there is no file"),
        (tmp_path, "is not a file"),
    ):
        with pytest.raises(MoetraceError, match=sentence):
            Trace.open(path)


def test_an_unreadable_file_is_one_sentence(file, monkeypatch):
    def refuse(*_args, **_options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MoetraceError, match=r"t\.h5 can't be read: Permission denied"):
        Trace.open(file)


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, compress):
    path = tmp_path / "t.h5"
    draw_trace(1, 8, mixed=True).write(path, compress)
    whole = path.read_bytes()
    for size in [0, 1, 7, 50, 200, *range(1000, len(whole), 7919), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(MoetraceError, match=r"t\.h5 "):
            Trace.open(path)


def test_flipped_bytes_never_do_worse_than_an_error(file):
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    damaged = 0
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 40):
            data[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        try:
            with Trace.open(file) as trace:
                trace.verify()
        except MoetraceError:
            damaged += 1
    assert damaged > 0


def test_data_elsewhere_is_refused(file, tmp_path):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(240))
    with h5py.File(file, "r+") as raw:
        del raw["/experts"]
        raw.create_dataset("/experts", (40, 3, 2), np.uint8, external=[(str(secret), 0, 240)])
    with pytest.raises(MoetraceError, match="/experts keeps its data in another file"):
        Trace.open(file)
    for link in (h5py.SoftLink("/gates"), h5py.ExternalLink(str(secret), "/x")):
        with h5py.File(file, "r+") as raw:
            del raw["/experts"]
            raw["/experts"] = link
        with pytest.raises(MoetraceError, match="/experts is a link"):
            Trace.open(file)


def test_a_dataset_that_was_never_written_is_refused(file):
    with h5py.File(file, "r+") as raw:
        del raw["/experts"]
        raw.create_dataset("/experts", (40, 3, 2), np.uint8)
    with pytest.raises(MoetraceError, match="/experts has no data"):
        Trace.open(file)
    with h5py.File(file, "r+") as raw:
        del raw["/experts"]
        raw.create_dataset("/experts", (40, 3, 2), np.uint8, chunks=(8, 3, 2))
    with pytest.raises(MoetraceError, match="/experts lacks some of its 5 chunks"):
        Trace.open(file)


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
