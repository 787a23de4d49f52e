"""NumPy archives: absent ids of any kind, and what is refused before it is read."""

import io
import zipfile

import numpy as np
import pytest
from support.small_sources import arrays, imported, save

from moetrace.spec.errors import MoetraceError


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
        ("meta", np.array('{"num_experts": 1000000}'), "meta says 1000000 experts, but must say 1 to 65535"),
        ("meta", np.array('{"num_experts": -1}'), "meta says -1 experts, but must say 1 to 65535"),
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
