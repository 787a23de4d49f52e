"""Columns of numbers come as they are in the text, with the number of their line, whatever the size of the pieces."""

from itertools import count

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.importers.reading.table import tables
from moetrace.spec.errors import MoetraceError

COLUMNS = {"a": pl.Int32, "b": None, "c": pl.Float32}


def rows(path, **options) -> list[tuple[int, tuple]]:
    found = list(tables(path, options.pop("columns", COLUMNS), abs, **options))
    return [one for line, table in found for one in zip(count(line), table.rows(), strict=False)]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-(2**31), 2**31 - 1), st.text("xyz :#\"'", max_size=3), st.integers(-9, 9))),
    st.integers(0, 3),
    st.integers(1, 50),
    st.booleans(),
)
def test_lines_come_with_their_numbers(tmp_path_factory, lines, header, chunk, ends):
    path = tmp_path_factory.mktemp("table") / "t"
    text = [*(["#, header"] * header), *(f"{a},{b},{c}.5" for a, b, c in lines)]
    path.write_text("\n".join(text) + ("\n" if ends and text else ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrace.importers.reading.text.CHUNK_BYTES", chunk)
        found = rows(path, header=header)
    expected = [(a, float(f"{c}.5")) for a, _, c in lines]
    assert found == list(enumerate(expected, header + 1))


def test_spaces_and_colons_separate_alike_and_lines_may_be_short(tmp_path):
    path = tmp_path / "t"
    path.write_text("1 x:0.5\n2\n3 y\n")
    assert rows(path, separator=" ", ragged=True) == [(1, (1, 0.5)), (2, (2, None)), (3, (3, None))]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1,x,2\n3,x\n", "t: line 2 is incomplete"),
        ("1,x\n3,x,2\n", "t: line 1 is incomplete"),
        ("1,x,2\n\n3,x,2\n", "t: line 2 is incomplete"),
        ("1,x,2\n,x,2\n", "t: line 2 is incomplete"),
        ("1,x,2\n1,x,2,3\n", "t: line 2 can't be read as CSV of 3 columns: '1,x,2,3'"),
        ("1,x,2\n1.5,x,2\n", "t: line 2 can't be read as CSV of 3 columns: '1.5,x,2'"),
        ("1,x,2\n2147483648,x,2\n", "t: line 2 can't be read as CSV"),
        ("1,x,2\n1,x,b\x1b\n", r"t: line 2 can't be read as CSV of 3 columns: '1,x,b\\x1b'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, sentence):
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(MoetraceError, match=sentence):
        rows(path, columns=COLUMNS | {"b": pl.String})


def test_a_panic_of_polars_is_one_sentence(tmp_path, monkeypatch):
    def panic(*_, **__):
        raise pl.exceptions.PanicException("index out of bounds\nmore")

    path = tmp_path / "t"
    path.write_text("1,x,2\n")
    monkeypatch.setattr(pl, "read_csv", panic)
    with pytest.raises(MoetraceError, match=r"the lines from 1 on can't be read as CSV: index out of bounds\.$"):
        rows(path)
