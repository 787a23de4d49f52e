"""Import: what the source recorded is what the trace holds, cut into steps; a bad source is one sentence."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moetrace as mt
from moetrace.importers.formats import detect
from moetrace.importers.importing import import_traces
from moetrace.lints.leave_out import import_and_leave_out
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace

SHIPPED = Path(__file__).parents[2] / "traces"
CAPTURES = Path(__file__).parents[3] / "shared" / "traces"
captured = pytest.mark.skipif(not CAPTURES.exists(), reason="needs the captures beside the repository")


def arrays(requests, phases, num_experts=8, layers=3, top_k=2, **changes) -> dict[str, np.ndarray]:
    """The arrays of an npz capture whose rows have these requests and phases."""
    rng = np.random.default_rng(len(requests))
    rows = len(requests)
    return {
        "expert_ids": np.argsort(rng.random((rows, layers, num_experts)), -1)[..., :top_k].astype(np.uint8),
        "request_id": np.array(requests),
        "position": np.arange(rows),
        "phase": np.array(phases),
        "layer_index": np.arange(1, layers + 1),
        "meta": np.array(json.dumps({"model": "x/Some-Model", "num_experts": num_experts, "licence": "MIT", "n": [1]})),
    } | changes


def save(path: Path, **changes) -> Path:
    np.savez_compressed(path, **arrays([5, 5, 5, 2, 2], [0, 0, 1, 0, 1], **changes))
    return path


def imported(tmp_path: Path, *sources: Path, **options) -> Trace:
    import_traces(sources, tmp_path / "out.h5", **options)
    trace = Trace.open(tmp_path / "out.h5")
    trace.verify()
    return trace


def steps(trace: Trace) -> list[tuple[int, int]]:
    """(rows, phase) of each step."""
    return list(zip(np.diff(trace.offset).tolist(), trace.phase.tolist(), strict=True))


def test_npz_arrays_come_out_as_they_went_in(tmp_path):
    source = save(tmp_path / "a.npz", gate_weights=np.full((5, 3, 2), 0.5, np.float32), token_id=np.arange(5))
    trace, given = imported(tmp_path, source), np.load(source)
    assert np.array_equal(trace.read("experts", 0, 5), given["expert_ids"])
    assert np.array_equal(trace.read("gates", 0, 5), given["gate_weights"])
    assert np.array_equal(trace.read("token", 0, 5), given["token_id"])
    assert trace.layer_index.tolist() == [1, 2, 3] and trace.model == "x/Some-Model" and trace.num_experts == 8
    assert trace.read("request", 0, 5).tolist() == [0, 0, 0, 1, 1], "numbered in order of appearance"
    assert steps(trace) == [(2, 0), (1, 1), (1, 0), (1, 1)]


def test_source_says_where_it_is_from_but_no_path(tmp_path):
    source = imported(tmp_path, save(tmp_path / "a.npz")).source
    assert source["licence"] == "MIT" and source["format"] == "npz" and len(source["sha256"]) == 64
    assert str(tmp_path) not in json.dumps(source) and "n" not in source


@pytest.mark.parametrize(
    ("request_ids", "phase", "expected"),
    [
        ([0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [(3, 0), (2, 0)]),
        ([0, 1, 0, 1], [1, 1, 1, 1], [(1, 1)] * 4),
        ([0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [(2, 0), (1, 1), (2, 0)]),
        ([0, 1, 0], [0, 0, 0], [(1, 0)] * 3),
        ([0, 0, 0, 0], [0, 1, 0, 0], [(1, 0), (1, 1), (2, 0)]),
    ],
)
def test_prefill_runs_are_steps_and_decode_rows_too(tmp_path, request_ids, phase, expected):
    np.savez(tmp_path / "a.npz", **arrays(request_ids, phase))
    assert steps(imported(tmp_path, tmp_path / "a.npz")) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [(0, [(1, 1)] * 5), (2, [(2, 0), (1, 1), (2, 0)]), (9, [(3, 0), (2, 0)])],
)
def test_as_decode_makes_decode_steps_after_the_prompt(tmp_path, prompt, expected):
    trace = imported(tmp_path, save(tmp_path / "a.npz"), decode_after=prompt)
    assert steps(trace) == expected and trace.source["decode_after"] == prompt


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=40), st.integers(0, 5))
def test_steps_by_the_words_of_the_rule(tmp_path_factory, rows, prompt):
    folder = tmp_path_factory.mktemp("steps")
    requests, phases = zip(*rows, strict=True)
    np.savez(folder / "a.npz", **arrays(requests, phases))
    for decode_after in (None, prompt):
        expected, before, seen = [], None, dict.fromkeys(requests, 0)
        for request, phase in rows:
            phase = phase if decode_after is None else int(seen[request] >= decode_after)
            seen[request] += 1
            if phase == 0 and before == (request, 0):
                expected[-1] = (expected[-1][0] + 1, 0)
            else:
                expected.append((1, phase))
            before = (request, phase)
        assert steps(imported(folder, folder / "a.npz", decode_after=decode_after)) == expected


def test_steps_that_an_archive_knows_are_kept(tmp_path):
    trace = imported(tmp_path, save(tmp_path / "a.npz", step_rows=np.array([2, 2, 1], np.uint8)))
    assert steps(trace) == [(2, 0), (2, 2), (1, 1)]


def test_parts_of_a_long_source_join(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrace.importers.npz.BLOCK_BYTES", 40)
    np.savez(tmp_path / "a.npz", **arrays([0] * 50 + [1] * 3, [0] * 30 + [1] * 20 + [0] * 3))
    trace = imported(tmp_path, tmp_path / "a.npz")
    assert np.array_equal(trace.read("experts", 0, 53), np.load(tmp_path / "a.npz")["expert_ids"])
    assert steps(trace) == [(30, 0)] + [(1, 1)] * 20 + [(3, 0)]


def test_several_sources_follow_one_another(tmp_path):
    one, two = save(tmp_path / "1.npz"), save(tmp_path / "2.npz")
    trace = imported(tmp_path, one, two)
    assert trace.rows == 10 and trace.read("request", 0, 10).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert [set(file) for file in trace.source.get("files", [])] == [set(), set()], "equal files share all they say"
    with pytest.raises(MoetraceError, match=r"3\.npz and .*1\.npz differ in layer_index"):
        imported(tmp_path, one, save(tmp_path / "3.npz", layer_index=np.array([4, 5, 6])))


@pytest.mark.parametrize(("dtype", "mark"), [(np.uint8, 255), (np.int64, -1), (np.uint16, 65535)])
def test_absent_ids_of_any_dtype(tmp_path, dtype, mark):
    ids = np.zeros((5, 3, 2), dtype) + np.arange(2, dtype=dtype)
    ids[3, 1] = mark
    trace = imported(tmp_path, save(tmp_path / "a.npz", expert_ids=ids))
    experts = trace.read("experts", 0, 5)
    assert experts.dtype == np.uint8 and np.array_equal(experts == 255, ids == mark)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("expert_ids", np.full((5, 3, 2), 8), "expert_ids of row 0, layer entry 0 holds 8, but there are 8 experts"),
        ("expert_ids", np.zeros((5, 3, 2), int), "row 0, layer entry 0 chooses expert 0 more than once"),
        ("expert_ids", np.zeros((5, 3)), r"expert_ids is float64 \(5, 3\)"),
        ("expert_ids", np.asfortranarray(np.zeros((5, 3, 2), int)), "Fortran order"),
        ("request_id", np.zeros(4, int), r"request_id.npy is int64 \(4,\), not integers \(5,\)"),
        ("phase", np.full(5, 2), "phase of row 0 is 2, but must be 0 or 1"),
        ("position", np.full(5, -1), "position of row 0 is negative"),
        ("position", np.full(5, 1 << 33), "position holds numbers from"),
        ("layer_index", np.array([2, 1, 3]), "/layers/index must increase"),
        ("layer_index", np.arange(2), "layer_index has shape"),
        ("gate_weights", np.zeros((5, 3)), "gate_weights has shape"),
        ("gate_weights", np.zeros((5, 3, 2), bool), "gate_weights holds bool, but must hold float16"),
        ("gate_weights", np.full((5, 3, 2), [np.nan, 1e6]), r"a\.npz: gates holds numbers from 1000000\.0"),
        ("layer_index", np.arange(3.0), r"a\.npz: layer_index holds float64, but must hold uint16"),
        ("layer_index", np.arange(-1, 2), r"a\.npz: layer_index holds numbers from -1 to 1"),
        ("step_rows", np.array([2, 0, 3]), "step_rows does not cut the 5 rows into steps of one row or more"),
        ("step_rows", np.array([2, 2]), "step_rows does not cut the 5 rows"),
        ("step_rows", np.array([-(2**63), 5, -(2**63)]), "step_rows does not cut the 5 rows"),
        ("step_rows", np.zeros(0, int), "step_rows does not cut the 5 rows"),
        ("step_rows", np.ones((5, 1), int), r"step_rows.npy is int64 \(5, 1\), not integers \(5,\)"),
        ("meta", np.array("{"), "meta is not JSON"),
        ("meta", np.array('{"num_experts": 8, "model": ' + "[" * 900 + "]" * 900 + "}"), "meta is nested deeper than"),
        ("meta", np.array("[1]"), "meta is not a JSON object"),
        ("meta", np.array("{}"), "meta does not say num_experts"),
        ("meta", np.array('{"num_experts": 8, "top_k": 3}'), "meta says top_k 3, but expert_ids has 2"),
        ("meta", np.array('{"num_experts": 256}'), "expert_ids needs uint16"),
        ("meta", np.array({"a": 1}, dtype=object), "Python objects"),
        ("meta", np.zeros(3), "not a text"),
    ],
)
def test_a_bad_npz_is_one_sentence_and_writes_nothing(tmp_path, name, value, sentence):
    source = save(tmp_path / "a.npz", **{name: value})
    with pytest.raises(MoetraceError, match=sentence) as raised:
        imported(tmp_path, source)
    assert list(tmp_path.iterdir()) == [source]
    assert str(raised.value).endswith(".")


def test_a_broken_archive_is_one_sentence(tmp_path):
    source = save(tmp_path / "a.npz")
    whole = source.read_bytes()
    for data, sentence in (
        (whole[:100], "not a zip file"),
        (whole[:300] + b"xxxx" + whole[304:], "npz archive|has no"),
    ):
        source.write_bytes(data)
        with pytest.raises(MoetraceError, match=sentence):
            imported(tmp_path, source)
    np.savez(source, **{k: v for k, v in arrays([0], [0]).items() if k != "phase"})
    with pytest.raises(MoetraceError, match="has no array 'phase'"):
        imported(tmp_path, source)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i4', 'fortran_order': False, 'shape': ((((",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (5L,), }x",
        "{'descr': [()], 'fortran_order': False, 'shape': (5,)}",
        "{'descr': '<U99999999999', 'fortran_order': False, 'shape': (5,)}",
        "{'descr': [('a', '<i4', -1)], 'fortran_order': False, 'shape': (5,)}",
        "{[]: 1}",
        "{1: 1, 'a': 1}",
        "-" * 9000,
        "('\\d'",
        "\0",
    ],
)
def test_a_header_that_makes_no_sense_is_one_sentence(tmp_path, header):
    source = save(tmp_path / "a.npz")
    with zipfile.ZipFile(source, "a") as archive:
        data = header.encode()
        archive.writestr("token_id.npy", b"\x93NUMPY\1\0" + len(data).to_bytes(2, "little") + data)
    with pytest.raises(MoetraceError, match=r"a\.npz: token_id\.npy has a header that NumPy can't read\."):
        imported(tmp_path, source)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_methods_of_compression_are_refused(tmp_path, method):
    with (
        zipfile.ZipFile(save(tmp_path / "a.npz")) as given,
        zipfile.ZipFile(tmp_path / "b.npz", "w", method) as archive,
    ):
        for name in given.namelist():
            archive.writestr(name, given.read(name))
    with pytest.raises(MoetraceError, match=r"expert_ids\.npy is encrypted, or compressed by another method than"):
        imported(tmp_path, tmp_path / "b.npz")


def test_an_encrypted_archive_is_refused(tmp_path):
    source = save(tmp_path / "a.npz")
    data = bytearray(source.read_bytes())
    place = data.index(b"PK\1\2")
    data[place + 8] |= 1  # general purpose flags of the first entry of the directory
    source.write_bytes(data)
    with pytest.raises(MoetraceError, match=r"expert_ids\.npy is encrypted"):
        imported(tmp_path, source)


def test_damage_anywhere_in_an_archive_is_one_sentence(tmp_path):
    source, rng = save(tmp_path / "a.npz", gate_weights=np.ones((5, 3, 2))), np.random.default_rng(0)
    whole, refused = source.read_bytes(), 0
    for _ in range(300):
        data = bytearray(whole)
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
        source.write_bytes(data)
        try:
            imported(tmp_path, source)
        except MoetraceError as error:
            assert str(source) in str(error)
            refused += 1
    assert refused > 50


def test_a_surrogate_in_meta_does_not_keep_a_trace_from_being_written(tmp_path):
    meta = r'{"num_experts": 8, "model": "x\ud800", "licence": "\udfff"}'
    trace = imported(tmp_path, save(tmp_path / "a.npz", meta=np.array(meta)))
    assert trace.model == "x?" and trace.source["licence"] == "?"


def test_a_header_that_lies_about_its_size_is_refused_before_reading(tmp_path):
    source = save(tmp_path / "a.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr("token_id.npy", header.getvalue() + bytes(40))
    with pytest.raises(MoetraceError, match=r"token_id\.npy says it has shape"):
        imported(tmp_path, source)


def test_an_archive_that_unpacks_to_very_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrace.importers.npz.ROW_ARRAY_BYTES", 39)
    monkeypatch.setattr("moetrace.importers.npz._load.__defaults__", (39,))
    with pytest.raises(MoetraceError, match=r"request_id\.npy would take 40 bytes; at most 39"):
        imported(tmp_path, save(tmp_path / "a.npz"))


HEADER = """\
# route_trace v1
# model=C:/models of mine/Some-MoE-3B-IQ4_XS.gguf arch=some n_layer=4 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=0 dense_bytes=7
# layer=1 expert_bytes=100 dense_bytes=7
# layer=3 expert_bytes=120 dense_bytes=7
"""
COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
# A prefill of two tokens whose last layer routes only the second, then two decode tokens; a second turn of one token.
LINES = """\
0,0,0,1,0,5,0.75,0,100
0,0,0,1,1,2,0.25,0,100
0,0,1,1,0,2,0.5,0,0
0,0,1,1,1,7,0.5,1,0
0,0,1,3,0,4,0.5,0,120
0,0,1,3,1,3,0.5,2,0
0,1,2,1,0,1,0.5,1,0
0,1,2,1,1,0,0.5,1,0
0,1,2,3,0,6,0.5,1,0
0,1,3,1,0,1,0.5,1,0
0,1,3,1,1,0,0.5,1,0
0,1,3,3,0,6,0.5,1,0
0,1,3,3,1,1,0.5,1,0
1,1,0,3,0,6,0.5,1,0
1,1,0,3,1,1,0.5,1,0
"""


def route_trace(tmp_path: Path, text: str = HEADER + COLUMNS + LINES) -> Path:
    path = tmp_path / "route.csv"
    path.write_text(text)
    return path


def test_a_route_trace_becomes_rows_of_tokens(tmp_path):
    trace = imported(tmp_path, route_trace(tmp_path))
    assert steps(trace) == [(2, 0), (1, 1), (1, 1), (1, 1)]
    none = [255, 255]
    assert trace.read("experts", 0, 5).tolist() == [
        [[5, 2], none],
        [[2, 7], [4, 3]],
        [[1, 0], [6, 255]],
        [[1, 0], [6, 1]],
        [none, [6, 1]],
    ]
    assert trace.read("recorded", 0, 2).tolist() == [[[0, 0], none], [[0, 1], [0, 2]]]
    assert trace.read("gates", 0, 1).tolist() == [[[0.75, 0.25], [0, 0]]]
    assert trace.read("request", 0, 5).tolist() == [0, 0, 0, 0, 1]
    assert trace.read("position", 0, 5).tolist() == [0, 1, 2, 3, 0]
    assert trace.layer_index.tolist() == [1, 3] and trace.expert_bytes.tolist() == [100, 120]
    assert trace.model == "Some-MoE-3B-IQ4_XS.gguf" and trace.source["quantization"] == "IQ4_XS"
    assert trace.source["arch"] == "some" and "mine" not in json.dumps(trace.source)


def test_columns_go_by_name_and_dropped_choices_are_counted(tmp_path):
    def turned(line: str, more: str) -> str:
        return ",".join([more, *reversed(line.split(","))]) + "\n"

    lines = turned(COLUMNS.strip(), "dropped") + "".join(turned(line, "1") for line in LINES.splitlines())
    trace = imported(tmp_path, route_trace(tmp_path, HEADER + lines))
    assert trace.read("experts", 1, 2).tolist() == [[[2, 7], [4, 3]]] and trace.source["dropped"] == 15


def test_unknown_weights_leave_no_gates(tmp_path):
    lines = "".join(",".join([*line.split(",")[:6], "nan", "0", "0"]) + "\n" for line in LINES.splitlines())
    assert imported(tmp_path, route_trace(tmp_path, HEADER + COLUMNS + lines)).has == {"recorded"}


def test_a_header_may_hold_quotes_and_the_lines_of_another_system(tmp_path):
    text = (HEADER.replace("of mine", 'of "mine') + COLUMNS + LINES).replace("\n", "\r\n")
    path = tmp_path / "route.csv"
    path.write_bytes(text.encode())
    trace = imported(tmp_path, path)
    assert trace.rows == 5 and trace.expert_bytes.tolist() == [100, 120] and trace.model == "Some-MoE-3B-IQ4_XS.gguf"


def test_layers_of_a_route_trace_without_layer_lines(tmp_path):
    trace = imported(tmp_path, route_trace(tmp_path, "\n".join(HEADER.splitlines()[:2]) + "\n" + COLUMNS + LINES))
    assert trace.layer_index.tolist() == [1, 3] and trace.expert_bytes is None


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("# model", "# mod", "has no line '# model="),
        ("n_expert=8", "n_expert=7", "line 10: expert is not 0 to 6"),
        ("n_expert_used=2", "n_expert_used=1", "line 8: slot is not 0 to 0"),
        ("n_expert_used=2", "n_expert_used=9", "top_k is 9"),
        ("n_expert=8 n_expert_used=2", "n_expert=60000 n_expert_used=60000", "15 lines are too few"),
        ("layer=1 expert", f"layer={2**70} expert", r"route\.csv has a line '# layer=1180591620717411303424 expert"),
        ("expert_bytes=100 dense", f"expert_bytes={2**63} dense", r"route\.csv has a line '# layer=1 expert_bytes=92"),
        ("0,0,1,1,0,2,0.5", "0,0,1,1,0,2,1e30", "line 9: weight is beyond 65504"),
        ("0,0,1,1,0,2,0.5", "0,0,1,1,0,2,-inf", "line 9: weight is beyond 65504"),
        ("0,0,1,1,0,2,0.5", '0,0,1,1,0,2,"0.5\n"', "can't be read as CSV"),
        ("slot,", "sloth,", "has no column 'slot' in line 6"),
        ("0,0,1,1,0,2,", "0,0,1,1,0,x,", "can't be read as CSV"),
        ("0,0,1,1,0,2,", "0,0,1,1,1,2,", "line 9: another line has the same turn"),
        ("0,0,1,1,1,7,", "0,0,1,1,1,2,", "line 9: its token chooses this expert of this layer more than once"),
        ("0,0,1,1,0,2,", "0,2,1,1,0,2,", "line 9: phase is not 0 or 1"),
        ("0,0,1,1,0,2,", "0,0,-1,1,0,2,", "line 9: step is negative"),
        ("0,0,1,1,0,2,", "0,0,1,0,0,2,", "line 9: layer is not one of"),
        ("0,0,1,1,0,2,", "-1,0,1,1,0,2,", "line 9: turn is negative"),
        ("0,0,1,1,0,2,0.5,0,0", "0,0,1,1,0,2,0.5,7,0", "line 9: residency is not 0, 1 or 2"),
        ("0,0,1,1,0,2,0.5,0,0", "0,0,1,1,0", "line 9 is incomplete"),
        (LINES, "", "has no lines of routing"),
        (COLUMNS + LINES, "", "no data|has no column|has no lines|CSV"),
    ],
)
def test_a_bad_route_trace_is_one_sentence_and_writes_nothing(tmp_path, old, new, sentence):
    source = route_trace(tmp_path, (HEADER + COLUMNS + LINES).replace(old, new, 1))
    with pytest.raises(MoetraceError, match=sentence) as raised:
        imported(tmp_path, source)
    assert list(tmp_path.iterdir()) == [source]
    assert "\n" not in str(raised.value)


def test_formats_are_seen_from_content(tmp_path):
    odd = save(tmp_path / "a.npz").rename(tmp_path / "odd.csv")
    assert detect(odd) == "npz" and detect(route_trace(tmp_path)) == "bigmoeonedge"
    with pytest.raises(MoetraceError, match=r"README.md is in no format that can be imported \(sglang, npz, bigm"):
        detect(SHIPPED / "README.md")
    (tmp_path / "none.csv").touch()
    with pytest.raises(MoetraceError, match=r"none.csv is empty"):
        detect(tmp_path / "none.csv")
    with pytest.raises(MoetraceError, match="is an HDF5 file: if it is a trace already"):
        detect(SHIPPED / "tiny-olmoe.h5")
    with pytest.raises(MoetraceError, match="does not begin with '# route_trace v1'"):
        imported(tmp_path, odd, format="bigmoeonedge")
    with pytest.raises(UsageError, match="no format 'ollama'"):
        imported(tmp_path, odd, format="ollama")
    with pytest.raises(MoetraceError, match="there is no file"):
        imported(tmp_path, tmp_path / "none.npz")


def test_sources_are_paths_of_any_kind_one_or_several(tmp_path):
    source, out = save(tmp_path / "a.npz"), tmp_path / "t.h5"
    for sources in (source, str(source), [str(source)], tmp_path):
        assert mt.import_traces(sources, str(out), hints=mt.Hints(num_experts=8)) == [source]
        out.unlink()


def test_a_folder_of_several_formats_is_refused_until_one_is_named(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    save(folder / "z.npz")
    (folder / "notes.md").write_text("of a run\n")
    (folder / "empty.csv").touch()
    assert imported(tmp_path, folder).source["format"] == "npz", "what is of no format is passed over"
    route_trace(folder)
    with pytest.raises(UsageError, match=r"run holds files of bigmoeonedge and npz \(z.npz\): give --from"):
        imported(tmp_path, folder)
    for name in ("npz", "bigmoeonedge"):
        assert imported(tmp_path, folder, format=name).source["format"] == name
    with pytest.raises(UsageError, match="run holds files of npz and bigmoeonedge"):
        imported(tmp_path, folder / "z.npz", folder)


def test_a_model_is_a_preset_that_fits(tmp_path):
    meta = {"model": "org/Mixtral_8x7B-Instruct (chat)", "num_experts": 8}
    changes = arrays([0], [1], layers=32, meta=np.array(json.dumps(meta)))
    np.savez(tmp_path / "a.npz", **changes)
    assert imported(tmp_path, tmp_path / "a.npz").model == "mixtral-8x7b"
    with pytest.raises(UsageError, match="has 32 MoE layers of 8 experts, but the model olmoe-1b-7b has 16 of 64"):
        imported(tmp_path, tmp_path / "a.npz", model="olmoe-1b-7b")
    np.savez(tmp_path / "b.npz", **arrays([0], [1], layers=31, meta=np.array(json.dumps(meta))))
    assert imported(tmp_path, tmp_path / "b.npz").model == meta["model"], "named alike, but does not fit"


@pytest.mark.parametrize("write", [import_traces, import_and_leave_out])
def test_a_file_of_a_folder_that_is_read_is_not_replaced(tmp_path, write):
    source = save(tmp_path / "a.npz")
    before = source.read_bytes()
    with pytest.raises(UsageError, match=r"a\.npz is what is read"):
        write([tmp_path], source)
    assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]


def test_same_source_same_bytes(tmp_path):
    source = save(tmp_path / "a.npz")
    import_traces([source], tmp_path / "1.h5")
    import_traces([source.rename(tmp_path / "b.npz")], tmp_path / "2.h5")
    assert (tmp_path / "1.h5").read_bytes() == (tmp_path / "2.h5").read_bytes()


@captured
@pytest.mark.parametrize(
    ("name", "model", "rows", "requests", "phases"),
    [
        ("real_deepseek-v2-lite_esft_law.npz", "deepseek-v2-lite", 8327, 33, {0: 33}),
        ("real_deepseek-v2-lite_esft_summary.npz", "deepseek-v2-lite", 8479, 13, {0: 13}),
        ("real_gpt-oss-20b_decode_24req_weights.npz", "gpt-oss-20b", 7270, 24, {1: 7270}),
        ("qwen3-30b_bigmoeonedge.route.csv", "qwen3-30b-a3b", 156, 1, {0: 1, 1: 128}),
        ("tiny-olmoe_aux.npz", "tiny-olmoe", 16414, 64, {0: 64, 1: 6917}),
    ],
)
def test_captures(tmp_path, name, model, rows, requests, phases):
    trace = imported(tmp_path, CAPTURES / name)
    assert (trace.model, trace.rows) == (model, rows)
    assert dict(zip(*np.unique(trace.phase, return_counts=True), strict=True)) == phases
    assert np.unique(trace.read("request", 0, rows)).tolist() == list(range(requests))
    if name.endswith(".npz"):
        given = np.load(CAPTURES / name)
        for ours, theirs in (("experts", "expert_ids"), ("gates", "gate_weights"), ("position", "position")):
            assert np.array_equal(trace.read(ours, 0, rows), given[theirs])


@captured
def test_the_last_layer_of_a_llama_cpp_prefill_routes_one_token(tmp_path):
    trace = imported(tmp_path, CAPTURES / "qwen3-30b_bigmoeonedge.route.csv")
    absent = trace.read("experts", 0, 156) == 255
    assert absent.sum() == 27 * 6 and absent[:27, 47].all()
    assert set(trace.expert_bytes.tolist()) == {2654208, 3059712} and trace.top_k == 6
    # The engine's own residency: 4000 MiB of cache in its author's findings, hit rate over all choices.
    recorded = trace.read("recorded", 0, 156)
    assert (recorded == 1).sum() == 29597 and (recorded == 0).sum() == 15169


@captured
def test_the_shipped_trace_is_the_import_of_its_capture(tmp_path):
    import_traces([CAPTURES / "tiny-olmoe_aux.npz"], tmp_path / "out.h5", model="tiny-olmoe")
    assert (tmp_path / "out.h5").read_bytes() == (SHIPPED / "tiny-olmoe.h5").read_bytes()


def test_the_shipped_traces_are_whole():
    for path in sorted(SHIPPED.glob("*.h5")):
        with Trace.open(path) as trace:
            trace.verify()
        assert f"## {path.name}" in (SHIPPED / "README.md").read_text()
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.h5")) < 8e6
