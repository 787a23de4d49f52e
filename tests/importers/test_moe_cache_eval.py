"""moe-cache-eval: events of single tokens become rows, others counts."""

import json

import numpy as np
import pytest
from support.writers import routing, steps
from support.writers.check import column, imported, refused
from support.writers.moe_cache_eval import DTYPES, save

pytest.importorskip("safetensors")


def test_events_of_many_tokens_become_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrace.importers.moe_cache_eval.BLOCK_BYTES", 200)
    ids = [routing(n, 3, 2, 8, n) for n in (5, 3, 1, 4)]
    given = [(0, 0, ids[0]), (0, 0, ids[1]), (1, 0, ids[2]), (-1, 1, ids[3])]
    given = [(*one, np.full(one[2].shape, 0.5)) for one in given]
    trace = imported(save(tmp_path / "run", given, 8)[0], "moe-cache-eval")
    expected = [[np.bincount(part[:, layer].ravel(), minlength=8) for layer in range(3)] for part in ids]
    assert np.array_equal(trace.read("counts", 0, 4), expected)
    assert steps(trace) == [(5, 0), (3, 0), (1, 0), (4, 1)] and trace.model == "org/Some-MoE" and trace.top_k == 2


@pytest.mark.parametrize("num_experts", [8, 300])
@pytest.mark.parametrize("manifest", [True, False])
def test_events_of_one_token_become_rows(tmp_path, monkeypatch, num_experts, manifest):
    monkeypatch.setattr("moetrace.importers.moe_cache_eval.BLOCK_BYTES", 50)
    ids = np.sort(routing(6, 3, 2, num_experts), axis=2)
    gates = np.random.default_rng(0).random(ids.shape).astype(np.float32)
    ids[4, 1, 1] = -1  # padding, which the engine leaves out
    given = [(request, phase, ids[n : n + 1], gates[n : n + 1]) for n, (request, phase) in enumerate(ROWS)]
    hints = {} if manifest else {"num_experts": num_experts, "top_k": 2}
    trace = imported(save(tmp_path / "run", given, num_experts, manifest)[0], "moe-cache-eval", **hints)
    absent = 255 if num_experts == 8 else 65535
    assert np.array_equal(column(trace, "experts"), np.where(ids < 0, absent, ids))
    assert np.array_equal(column(trace, "gates"), np.where(ids < 0, 0, gates).astype(np.float16))
    assert column(trace, "request").tolist() == [0, 0, 1, 2, 2, 0]
    assert column(trace, "position").tolist() == [0, 1, 0, 0, 1, 2]
    assert steps(trace) == [(1, 0), (1, 1), (1, 0), (1, 1), (1, 1), (1, 1)]


ROWS = [(7, 0), (7, 1), (3, 0), (-1, 1), (-1, 1), (7, 1)]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("phases", np.full(6, 2), "phases holds numbers from 2 to 2, but must hold 0 to 1"),
        ("layer_ids", np.array([0, 2, 1, 0, 1, 2]), "not in ascending order"),
        ("layer_ids", np.full(6, -1), "layer_ids holds numbers from -1"),
        ("token_counts", np.zeros(6), "token_counts holds numbers from 0"),
        ("token_counts", np.array([3, 3, 4, 3, 3, 3]), "token_counts differ between the layers of a forward cycle"),
        ("token_counts", np.full(6, 2), "more assignments than its tokens times top_k"),
        ("phases", np.zeros(5), r"phases has shape \(5,\), but must have \(6,\)"),
        ("offsets", np.zeros(7), "offsets must increase from 0 to"),
        ("offsets", np.array([0, 9, 3, 9, 9, 9, 99]), "offsets holds numbers from 0 to 99|offsets must increase"),
        ("gate_mass", np.zeros(1), "gate_mass has another shape"),
        ("expert_ids", 8, "expert_ids holds numbers from 8 to 8"),
        ("assignment_counts", 0, "assignment_counts holds numbers from 0"),
        ("request_indices", None, "has no tensor 'request_indices'"),
    ],
)
def test_bad_events_are_one_sentence(tmp_path, name, value, sentence):
    from safetensors.numpy import load_file, save_file

    given = [(0, 0, routing(3, 3, 2, 8, seed), np.ones((3, 3, 2))) for seed in range(2)]
    path = save(tmp_path / "run", given, 8)[0]
    arrays = load_file(path)
    if value is None:
        del arrays[name]
    else:
        value = np.full(arrays[name].shape, value) if np.ndim(value) == 0 else value
        arrays[name] = value.astype(DTYPES.get(name, np.int64))
    save_file(arrays, path)
    refused(path, sentence, "moe-cache-eval")


def test_a_bad_manifest_is_one_sentence(tmp_path):
    given = [(0, 0, routing(3, 3, 2, 8), np.ones((3, 3, 2)))]
    path, manifest = save(tmp_path / "run", given, 8)
    said = json.loads(manifest.read_text())
    for text in ("{", "{}", "[" * 9999):
        manifest.write_text(text)
        refused(path, r"manifest\.json is not as expected", "moe-cache-eval")
    said["model"]["num_experts"] = 4
    manifest.write_text(json.dumps(said))
    refused(path, "expert_ids holds numbers from", "moe-cache-eval")
    manifest.unlink()
    refused(path, "does not say num_experts", "moe-cache-eval")


def test_events_that_would_take_many_counts_are_refused(tmp_path):
    given = [(0, 0, routing(2, 1, 2, 60_000, seed), np.ones((2, 1, 2))) for seed in range(20)]
    given = [(*one[:2], one[2] % 100 + np.arange(2), one[3]) for one in given]
    refused(save(tmp_path / "run", given, 60_000)[0], "would take 1200000 counts", "moe-cache-eval")


def test_a_manifest_that_claims_many_slots_is_refused(tmp_path):
    given = [(0, 0, routing(1, 3, 2, 30_000), np.ones((1, 3, 2)))]
    path, manifest = save(tmp_path / "run", given, 30_000)
    manifest.write_text(manifest.read_text().replace('"top_k": 2', '"top_k": 30000'))
    refused(path, r"6 accesses are too few for \(1, 3, 30000\) choices", "moe-cache-eval")
