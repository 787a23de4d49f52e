"""Rows in temporary files come back as they went in; text comes in whole lines, whatever the size of the pieces."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.importers.captured import Hints
from moetrace.importers.reading.spool import Spool
from moetrace.importers.reading.text import chunks, json_lines
from moetrace.spec.errors import MoetraceError


def joined(spool: Spool) -> dict[str, np.ndarray]:
    parts = list(spool.parts())
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_appended_and_scattered_rows_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrace.importers.reading.spool.BLOCK_BYTES", 50)
    rng = np.random.default_rng(0)
    spool = Spool(Hints(scratch=tmp_path), num_experts=300, layers=3, top_k=2, optional=("gates", "token", "recorded"))
    first = {
        "experts": rng.integers(0, 300, (7, 3, 2)).astype(np.uint16),
        "gates": rng.random((7, 3, 2)).astype(np.float16),
        "token": rng.integers(0, 99, 7).astype(np.int32),
        "recorded": rng.integers(0, 3, (7, 3, 2)).astype(np.uint8),
    }
    spool.append(**first)
    spool.grow(20)
    spool.scatter(np.array([19, 8]), np.array([2, 0]), np.array([1, 0]), experts=np.array([7, 9]), gates=np.ones(2))
    spool.scatter(*(np.zeros(0, int),) * 3, experts=np.zeros(0))
    spool.put(np.array([12, 9]), np.array([1, 2]), experts=np.array([[1, 2], [3, 4]]))
    assert spool.take(np.array([12, 19, 8]), np.array([1, 2, 1])).tolist() == [[1, 2], [65535, 7], [65535, 65535]]
    expected = np.full((20, 3, 2), 65535, np.uint16)
    expected[:7], expected[19, 2, 1], expected[8, 0, 0] = first["experts"], 7, 9
    expected[12, 1], expected[9, 2] = [1, 2], [3, 4]
    found = joined(spool)
    assert np.array_equal(found["experts"], expected)
    assert np.array_equal(found["gates"][:7], first["gates"]) and found["gates"].sum() == first["gates"].sum() + 2
    assert (found["recorded"][7:] == 255).all() and found["token"].tolist() == first["token"].tolist() + [0] * 13
    assert list(tmp_path.iterdir()) == [], "the files have no name"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"")), max_size=9), st.booleans(), st.integers(1, 9)
)
def test_chunks_are_whole_lines(tmp_path_factory, lines, ends, size):
    path = tmp_path_factory.mktemp("text") / "t"
    text = b"\n".join(lines) + (b"\n" if ends and lines else b"")
    path.write_bytes(text)
    read = []
    found = list(chunks(path, read.append, size))
    assert sum(read) == len(text)
    text = text.removeprefix(b"\xef\xbb\xbf")  # the byte order mark is left out
    assert b"".join(data for _, data in found) == text
    assert all(data.endswith(b"\n") for _, data in found[:-1])
    assert [line for line, _ in found] == [1 + text[: text.index(data, at)].count(b"\n") for data, at in starts(found)]


def starts(found: list[tuple[int, bytes]]) -> list[tuple[bytes, int]]:
    at, places = 0, []
    for _, data in found:
        places.append((data, at))
        at += len(data)
    return places


def test_a_bad_json_line_is_named(tmp_path):
    class Entry(msgspec.Struct):
        a: int

    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n{"a": "x"}\n')
    with pytest.raises(
        MoetraceError, match=r"t\.jsonl: line 4 is not as expected: Expected `int`, got `str` - at `\$\.a`\."
    ):
        list(json_lines(path, Entry, abs))
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}')
    found = list(json_lines(path, Entry, abs, chunk_bytes=10))
    assert [entry.a for _, entries in found for entry in entries] == [1, 2]


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrace.importers.reading.text.MAX_LINE_BYTES", 100)
    path = tmp_path / "t"
    path.write_bytes(b"a\n" + b"x" * 300)
    with pytest.raises(MoetraceError, match="line 2 is longer than"):
        list(chunks(path, abs, 50))
