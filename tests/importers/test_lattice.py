"""lattice: each record is at its token and layer."""

import numpy as np
import pytest
from support.writers import routing, steps
from support.writers.check import column, imported, refused
from support.writers.lattice import records

LAYERS = [0, 2, 3]
POSITIONS = [0, 1, 2, 7, 8, 0, 1, 1]


@pytest.mark.parametrize("chunk", [9, 150, 1 << 20])
@pytest.mark.parametrize("num_experts", [8, 300])
def test_records_come_back(tmp_path, monkeypatch, chunk, num_experts):
    monkeypatch.setattr("moetrace.importers.reading.text.CHUNK_BYTES", chunk)
    ids = routing(8, 3, 2, num_experts)
    gates = np.random.default_rng(0).random((8, 3, 2)).astype(np.float32)
    gates[3, 1, 0] = np.nan
    path = tmp_path / "trace.jsonl"
    path.write_text(records(ids, gates, POSITIONS, LAYERS))
    trace = imported(path, "lattice", num_experts=num_experts)
    assert np.array_equal(column(trace, "experts"), ids) and trace.layer_index.tolist() == LAYERS
    assert np.array_equal(column(trace, "gates"), gates.astype(np.float16), equal_nan=True)
    assert column(trace, "position").tolist() == POSITIONS
    assert column(trace, "request").tolist() == [0] * 5 + [1, 1, 2], "positions begin anew"
    assert steps(trace) == [(1, 1)] * 8


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"gate_weights":[0.5,', '"gate_weights":[1e9,', "line 1: weight is beyond 65504"),
        ('"gate_weights":[0.5,', '"gate_weights":[1e308,', "line 1: weight is beyond 65504"),
        ('"selected_ids":[', '"selected_ids":[9', r"line 1 holds the expert 9\d, but the model has 8 experts"),
        ('"selected_ids":[', '"selected_ids":[99999999999', "holds an impossible id"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, old, new, sentence):
    text = records(routing(3, 3, 2, 8), np.full((3, 3, 2), 0.5), [0, 1, 2], LAYERS)
    assert old in text
    path = tmp_path / "trace.jsonl"
    path.write_text(text.replace(old, new, 1))
    refused(path, sentence, "lattice", num_experts=8)


def test_the_number_of_experts_comes_from_the_user(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(records(routing(3, 3, 2, 8), np.full((3, 3, 2), 0.5), [0, 1, 2], LAYERS))
    refused(path, "does not say num_experts", "lattice")
    refused(path, "has 2 experts a token, but --top-k says 3", "lattice", num_experts=8, top_k=3)
