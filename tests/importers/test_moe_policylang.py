"""Traces of MoE-PolicyLang: passes are cut where layers go back, and what does not fit is one sentence."""

import json

import numpy as np
import pytest
from support.writers import imported, refused, routing, steps
from support.writers.moe_policylang import EXPERTS, LAYERS, NUMBERS, TOP_K, trace

from moetrace.importers import moe_policylang
from moetrace.importers.captured import Hints
from moetrace.importers.formats import detect
from moetrace.importers.importing import import_traces
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace

IDS = routing(9, LAYERS, TOP_K, EXPERTS)


def test_passes_requests_and_scores(tmp_path):
    scores = np.random.default_rng(0).random(IDS.shape).round(4)
    path = trace(tmp_path / "a.jsonl", IDS, [4, 1, 1, 2, 1], scores)
    assert detect(path) == "moe-policylang"
    found = imported(tmp_path, path)
    assert np.array_equal(found.read("experts", 0, 9), IDS) and found.layer_index.tolist() == NUMBERS
    np.testing.assert_allclose(found.read("gates", 0, 9), scores, atol=1e-3)
    assert steps(found) == [(4, 0), (1, 1), (1, 1), (2, 0), (1, 1)] and found.model == "x/Model"
    assert found.read("request", 0, 9).tolist() == [0] * 6 + [1] * 3
    assert found.read("position", 0, 9).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2] and found.num_experts == EXPERTS


def test_a_token_a_pass_as_the_description_shows(tmp_path):
    header = {"model_name": "m", "num_layers": 2, "num_experts": 8, "top_k": 2, "num_entries": 6}
    lines = [{"t": row, "l": layer, "e": IDS[row, layer].tolist()} for row in range(3) for layer in range(2)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [header, *lines]))
    found = imported(tmp_path, path)
    assert np.array_equal(found.read("experts", 0, 3), IDS[:3, :2]) and steps(found) == [(1, 1)] * 3
    assert "gates" not in found.has and found.read("position", 0, 3).tolist() == [0, 1, 2]


def test_one_layer_is_cut_where_tokens_go_back(tmp_path):
    path = trace(tmp_path / "a.jsonl", IDS[:, :1], [3, 1, 1, 4])
    found = imported(tmp_path, path)
    assert steps(found) == [(3, 0), (1, 1), (1, 1), (4, 0)]
    assert np.array_equal(found.read("experts", 0, 9), IDS[:, :1])


def test_pieces_cut_nothing(tmp_path, monkeypatch):
    from moetrace.importers.reading import text

    path = trace(tmp_path / "a.jsonl", IDS, [4, 1, 1, 2, 1])
    monkeypatch.setattr(text, "CHUNK_BYTES", 200)
    assert np.array_equal(imported(tmp_path, path).read("experts", 0, 9), IDS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"num_experts": 8', '"num_experts": 0', "first line is no header"),
        ('"num_experts": 8', '"num_experts": 3', "but the model has 3 experts"),
        ('"top_k": 2', '"top_k": 3', "record 1 holds not 3 experts"),
        ('"l": 2', '"l": -2', "is not as expected"),
        ('"l": 2', '"l": 65535', "is not as expected"),
        ('"t": 3', '"t": 999999999', "too few for"),
        ('"t": 3', '"t": -1', "is not as expected"),
        ('"e": [', '"e": [3000000000, ', "holds not 2 experts"),
        ('{"t": 3, "l": 2', '{"l": 2, "x', "is not as expected"),
    ],
)
def test_records_that_do_not_fit_are_refused_in_one_sentence(tmp_path, old, new, message):
    path = trace(tmp_path / "a.jsonl", IDS, [4, 1, 1, 2, 1])
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert message in refused(tmp_path, path, format="moe-policylang")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"num_entries": 27', '"num_entries": 4000', "the header says 4,000 records, but there are 27"),
        ('"num_entries": 27', '"num_entries": 26', "the header says 26 records, but there are 27"),
        ('"num_layers": 5', '"num_layers": 4', "the header says 4 layers, but there is a layer 4"),
        ('"num_layers": 5', '"num_layers": null', ""),
    ],
)
def test_a_header_that_says_otherwise_is_noted_and_refused_if_strict(tmp_path, old, new, sentence):
    path = trace(tmp_path / "a.jsonl", IDS, [4, 1, 1, 2, 1])
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    notes = []
    import_traces(path, tmp_path / "out.h5", hints=Hints(note=notes.append))
    found = Trace.open(tmp_path / "out.h5")
    assert np.array_equal(found.read("experts", 0, 9), IDS) and found.source.get("header", "") == sentence
    assert [note.startswith(f"{path}: {sentence};") for note in notes] == [True] * bool(sentence)
    if sentence:
        with pytest.raises(MoetraceError, match=sentence):
            import_traces(path, tmp_path / "strict.h5", hints=Hints(strict=True))
        assert not (tmp_path / "strict.h5").exists()


@pytest.mark.parametrize("more", [{}, {"l": 1}])
def test_a_file_of_only_a_header_has_no_records(tmp_path, more):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"num_layers": 2, "num_experts": 8, "top_k": 2, "num_entries": 0} | more))
    assert "has no records" in refused(tmp_path, path, format="moe-policylang")


def test_other_json_lines_are_not_recognized():
    header = b'{"model_name": "m", "num_layers": 2, "num_experts": 8, "top_k": 2, "num_entries": 6}\n'
    assert moe_policylang.recognize(header + b'{"t": 0, "l": 0, "e": [1]}', "a")
    assert not moe_policylang.recognize(header + b'{"type": "route", "layer": 0}', "a")
    assert not moe_policylang.recognize(header.replace(b"num_entries", b"n") + b'{"t": 0, "l": 0, "e": [1]}', "a")
