"""moe-cache-lab: both versions, unassigned tokens, and what does not fit."""

import json

import numpy as np
import pytest
from support.writers import routing, steps
from support.writers.check import column, imported, refused
from support.writers.moe_cache_lab import trace


@pytest.mark.parametrize("chunk", [50, 1 << 20])
@pytest.mark.parametrize("version", [1, 2])
def test_prompt_and_generated_tokens(tmp_path, monkeypatch, version, chunk):
    monkeypatch.setattr("moetrace.importers.reading.text.CHUNK_BYTES", chunk)
    ids, path = routing(6, 3, 2, 8), tmp_path / "a.jsonl"
    path.write_text(trace(ids, 4, [1, 2, 4], version))
    found = imported(path, "moe-cache-lab")
    assert np.array_equal(column(found, "experts"), ids) and found.layer_index.tolist() == [1, 2, 4]
    assert steps(found) == [(4, 0), (1, 1), (1, 1)] and column(found, "gates").tolist() == [[[0.25] * 2] * 3] * 6
    assert found.source["version"] == version and found.source["recorded_model"] == "org/model"


def test_a_token_without_room_is_absent_and_an_encoder_left_out(tmp_path):
    ids, path = routing(4, 2, 2, 8), tmp_path / "a.jsonl"
    ids[1, 1] = -1
    lines = trace(ids, 2, [1, 3], 2).splitlines()
    encoder = {"routing_stage": "encoder", "phase": "source", "selected_experts": [7, 6]}
    lines.insert(1, json.dumps(json.loads(lines[1]) | encoder))
    path.write_text("\n".join(lines))
    found, wanted = imported(path, "moe-cache-lab"), ids.copy()
    wanted[1, 1] = 255
    assert np.array_equal(column(found, "experts"), wanted)
    assert found.source["left_out_encoder_selections"] == 1


def test_sizes_that_are_null_must_be_said(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(trace(routing(3, 2, 2, 8), 2, [0, 1], num_experts=None, experts_per_token=None))
    refused(path, "does not say num_experts", "moe-cache-lab")
    assert imported(path, "moe-cache-lab", num_experts=8).top_k == 2


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"format_version": 1', '"format_version": 3', "must begin with metadata of format_version 1 or 2"),
        ('"experts_per_token": 2', '"experts_per_token": 3', "says 3 experts a token, but selections hold up to 2"),
        ('"phase": "prompt"', '"phase": "x"', "selection 1 is of phase 'x', position 0 and layer 0, which does not"),
        ('"token_position": 0', '"token_position": -1', "selection 1 is of phase 'prompt', position -1"),
        ('"token_position": 0', '"token_position": 1', "a token has two of one layer|does not fit"),
        ('"layer": 1', '"layer": 99999999', "layer 99999999, which does not fit"),
        ('"phase": "prompt"', '"phase": "generated"', "does not fit the others|behind a generated one"),
        ('"selected_experts": [', '"selected_experts": [8, ', "selections hold up to 3"),
        ('"num_experts": 8', '"num_experts": 4', "holds the expert ., but there are 4 experts"),
        ('"selected_probabilities": [0.25, ', '"selected_probabilities": [', "does not hold 2 probabilities"),
        ('"layer"', '"lay', "line 2 is not as expected"),
    ],
)
def test_a_trace_that_does_not_fit_is_refused_in_one_sentence(tmp_path, old, new, sentence):
    text = trace(np.array([[[0, 7], [5, 1]], [[2, 3], [4, 6]], [[1, 0], [3, 2]]]), 2, [0, 1])
    assert old in text
    (tmp_path / "a.jsonl").write_text(text.replace(old, new, 1))
    refused(tmp_path / "a.jsonl", sentence, "moe-cache-lab")
