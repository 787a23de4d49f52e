"""Export: what another tool reads is what the trace holds, by independent slow readings of both."""

import json
import resource
import struct
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import as_arrays, traces

import moetrace as mt
from moetrace import exports
from moetrace.exports import blocks, oracle_general
from moetrace.importers.importing import import_traces
from moetrace.spec.errors import MoetraceError, UsageError

SHIPPED = Path(__file__).parents[2] / "traces"
CAPTURES = Path(__file__).parents[3] / "shared" / "traces"
captured = pytest.mark.skipif(not CAPTURES.exists(), reason="needs the captures beside the repository")
FILES = {"npz": "t.npz", "parquet": "t.parquet", "oracle-general": "t.oracleGeneral", "eplb": "t.json"}


@st.composite
def small_traces(draw) -> mt.Trace:
    """Any small trace, with or without what is optional; its first MoE layer is not the model's first."""
    trace, experts = draw(traces())
    given = as_arrays(trace, experts)
    rows, layers, k = given["experts"].shape
    rng = np.random.default_rng(draw(st.integers(0, 2**32), label="seed"))
    absent = np.iinfo(given["experts"].dtype).max
    optional = {
        "gates": rng.random((rows, layers, k)).astype(np.float16),
        "token": rng.integers(0, 2**31 - 1, rows),
        "recorded": np.where(given["experts"] == absent, 255, rng.integers(0, 3, (rows, layers, k))),
    }
    given |= {name: optional[name] for name in draw(st.sets(st.sampled_from(sorted(optional))), label="optional")}
    index = np.cumsum(rng.integers(1, 3, layers))
    return mt.Trace.from_arrays(num_experts=experts, model="m", layer_index=index, **given)


part_sizes = st.sampled_from([1, 7, 1 << 19])


def exported(trace, path: Path, part_choices: int = 1 << 19, **options) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks, oracle_general):
            patch.setattr(module, "PART_CHOICES", part_choices)
        mt.export(trace, path, **options)
    return path


def choices(trace: mt.Trace) -> list[dict]:
    """Each choice that was made, in the order of the trace, by plain loops."""
    ids, rows = trace.read("experts", 0, trace.rows), []
    absent = np.iinfo(ids.dtype).max
    names = {"request": "request", "position": "position", "gates": "gate", "token": "token", "recorded": "resident"}
    held = {name: trace.read(name, 0, trace.rows) for name in names if name in trace.has | {"request", "position"}}
    phase = np.concatenate([block.phase for block in trace.blocks()])
    for step in range(trace.steps):
        for row in range(int(trace.offset[step]), int(trace.offset[step + 1])):
            for layer, slot in np.ndindex(trace.layers, trace.top_k):
                if ids[row, layer, slot] == absent:
                    continue
                choice = {"step": step, "row": row, "phase": ["prefill", "decode"][phase[row]], "slot": slot}
                choice |= {"layer": int(trace.layer_index[layer]), "expert": int(ids[row, layer, slot])}
                for name, values in held.items():
                    choice[names[name]] = (values[row] if values.ndim == 1 else values[row, layer, slot]).item()
                rows.append(choice)
    return rows


@settings(max_examples=40, deadline=None)
@given(small_traces(), part_sizes)
def test_npz_comes_back_as_it_was(tmp_path_factory, trace, part_choices):
    folder = tmp_path_factory.mktemp("npz")
    exported(trace, folder / "t.npz", part_choices)
    import_traces([folder / "t.npz"], folder / "t.h5")
    with mt.Trace.open(folder / "t.h5") as back:
        back.verify()
        for name in ("experts", "position", *(trace.has - {"recorded", "row_phase"})):
            assert np.array_equal(back.read(name, 0, back.rows), trace.read(name, 0, trace.rows)), name
        assert np.array_equal(back.offset, trace.offset) and np.array_equal(back.phase, trace.phase), "the same steps"
        phases = [np.concatenate([block.phase for block in one.blocks()]) for one in (trace, back)]
        assert np.array_equal(*phases)
        renamed = set(zip(*(one.read("request", 0, trace.rows).tolist() for one in (trace, back)), strict=True))
        assert len(renamed) == len({old for old, _ in renamed}) == len({new for _, new in renamed})
        assert (back.num_experts, back.model) == (trace.num_experts, "m")
        assert np.array_equal(back.layer_index, trace.layer_index)


def test_npz_of_a_capture_is_the_capture_again(tmp_path):
    exported(SHIPPED / "tiny-olmoe.h5", tmp_path / "t.npz")
    import_traces([tmp_path / "t.npz"], tmp_path / "t.h5")
    with mt.Trace.open(SHIPPED / "tiny-olmoe.h5") as one, mt.Trace.open(tmp_path / "t.h5") as two:
        for name in ("experts", "request", "position", "gates", "token"):
            assert np.array_equal(one.read(name, 0, one.rows), two.read(name, 0, two.rows)), name
        assert np.array_equal(one.offset, two.offset) and np.array_equal(one.phase, two.phase)
        assert two.model == "tiny-olmoe" and two.source["licence"] == one.source["licence"]
    arrays = np.load(tmp_path / "t.npz")
    assert np.array_equal(arrays["step_rows"], np.diff(one.offset))
    assert json.loads(str(arrays["meta"]))["trace"] == one.source


@settings(max_examples=40, deadline=None)
@given(small_traces(), part_sizes)
def test_parquet_has_a_row_for_each_choice(tmp_path_factory, trace, part_choices):
    frame = pl.read_parquet(exported(trace, tmp_path_factory.mktemp("parquet") / "t.parquet", part_choices))
    expected = choices(trace)
    assert frame.sort("row", "layer", "slot", maintain_order=True).equals(frame), "in the order of the trace"
    assert frame.height == len(expected)
    optional = [name for name in ("gates", "token", "recorded") if name in trace.has]
    assert frame.width == 8 + len(optional)
    assert [{name: row[name] for name in frame.columns} for row in expected] == frame.to_dicts()


@settings(max_examples=40, deadline=None)
@given(small_traces())
def test_parquet_comes_back_without_rows_that_lack_choices(tmp_path_factory, trace):
    folder = tmp_path_factory.mktemp("parquet")
    exported(trace, folder / "t.parquet")
    ids = trace.read("experts", 0, trace.rows)
    made = ids != np.iinfo(ids.dtype).max
    kept = made.any(axis=(1, 2))
    if not kept.any():
        with pytest.raises(mt.MoetraceError, match="holds no choice"):
            import_traces([folder / "t.parquet"], folder / "t.h5")
        return
    import_traces([folder / "t.parquet"], folder / "t.h5")
    with mt.Trace.open(folder / "t.h5") as back:
        back.verify()
        assert np.array_equal(back.read("experts", 0, back.rows), ids[kept])
        for name in ("position", *(trace.has & {"token", "gates", "recorded"})):
            one, two = trace.read(name, 0, trace.rows)[kept], back.read(name, 0, back.rows)
            assert np.array_equal(one[made[kept]], two[made[kept]]) if one.ndim == 3 else np.array_equal(one, two), name
        step = np.repeat(np.arange(trace.steps), np.diff(trace.offset))[kept]
        assert np.diff(back.offset).tolist() == np.unique(step, return_counts=True)[1].tolist(), "the same steps"
        phases = [np.concatenate([block.phase for block in one.blocks()]) for one in (trace, back)]
        assert np.array_equal(phases[0][kept], phases[1])
        assert (back.num_experts, back.top_k, back.model) == (trace.num_experts, trace.top_k, "m")
        assert np.array_equal(back.layer_index, trace.layer_index), "layers without choices too"


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.glob("*.h5")))
def test_parquet_of_a_trace_is_the_trace_again_without_options(tmp_path, name):
    mt.export(SHIPPED / name, tmp_path / "t.parquet")
    import_traces([tmp_path / "t.parquet"], tmp_path / "t.h5")
    with mt.Trace.open(SHIPPED / name) as one, mt.Trace.open(tmp_path / "t.h5") as two:
        assert one.has == two.has
        for column in ("experts", "request", "position", *one.has):
            assert np.array_equal(one.read(column, 0, one.rows), two.read(column, 0, two.rows)), column
        assert np.array_equal(one.offset, two.offset) and np.array_equal(one.phase, two.phase)
        assert (one.model, one.num_experts, one.top_k) == (two.model, two.num_experts, two.top_k)
        assert two.source.get("licence") == one.source.get("licence")


def test_parquet_keeps_what_layers_and_experts_are_like(tmp_path):
    ids = np.array([[[0, 1], [1, 0]], [[2, 0], [1, 255]]], np.uint8)
    for sizes in (np.array([7, 9]), np.arange(8).reshape(2, 4) + 1):
        trace = mt.Trace.from_arrays(num_experts=4, experts=ids, layer_index=np.array([3, 5]), expert_bytes=sizes)
        mt.export(trace, tmp_path / "t.parquet")
        import_traces([tmp_path / "t.parquet"], tmp_path / "t.h5")
        with mt.Trace.open(tmp_path / "t.h5") as back:
            assert np.array_equal(back.expert_bytes, sizes) and back.layer_index.tolist() == [3, 5]
            assert np.array_equal(back.read("experts", 0, 2), ids)


@pytest.mark.parametrize(
    ("footer", "message"),
    [
        ("{}", "damaged: Object missing"),
        ('{"num_experts":0,"top_k":2,"layer_index":[0]}', "damaged: Expected"),
        ('{"num_experts":32,"top_k":4,"layer_index":[]}', "do not fit together"),
        ('{"num_experts":32,"top_k":4,"layer_index":[1,1]}', "do not fit together"),
        ('{"num_experts":32,"top_k":4,"layer_index":[0,1,2,3,4,5],"expert_bytes":[1,2]}', "do not fit together"),
        ('{"num_experts":32,"top_k":4,"layer_index":[0,1,2,3,4,5],"expert_bytes":[[1]]}', "damaged: Expected `int`"),
        ('{"num_experts":32,"top_k":4,"layer_index":[0,1]}', "its footer does not know"),
        ('{"num_experts":32,"top_k":3,"layer_index":[0,1,2,3,4,5]}', "its footer does not know"),
        ('{"num_experts":9,"top_k":4,"layer_index":[0,1,2,3,4,5]}', "is not 0 to 8"),
    ],
)
def test_a_footer_that_does_not_fit_the_rows_is_one_sentence(tmp_path, footer, message):
    mt.export(SHIPPED / "tiny-olmoe.h5", tmp_path / "t.parquet")
    frame = pl.read_parquet(tmp_path / "t.parquet").head(5000)
    frame.write_parquet(tmp_path / "u.parquet", metadata={"moetrace": footer})
    with pytest.raises(mt.MoetraceError, match=message):
        import_traces([tmp_path / "u.parquet"], tmp_path / "t.h5")
    assert not (tmp_path / "t.h5").exists()
    frame.write_parquet(tmp_path / "u.parquet", metadata={"pandas": "{}"})
    with pytest.raises(mt.UsageError, match="--experts"):
        import_traces([tmp_path / "u.parquet"], tmp_path / "t.h5")


def oracle_records(trace: mt.Trace) -> bytes:
    """The records by plain loops, in the order that docs/export.md gives."""
    ids = trace.read("experts", 0, trace.rows)
    accesses = []
    for step in range(trace.steps):
        for layer in range(trace.layers):
            for row in range(int(trace.offset[step]), int(trace.offset[step + 1])):
                for expert in ids[row, layer].tolist():
                    if expert != np.iinfo(ids.dtype).max:
                        accesses.append((step, layer, expert))
    records, following = [], {}
    for number in range(len(accesses), 0, -1):
        step, layer, expert = accesses[number - 1]
        sizes = trace.expert_bytes
        size = 1 if sizes is None else int(sizes[layer] if sizes.ndim == 1 else sizes[layer, expert])
        thing = layer * trace.num_experts + expert
        records.append(struct.pack("<IQIq", step, thing, size, following.get(thing, -1)))
        following[thing] = number
    return b"".join(reversed(records))


@settings(max_examples=60, deadline=None)
@given(small_traces(), part_sizes)
def test_oracle_general_by_plain_loops(tmp_path_factory, trace, part_choices):
    path = exported(trace, tmp_path_factory.mktemp("oracle") / "t.bin", part_choices)
    assert path.read_bytes() == oracle_records(trace)


def test_oracle_general_of_more_objects_than_16_bits(tmp_path):
    rng = np.random.default_rng(0)
    trace = mt.Trace.from_arrays(rng.integers(0, 20000, (50, 4, 1)) // 999 * 999, num_experts=20000)
    assert exported(trace, tmp_path / "t.bin").read_bytes() == oracle_records(trace)


@pytest.mark.parametrize("name", ["mixtral-8x7b-b16", "tiny-olmoe"])
def test_libcachesim_hits_as_a_plain_lru_does(tmp_path, name):
    lib = pytest.importorskip("libcachesim")
    path = exported(SHIPPED / f"{name}.h5", tmp_path / "t.oracleGeneral")
    reader = lib.TraceReader(str(path), lib.TraceType.ORACLE_GENERAL_TRACE, lib.ReaderInitParam(ignore_obj_size=True))
    missed, _ = lib.LRU(32).process_trace(reader)
    objects = np.frombuffer(path.read_bytes(), oracle_general.RECORD)["obj_id"].tolist()
    cache: dict[int, None] = {}
    misses = 0
    for thing in objects:
        misses += thing not in cache
        cache.pop(thing, None)
        cache[thing] = None
        if len(cache) > 32:
            del cache[next(iter(cache))]
    assert missed == pytest.approx(misses / len(objects), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(small_traces(), part_sizes)
def test_eplb_counts_every_choice(tmp_path_factory, trace, part_choices):
    path = exported(trace, tmp_path_factory.mktemp("eplb") / "t.json", part_choices)
    counts = json.loads(path.read_text())["logical_count"]
    assert len(counts) == trace.layer_index[-1] + 1 and {len(row) for row in counts} == {trace.num_experts}
    expected = np.zeros((len(counts), trace.num_experts), int)
    for choice in choices(trace):
        expected[choice["layer"], choice["expert"]] += 1
    assert counts == expected.tolist()


def test_eplb_conserves_rows_times_k(tmp_path):
    counts = json.loads(exported(SHIPPED / "tiny-olmoe.h5", tmp_path / "t.json").read_text())["logical_count"]
    assert np.shape(counts) == (6, 32) and [sum(row) for row in counts] == [16414 * 4] * 6


def with_counts(path: Path, counts: np.ndarray) -> Path:
    """A trace file of three steps and two layers that holds just counts."""
    h5py = pytest.importorskip("h5py")
    ids = np.zeros((3, 2, 1), np.uint8)
    mt.Trace.from_arrays(ids, num_experts=4, layer_index=np.array([1, 3])).write(path)
    with h5py.File(path, "r+") as raw:
        del raw["/experts"], raw["/rows"]
        raw["/counts"] = counts
    return path


def test_a_trace_of_counts_is_only_good_for_eplb(tmp_path):
    counts = np.arange(24).reshape(3, 2, 4)
    source = with_counts(tmp_path / "t.h5", counts)
    made = json.loads(exported(source, tmp_path / "t.json", 1).read_text())["logical_count"]
    assert made == [[0] * 4, counts[:, 0].sum(0).tolist(), [0] * 4, counts[:, 1].sum(0).tolist()]
    for name in ("t.npz", "t.parquet", "t.bin"):
        with pytest.raises(MoetraceError, match="holds only counts of ids"):
            mt.export(source, tmp_path / name)
    with pytest.raises(MoetraceError, match=r"/counts of step 0, layer entry 0, expert 0 is -1, but must be 0 to"):
        mt.export(with_counts(tmp_path / "n.h5", counts - 1), tmp_path / "n.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n.h5", "t.h5", "t.json"]


@pytest.mark.parametrize("form", FILES)
def test_bytes_do_not_depend_on_parts_and_storage(tmp_path, form):
    with mt.Trace.open(SHIPPED / "tiny-olmoe.h5") as trace:
        trace.write(tmp_path / "z.h5", compress="zstd")
        one = exported(trace, tmp_path / f"one{FILES[form]}").read_bytes()
    two = exported(tmp_path / "z.h5", tmp_path / "two", 4321, to=form).read_bytes()
    assert one == two and b"z.h5" not in two and str(tmp_path).encode() not in two


@pytest.mark.parametrize("form", FILES)
def test_an_impossible_id_is_one_sentence_and_leaves_the_old_file(tmp_path, form):
    ids = np.zeros((9, 2, 1), np.uint8)
    ids[7, 1] = 8
    trace = mt.Trace.from_arrays(ids, num_experts=8)
    (tmp_path / FILES[form]).write_text("old")
    with pytest.raises(MoetraceError, match="row 7, layer entry 1 holds the id 8, but the model has 8 experts"):
        exported(trace, tmp_path / FILES[form], 1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("form", FILES)
def test_an_interrupt_leaves_nothing(tmp_path, form):
    def interrupt(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mt.export(SHIPPED / "tiny-olmoe.h5", tmp_path / FILES[form], progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FILES)
def test_a_full_disk_is_one_sentence(tmp_path, form):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        with pytest.raises(MoetraceError, match=r"t\.\w+ could not be written: File too large; nothing was changed"):
            mt.export(SHIPPED / "tiny-olmoe.h5", tmp_path / FILES[form])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_output_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "t.npz").mkdir()
    for path in (tmp_path / "none" / "t.npz", tmp_path / "t.npz"):
        with pytest.raises(MoetraceError, match=r"t\.npz could not be written: .+; nothing was changed"):
            mt.export(SHIPPED / "tiny-olmoe.h5", path)


def test_formats_are_known_by_their_ending():
    for form, (endings, _) in exports.FORMATS.items():
        assert all(exports._format(Path(f"x{ending.upper()}"), None) == form for ending in endings)
        assert exports._format(Path("x.json"), form) == form
    with pytest.raises(UsageError, match=r"x\.csv does not say its format by its ending \(\.npz, "):
        exports._format(Path("x.csv"), None)
    with pytest.raises(UsageError, match="there is no format 'csv' to export to"):
        exports._format(Path("x.npz"), "csv")


def test_a_trace_is_not_replaced_by_its_export(tmp_path):
    mt.Trace.from_arrays(np.zeros((1, 1, 1), np.uint8), num_experts=2).write(tmp_path / "t.json")
    with pytest.raises(UsageError, match=r"t\.json is also an input"):
        mt.export(tmp_path / "t.json", tmp_path / "t.json")


@captured
def test_a_route_trace_keeps_its_choices_sizes_and_residency(tmp_path):
    source = CAPTURES / "qwen3-30b_bigmoeonedge.route.csv"
    lines = pl.read_csv(source, comment_prefix="#").sort("turn", "phase", "step", "layer", "slot")
    import_traces([source], tmp_path / "t.h5")
    frame = pl.read_parquet(exported(tmp_path / "t.h5", tmp_path / "t.parquet"))
    for column, name in (("layer", "layer"), ("slot", "slot"), ("expert", "expert"), ("resident", "residency")):
        assert frame[column].to_list() == lines[name].to_list(), column
    assert (frame["gate"] - lines["weight"]).abs().max() < 1e-3
    records = np.fromfile(exported(tmp_path / "t.h5", tmp_path / "t.bin"), oracle_general.RECORD)
    with mt.Trace.open(tmp_path / "t.h5") as trace:
        assert len(records) == lines.height
        assert np.array_equal(records["obj_size"], trace.expert_bytes[records["obj_id"] // 128])


def test_more_experts_than_any_model_has_are_refused(tmp_path):
    wide = mt.Trace.from_arrays(np.zeros((1, 1, 1), int), num_experts=60000, layer_index=np.array([60000]))
    with pytest.raises(MoetraceError, match="60001 layers of 60000 experts are more than this format is made for"):
        mt.export(wide, tmp_path / "t.json")
    large = mt.Trace.from_arrays(np.zeros((1, 1, 1), np.uint8), num_experts=2, expert_bytes=np.array([1 << 32]))
    with pytest.raises(MoetraceError, match="sizes below 4 GiB"):
        mt.export(large, tmp_path / "t.bin")
    assert list(tmp_path.iterdir()) == []
