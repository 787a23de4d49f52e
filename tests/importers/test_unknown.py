"""A file of no format: one sentence says what it is and what to do."""

import json
import re
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.importers.formats import FORMATS, detect
from moetrace.importers.reading.unknown import what_it_is
from moetrace.spec.errors import MoetraceError


def sentence(path):
    with pytest.raises(MoetraceError) as raised:
        detect(path)
    text = str(raised.value)
    assert "\n" not in text and text.startswith(f"{path} is in no format that can be imported, being ")
    assert all(name in text for name in FORMATS) and text.endswith("docs/importing.md describes them).")
    return text


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"routes": [1], "model": "x"}', "JSON with the keys routes, model: as JSON lines, an object a line, name"),
        ('{"a": 1}\n{"a": 2}\n', "JSON lines with the keys a: name its columns with --columns layer="),
        ('[{"ids": [1]}, {"ids": [2]}]', "JSON with the keys ids"),
        ("[1, 2]", "JSON without keys: write an object a line"),
        ('{"x": [1, 2', "JSON with the keys x"),
        ("time,value\n1,2\n", "a table with the columns time, value: name its columns with --columns layer="),
        ("x1;2\n3;4\n", "a table with the columns x1, 2"),
        ("1;2\n3;4\n", "a table without names of its columns: put a line with names"),
        ("24,3,61,7\n5,9,33,2\n", "a table without names of its columns: put a line with names"),
        ("3,1\n0,2\n1,3\n", "or, as a matrix, save the chosen ids as integers"),
        ("token,layer,gates\n0,0,0.5\n", "gates do not name the chosen experts: save the router"),
        ('{"token": 0, "weights": [0.5]}\n{"token": 1, "weights": [0.5]}\n', "gates do not name the chosen"),
        ("hello\n", "a text: write the choices as a table"),
        ("\x80\x04\x95", "a text|a bare pickle"),
        (b"\x80\x04\x95\0\0", "a bare pickle, which could run code: save it with torch.save or numpy.save"),
        (b"\x1f\x8b\x08\0", "a gzip archive: unpack it first"),
        (b"\xff\xfe\0\0\x01\0", "binary data: write the choices as a table"),
        (json.dumps({f"key{n}": n for n in range(20)}), "key6, key7 and others"),
    ],
)
def test_an_unknown_file_is_described_with_advice(tmp_path, content, what):
    path = tmp_path / "a.dat"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert re.search(what.replace("(", r"\("), sentence(path))


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (
            np.zeros((3, 2), np.int64),
            r"a NumPy array, int64 \(3, 2\), whose name does not say its layer: name ids \[tokens, top_k\] as in",
        ),
        (np.zeros((3, 2, 8, 4), np.uint8), r"a NumPy array, uint8 \(3, 2, 8, 4\): save the chosen ids as integers"),
        (np.zeros(3, "U2"), "a NumPy array, <U2"),
    ],
)
def test_arrays(tmp_path, array, what):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(MoetraceError, match=what):
        detect(tmp_path / "a.npy")


def test_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        pickled = b"\x80\x02}(X\x06\0\0\0routesK\x01X\x05\0\0\0modelX\x01\0\0\0ms."
        archive.writestr("a/data.pkl", pickled)
    assert "a file of torch.save with the keys routes, model, m: save the chosen ids" in sentence(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("a.csv", "x")
    assert "being a zip archive: unpack it first" in sentence(tmp_path / "b.zip")
    head = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "c.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(4))
    assert "a safetensors file with the keys w: save the chosen ids" in sentence(tmp_path / "c.safetensors")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:x1\n\\', max_size=60).map(str.encode))
def test_any_bytes_are_described_in_a_few_words(tmp_path_factory, data):
    what, way = what_it_is(tmp_path_factory.getbasetemp() / "a", data)
    assert what and way and "\n" not in what + way and len(what) < 600
