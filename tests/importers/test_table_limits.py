"""Tables of strangers: what is beyond what fits is one sentence, and a position stands in for a token."""

import json

import numpy as np
import polars as pl
import pytest
from support.writers import routing
from support.writers.check import column, imported, refused

from moetrace.importers.reading.spool import Spool


@pytest.mark.parametrize("name", ["layer", "token", "expert"])
def test_a_number_beyond_64_bits_is_one_sentence(tmp_path, name):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"layer": 0, "token": 0, "expert": 1} | {name: 2**70}) + "\n")
    refused(path, f"the column {name} holds a number of 2\\^63 or more", "any-table", num_experts=8)
    path.write_text(json.dumps({"layer": 0, "token": 0, "expert": [1, 2**70]}) + "\n")
    refused(path, "hold different kinds of values in one column", "any-table", num_experts=8)


def test_lists_shorter_than_the_first_are_refused_before_any_row_is_made(tmp_path, monkeypatch):
    rows = 4000
    lists = [[1] * 1000, *[[1]] * (rows - 1)]
    path = tmp_path / "a.parquet"
    pl.DataFrame({"layer": [0] * rows, "token": range(rows), "experts": lists}).write_parquet(path, row_group_size=999)
    monkeypatch.setattr(Spool, "grow", None)
    refused(path, "4999 choices are too few for .4000, 1, 1000.", "any-table", num_experts=1000)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("group", ["request", "step"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_position_numbers_the_tokens_of_a_request_or_step(tmp_path, kind, group, whole):
    ids = routing(6, 2, 2, 8)
    cells = [(number, position, layer) for number in range(2) for layer in range(2) for position in range(3)]
    rows = [
        {group: number, "position": position, "layer": layer, "expert": expert}
        for number, position, layer in cells
        for expert in ids[3 * number + position, layer][None if whole else slice(None)].tolist()
    ]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif kind == "csv":
        path.write_text("\n".join([",".join(rows[0]), *(",".join(map(_field, row.values())) for row in rows), ""]))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = imported(path, "any-table", num_experts=8)
    assert np.array_equal(column(trace, "experts"), ids) and column(trace, "position").tolist() == [0, 1, 2] * 2
    assert len(set(column(trace, "request").tolist())) == (2 if group == "request" else 1)


def _field(value) -> str:
    return f'"{value}"' if isinstance(value, list) else str(value)


@pytest.mark.parametrize("name", ["rank", "k"])
def test_other_numbers_are_no_slot(tmp_path, name):
    ids = routing(4, 2, 2, 8)
    rows = [
        {"token": token, "layer": layer, name: 2, "expert": expert}
        for token in range(4)
        for layer in range(2)
        for expert in ids[token, layer].tolist()
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = imported(path, "any-table", num_experts=8)
    assert np.array_equal(column(trace, "experts"), ids) and "slot" not in trace.source["columns"]
