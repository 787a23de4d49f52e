"""Traces of strangers: sizes that a file only claims, chunks that unpack to more, HDF5 that a trace does not need."""

import json
import struct
import zlib
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
from support.drawn_traces import draw_trace
from support.limits import run_limited

import moetrace as mt
from moetrace.engine.schedule import schedule_of
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace, hdf5, own_process, plain, schema
from moetrace.trace.describe import describe
from moetrace.trace.writer import CountsWriter

GIB = 1 << 30


def by_hand(path: Path, experts: np.ndarray, num_experts: int, **options) -> Path:
    """A trace of one step as people write it with h5py: text of variable length, old groups."""
    rows, layers, top_k = experts.shape
    with h5py.File(path, "w") as file:
        facts = {"schema": "moetrace/1", "model": "x", "num_experts": num_experts, "top_k": top_k, "source": "{}"}
        for name, value in (facts | {"created_by": "hand"}).items():
            file.attrs[name] = value
        file.create_dataset("experts", data=experts, **options)
        file["rows/request"] = file["rows/position"] = np.arange(rows, dtype="<i4")
        file["steps/offset"], file["steps/phase"] = np.array([0, rows], "<i8"), np.ones(1, "u1")
        file["layers/index"] = np.arange(layers, dtype="<u2")
    return path


def zeros(file: h5py.File, path: str, shape: tuple[int, ...], kind: str) -> None:
    """A dataset of zeros that takes a few bytes for each 4 million rows."""
    chunk = 1 << 22
    data = file.create_dataset(path, shape, kind, chunks=(chunk, *shape[1:]), **hdf5plugin.Zstd(clevel=1))
    data[:chunk] = 0
    mask, raw = data.id.read_direct_chunk((0,) * len(shape))
    for start in range(chunk, shape[0], chunk):
        data.id.write_direct_chunk((start,) + (0,) * (len(shape) - 1), raw, mask)


def test_a_step_of_many_rows_is_looked_at_in_pieces_and_not_replayed(tmp_path):
    path, rows = by_hand(tmp_path / "one.h5", np.zeros((1, 1, 1), np.uint8), 1), 20 << 20
    with h5py.File(path, "r+") as file:
        for name in ("experts", "rows/request", "rows/position"):
            del file[name]
        zeros(file, "experts", (rows, 1, 1), "u1")
        for name in ("rows/request", "rows/position"):
            zeros(file, name, (rows,), "<i4")
        file["steps/offset"][1] = rows
    assert path.stat().st_size < 60_000
    done = run_limited("info", path, "--format", "json", memory_bytes=3 * GIB)
    assert done.code == 0 and json.loads(done.stdout)["rows"] == rows and done.peak_bytes < 600 << 20
    done = run_limited("analyze", "cache", path, "--capacity", "1", memory_bytes=3 * GIB)
    assert done.code == 1 and done.peak_bytes < 600 << 20 and "step 0 has 20,971,520 rows" in done.stderr
    with Trace.open(path) as trace, pytest.raises(MoetraceError, match="660 MiB at once, above the 512 MiB of a step"):
        next(trace.blocks())


def test_readers_in_pieces_agree_on_a_step_that_is_too_large(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((400, 3, 8)), axis=-1)[..., :2]
    steps = np.array([120, 3, 200, 77])
    request = rng.integers(0, 5, 400)
    Trace.from_arrays(ids, num_experts=8, steps=steps, request=request).write(tmp_path / "t.h5")
    names = ("t.npz", "t.parquet", "t.bin", "t.json")
    with Trace.open(tmp_path / "t.h5") as whole:
        facts, found = describe(whole), mt.lint(whole)
        for name in names:
            mt.export(whole, tmp_path / name)
    monkeypatch.setattr(schema, "STEP_BYTES", 70)
    monkeypatch.setattr(schema, "PART_ROWS", 7)
    monkeypatch.setattr("moetrace.exports.oracle_general.PART_CHOICES", 6)
    with Trace.open(tmp_path / "t.h5") as cut:
        cut.verify()
        assert describe(cut) == facts and mt.lint(cut) == found
        parts = list(cut.parts())
        assert max(len(part.experts) for part in parts) == 7 and sum(len(part.experts) for part in parts) == 400
        mt.export(cut, tmp_path / "cut.bin")
        for read in (cut.blocks, cut.row_blocks):
            with pytest.raises(MoetraceError, match=r"t\.h5: .* rows, which take .* cut long prompts with"):
                list(read())
        with pytest.raises(MoetraceError, match=r"a step would have 2 rows, .* cut prompts with"):
            mt.rebatch(cut, tmp_path / "again.h5", batch=2)
    assert not (tmp_path / "again.h5").exists()
    assert (tmp_path / "cut.bin").read_bytes() == (tmp_path / "t.bin").read_bytes()


def test_experts_of_all_layers_have_a_bound_before_anything_is_made_of_them(tmp_path):
    wide = np.zeros((1, 300, 1), np.uint16)
    for make in (
        lambda: Trace.from_arrays(wide, num_experts=65535),
        lambda: Trace.open(by_hand(tmp_path / "t.h5", wide, 65535)),
        lambda: mt.Writer("x", model="", num_experts=65535, top_k=1, layers=300, rows=1, steps=1, source={}),
    ):
        with pytest.raises(MoetraceError, match="300 layers of 65535 experts are more than the 16,777,216"):
            make()
    values = {"moe_layers": 17, "experts": 65535, "top_k": 1, "hidden": 64, "expert_intermediate": 64}
    more = {"weight_bits": 16, "dense_weight_bits": 16, "dense_params_per_layer": 1, "once_params": 1}
    text = "".join(f"{name} = {value}\n" for name, value in (values | more | {"kv_bytes_per_token_layer": 64}).items())
    (tmp_path / "m.toml").write_text('name = "wide"\n' + text)
    many = (tmp_path / "m.toml").read_text().replace("layers = 17", "layers = 300")
    (tmp_path / "many.toml").write_text(many)
    with pytest.raises(MoetraceError, match="a trace of wide: 300 layers of 65535 experts are more than"):
        mt.generate(tmp_path / "made.h5", str(tmp_path / "many.toml"), requests=1, prompt=1, output=1)
    trace = Trace.from_arrays(wide[:, :17], num_experts=65535)
    with pytest.raises(MoetraceError, match=r"17 x 65535 experts; a replay takes 1,048,576 at most"):
        mt.replay(trace, model=str(tmp_path / "m.toml"), system="rtx4090-offload", policies=["on-demand"])


def test_steps_and_requests_have_bounds(tmp_path, monkeypatch):
    path = by_hand(tmp_path / "t.h5", np.zeros((1, 1, 1), np.uint8), 1)
    with h5py.File(path, "r+") as file:
        del file["steps/offset"], file["steps/phase"]
        zeros(file, "steps/offset", ((1 << 26) + 2,), "<i8")
        zeros(file, "steps/phase", ((1 << 26) + 1,), "u1")
    with pytest.raises(MoetraceError, match="67,108,865 steps are too many"):
        Trace.open(path)
    monkeypatch.setattr(schema, "MAX_REQUESTS", 4)
    for look in (describe, schedule_of):
        with pytest.raises(MoetraceError, match="more than the 4 requests that a trace may have"):
            look(draw_trace(1, 8))


def zstd_frame(claims: int) -> bytes:
    """The begin of a zstd frame that says it unpacks to so many bytes."""
    return b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + struct.pack("<Q", claims) + bytes(3)


@pytest.mark.parametrize(
    ("compress", "raw", "sentence"),
    [
        ("zstd", zstd_frame(1 << 40), "unpacks to 1,099,511,627,776 bytes, but a chunk holds 240"),
        ("zstd", zstd_frame(239), "unpacks to 239 bytes"),
        ("zstd", b"\x28\xb5\x2f\xfd\x00\x00" + bytes(9), "unpacks to an unknown number of bytes"),
        ("zstd", bytes(16), "unpacks to an unknown number of bytes"),
        ("gzip", zlib.compress(bytes(1 << 20)), "unpacks to 241 bytes"),
        ("gzip", zlib.compress(bytes(239)), "unpacks to 239 bytes"),
        ("gzip", bytes(100_000), "is stored in 100,000 bytes"),
    ],
)
def test_a_chunk_that_unpacks_to_another_size_is_refused(tmp_path, compress, raw, sentence):
    path = tmp_path / "t.h5"
    draw_trace(1, 8, mixed=True).write(path, compress)
    with h5py.File(path, "r+") as file:
        file["experts"].id.write_direct_chunk((0, 0, 0), raw)
    with Trace.open(path) as trace, pytest.raises(MoetraceError, match=rf"t\.h5: chunk 0 of /experts {sentence}"):
        next(trace.blocks())


def test_chunks_that_people_choose_are_read(tmp_path):
    experts = draw_trace(1, 8, rows=40).read("experts", 0, 40)
    noise = np.random.default_rng(0).integers(0, 8, (40, 3, 1)).astype(np.uint8)
    for number, (ids, options) in enumerate(
        [
            (experts, {"compression": "gzip", "shuffle": True, "fletcher32": True, "chunks": (7, 2, 1)}),
            (experts, {"fletcher32": True, "chunks": (7, 3, 2)}),
            (experts, {"chunks": (7, 3, 2), "shuffle": True, **hdf5plugin.Zstd()}),
            (noise, {"compression": "gzip", "compression_opts": 1, "chunks": (1, 1, 1)}),  # grows: stored as it is
        ]
    ):
        with Trace.open(by_hand(tmp_path / f"{number}.h5", ids, 8, **options)) as trace:
            assert np.array_equal(trace.read("experts", 0, 40), ids)
            assert np.array_equal(trace.read("experts", 9, 20), ids[9:20])


def test_chunks_beyond_any_need_are_refused(tmp_path):
    def twice(properties) -> None:
        properties.set_deflate(1)
        properties.set_deflate(1)

    def after(properties) -> None:
        properties.set_deflate(1)
        properties.set_shuffle()

    for rows, chunk, change, sentence in (
        (1 << 21, 1, lambda _: None, "/experts has 2,097,152 chunks, but may have 1,048,576"),
        (1 << 26, (1 << 26) + 1, lambda _: None, "/experts has chunks of more than 64 MiB"),
        (40, 8, twice, "/experts is compressed more than once"),
        (40, 8, after, "/experts is shuffled after it was compressed"),
        (40, 8, lambda properties: properties.set_filter(32004), "/experts is compressed by filter 32004"),
    ):
        path = by_hand(tmp_path / "t.h5", np.zeros((1, 1, 1), np.uint8), 1)
        with h5py.File(path, "r+") as file:
            del file["experts"]
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_chunk((chunk, 1, 1))
            if change.__name__ != "<lambda>" or rows == 40:
                change(properties)
            space = h5py.h5s.create_simple((rows, 1, 1), (h5py.h5s.UNLIMITED, 1, 1))
            h5py.h5d.create(file.id, b"experts", h5py.h5t.NATIVE_UINT8, space, dcpl=properties)
        with pytest.raises(MoetraceError, match=sentence):
            Trace.open(path)


def test_counts_that_cannot_be_summed_are_refused_wherever_they_are(tmp_path):
    path = tmp_path / "c.h5"
    with CountsWriter(path, model="x", num_experts=8, top_k=2, layers=2, rows=3, steps=3, source={}) as writer:
        writer.append_counts(np.full((3, 2, 8), 2**62), np.ones(3, np.int64), np.full(3, 2, np.uint8))
    assert mt.lint(path)[0].code == "impossible-count"
    with Trace.open(path) as trace:
        for look in (
            lambda: mt.export(trace, tmp_path / "c.json"),
            lambda: mt.balance(trace),
            lambda: trace.write(tmp_path / "d.h5"),
            trace.verify,
        ):
            with pytest.raises(MoetraceError, match=r"c\.h5: /counts of step 0, layer entry 0, expert 0 is 4611686018"):
                look()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["c.h5"]
    with pytest.raises(MoetraceError, match="the counts sum to 4611686018427387905, but may sum to 46116860184273879"):
        schema.check_counts("x", 0, np.ones((1, 1, 1), np.int64), counted=2**62)
    with pytest.raises(MoetraceError, match="is 3, but must be 0 to the 2 rows of the step"):
        schema.check_counts("x", 0, np.full((1, 1, 1), 3), np.array([2]))


def test_a_plain_file_needs_no_other_process(file, tmp_path, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("another process was started")

    monkeypatch.setattr(hdf5, "attributes_apart", never)
    draw_trace(1, 8).write(tmp_path / "zstd.h5", "zstd")
    for path in (file, tmp_path / "zstd.h5"):
        with Trace.open(path) as trace:
            trace.verify()
    for name, sentence in (("cut.h5", "it is truncated"), ("text.h5", "it is not an HDF5 file")):
        (tmp_path / name).write_bytes(file.read_bytes()[:3000] if name == "cut.h5" else b"rows, steps\n" * 200)
        with pytest.raises(MoetraceError, match=f"is not a trace file: {sentence}"):
            Trace.open(tmp_path / name)


def test_features_that_the_writer_does_not_use_are_not_plain(file):
    def is_plain() -> bool:
        with file.open("rb") as raw:
            return plain.is_plain(raw, hdf5.PATHS)

    def change(what) -> bool:
        with h5py.File(file, "r+", libver=("v108", "v110")) as raw:
            what(raw)
        return is_plain()

    whole = file.read_bytes()
    assert is_plain()
    for what in (
        lambda raw: raw.attrs.create("note", "text of variable length"),
        lambda raw: [raw.attrs.create(f"n{i}", i) for i in range(20)],  # dense attributes
        lambda raw: [raw.create_group(f"rows/g{i}") for i in range(20)],  # dense links
        lambda raw: raw["experts"].attrs.create("unit", "id"),
        lambda raw: raw.__setitem__("gates2", h5py.SoftLink("/gates")),
        lambda raw: raw.__setitem__("layers/expert_bytes2", raw["rows"]) or raw.move("gates", "old"),
    ):
        file.write_bytes(whole)
        changed = change(what)
        assert not changed or what.__code__.co_names[0] == "__setitem__"  # a hard link is plain
        with Trace.open(file) as trace:
            assert trace.rows == 40 and trace.model == "some-model"
    file.write_bytes(whole[:8] + bytes([0]) + whole[9:])
    assert not is_plain()


def test_a_file_that_hdf5_does_not_survive_is_one_sentence(tmp_path, monkeypatch):
    path = by_hand(tmp_path / "t.h5", np.zeros((1, 1, 1), np.uint8), 1)
    with Trace.open(path) as trace:
        assert (trace.model, trace.created_by, trace.top_k) == ("x", "hand", 1)
    for program, sentence in (
        ("import os; os.abort()", "HDF5 ended with signal 6"),
        ("raise SystemExit(3)", "HDF5 ended with code 3"),
        ("print('no JSON')", "the process that looks at it failed"),
        ("while True: pass", r"HDF5 did not come to an end within 0\.2 s"),
    ):
        monkeypatch.setattr(own_process, "_PROGRAM", program)
        monkeypatch.setattr(own_process, "TIME_LIMIT_S", 0.2 if "while" in program else 10.0)
        with pytest.raises(MoetraceError, match=rf"t\.h5 can't be read as HDF5: {sentence}"):
            Trace.open(path)
