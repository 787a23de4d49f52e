"""TensorRT-LLM: counts are summed over ranks, ids joined."""

import json

import numpy as np
import pytest
from support.writers import routing, steps
from support.writers.check import column, imported, refused
from support.writers.trtllm import counted, save

pytest.importorskip("safetensors")
ITERATIONS, LAYERS = [9, 10, 12], [3, 5]


def ids_of(rank: int, tokens: list[int], num_experts: int = 8):
    """(iteration, layer) -> ids [tokens, top_k] of a rank."""
    parts = [routing(n, len(LAYERS), 2, num_experts, 10 * rank + i) for i, n in enumerate(tokens)]
    return {
        (iteration, layer): parts[i][:, j] for i, iteration in enumerate(ITERATIONS) for j, layer in enumerate(LAYERS)
    }


def counts_of(ids, num_experts: int = 8):
    return {cell: counted(array, num_experts) for cell, array in ids.items()}


def test_counts_of_ranks_are_summed(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrace.importers.trtllm.BLOCK_BYTES", 1)
    ranks = [counts_of(ids_of(0, [5, 7, 3])), counts_of(ids_of(1, [2, 1, 6]))]
    files = save(tmp_path / "run", 8, 2, ranks)
    for sources in (files, files[1:], tmp_path / "run"):
        trace = imported(sources, "trtllm")
        expected = [[sum(rank[i, layer] for rank in ranks) for layer in LAYERS] for i in ITERATIONS]
        assert np.array_equal(trace.read("counts", 0, 3), expected)
        assert steps(trace) == [(7, 2), (8, 2), (9, 2)] and trace.layer_index.tolist() == LAYERS
        assert (trace.source["ranks"], trace.source["iterations"]) == (2, "9 to 12")


def test_equal_ranks_count_once_and_empty_iterations_are_left_out(tmp_path):
    counts = counts_of(ids_of(0, [5, 0, 3]))
    trace = imported(save(tmp_path / "run", 8, 2, [counts] * 3)[1:], "trtllm")
    assert np.array_equal(trace.read("counts", 0, 2)[:, 1], [counts[9, 5], counts[12, 5]])
    assert trace.source["left_out_ranks_that_are_copies"] == 2 and trace.source["left_out_empty_iterations"] == 1


def test_pipeline_stages_have_layers_of_their_own(tmp_path):
    whole = counts_of(ids_of(0, [5, 2, 3]))
    ranks = [{cell: array for cell, array in whole.items() if cell[1] == layer} for layer in LAYERS]
    trace = imported(save(tmp_path / "run", 8, 2, ranks), "trtllm")
    assert np.array_equal(trace.read("counts", 0, 3), [[whole[i, layer] for layer in LAYERS] for i in ITERATIONS])


@pytest.mark.parametrize("num_experts", [8, 300])
def test_raw_ids_become_rows(tmp_path, num_experts):
    ranks = [ids_of(0, [5, 0, 3], num_experts), ids_of(1, [2, 0, 6], num_experts)]
    trace = imported(save(tmp_path / "run", num_experts, 2, ranks, raw=True), "trtllm")
    expected = [np.stack([rank[i, layer] for layer in LAYERS], 1) for i in ITERATIONS for rank in ranks]
    assert np.array_equal(column(trace, "experts"), np.concatenate(expected))
    assert steps(trace) == [(7, 0), (9, 0)]
    assert column(trace, "request").tolist() == [0] * 5 + [1] * 2 + [0] * 3 + [1] * 6
    assert column(trace, "position").tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 2, 3, 4, 5, 6, 7]


def test_raw_ids_go_before_counts_and_copies_are_left_out(tmp_path):
    ids = ids_of(0, [5, 1, 3])
    save(tmp_path / "run", 8, 2, [counts_of(ids)] * 2)
    save(tmp_path / "run", 8, 2, [ids] * 2, raw=True)
    trace = imported(tmp_path / "run", "trtllm")
    assert trace.rows == 9 and "counts" not in trace.has and trace.source["ranks"] == 1


def change(counts, cell, array):
    return counts | {cell: array}


@pytest.mark.parametrize(
    ("cell", "array", "sentence"),
    [
        ((9, 3), np.ones(9), r"9_3 has shape \(9,\), but there are 8 experts"),
        ((9, 3), np.full(8, -1), "9_3 or a later one holds numbers from -1 to"),
        ((9, 3), np.full(8, 1 << 41), "9_3 or a later one holds numbers from"),
        ((13, 3), np.ones(8), "the tensor 13_5 is missing, in all ranks"),
        ((9, 3), np.ones((2, 2, 2)), r"9_3 has shape \(2, 2, 2\)"),
        ((9, 70000), np.ones(8), r"missing|layer_index"),
    ],
)
def test_bad_counts_are_one_sentence(tmp_path, cell, array, sentence):
    counts = counts_of(ids_of(0, [5, 7, 3])) | {cell: array}
    refused(save(tmp_path / "run", 8, 2, [counts]), sentence, "trtllm")


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((4, 2)), r"9_5 has shape \(5, 2\), but must have \(4, 2\), as 9_3"),
        (np.zeros((5, 3)), r"9_3 has shape \(5, 3\), but must have \(5, 2\), as 9_3"),
        (np.full((5, 2), 8), "9_3 holds numbers from 8 to 8, but must hold -1 to 7"),
        (np.full((5, 2), 1), "chooses expert 1 more than once"),
    ],
)
def test_bad_ids_are_one_sentence(tmp_path, array, sentence):
    refused(save(tmp_path / "run", 8, 2, [ids_of(0, [5, 7, 3]) | {(9, 3): array}], raw=True), sentence, "trtllm")


def test_a_bad_folder_is_one_sentence(tmp_path):
    from safetensors.numpy import save_file

    counts = counts_of(ids_of(0, [5, 7, 3]))
    meta, rank = save(tmp_path / "run", 8, 2, [counts])
    refused(meta, "has meta_info.json, but no rank", "trtllm")
    for text, sentence in (
        ("{", "is not JSON"),
        ("[]", "does not say num_experts"),
        ("{}", "does not say num_experts"),
    ):
        meta.write_text(text)
        refused(rank, sentence, "trtllm")
    meta.write_text(json.dumps({"num_experts": 8, "num_experts_per_token": 9}))
    refused(rank, "top_k is 9", "trtllm")
    meta.unlink()
    refused(rank, "does not say num_experts: give", "trtllm")
    whole = rank.read_bytes()
    for data in (whole[:20], whole[:-1], b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:]):
        rank.write_bytes(data)
        refused(rank, r"rank0\.safetensors can't be read as safetensors", "trtllm", num_experts=8, top_k=2)
    save_file({"9_3": np.ones(8)}, rank)
    refused(rank, "9_3 holds F64, but must hold one of", "trtllm", num_experts=8, top_k=2)
    save_file({"None_3": np.ones(8, int)}, rank)
    refused(rank, "has a tensor 'None_3', which is not named", "trtllm", num_experts=8, top_k=2)
    save_file({}, rank)
    refused(rank, "holds no tensors", "trtllm", num_experts=8, top_k=2)


def test_a_header_may_claim_any_size(tmp_path):
    for size in (2**62, 4096):
        header = json.dumps({"9_3": {"dtype": "I64", "shape": [size], "data_offsets": [0, 8 * size]}}).encode()
        path = tmp_path / "rank0.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
        refused(path, "can't be read as safetensors", "trtllm", num_experts=8, top_k=2)


def test_ranks_that_share_only_some_layers_are_refused(tmp_path):
    ranks = [counts_of(ids_of(0, [5, 7, 3])), counts_of(ids_of(1, [2, 1, 6]))]
    ranks[1] = {cell: array for cell, array in ranks[1].items() if cell[1] == 3}
    files = save(tmp_path / "run", 8, 2, ranks)
    refused(files, "only one of them has layer 5, whose counts would be too few", "trtllm")
    trace = imported(files, "trtllm", only_layers=((3, 4),))
    assert np.array_equal(trace.read("counts", 0, 3)[:, 0], [sum(rank[i, 3] for rank in ranks) for i in ITERATIONS])
