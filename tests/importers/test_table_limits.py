"""Tables whose numbers or lists are beyond what fits: one sentence, before anything large is made."""

import json

import polars as pl
import pytest
from support.writers.check import refused

from moetrace.importers.reading.spool import Spool


@pytest.mark.parametrize("column", ["layer", "token", "expert"])
def test_a_number_beyond_64_bits_is_one_sentence(tmp_path, column):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"layer": 0, "token": 0, "expert": 1} | {column: 2**70}) + "\n")
    refused(path, f"the column {column} holds a number of 2\\^63 or more", "any-table", num_experts=8)
    path.write_text(json.dumps({"layer": 0, "token": 0, "expert": [1, 2**70]}) + "\n")
    refused(path, "hold different kinds of values in one column", "any-table", num_experts=8)


def test_lists_shorter_than_the_first_are_refused_before_any_row_is_made(tmp_path, monkeypatch):
    rows = 4000
    lists = [[1] * 1000, *[[1]] * (rows - 1)]
    path = tmp_path / "a.parquet"
    pl.DataFrame({"layer": [0] * rows, "token": range(rows), "experts": lists}).write_parquet(path, row_group_size=999)
    monkeypatch.setattr(Spool, "grow", None)
    refused(path, "4999 choices are too few for .4000, 1, 1000.", "any-table", num_experts=1000)
