"""Megatron-LM: records of all ranks, steps and micro-batches find their rows."""

import numpy as np
import pytest
from support.writers import routing, steps
from support.writers.check import column, imported, refused
from support.writers.megatron import records

LAYERS = [0, 1, 4]
KEYS = [(0, 0), (0, 1), (1, 0), (1, 1), (5, 0)]


def save(tmp_path, texts: list[str]):
    paths = [tmp_path / f"router_trace_rank{rank}.jsonl" for rank in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths


def batches(rank: int, tokens: list[int], layers: int = 3, num_experts: int = 8):
    keys = KEYS[: len(tokens)]
    return {key: routing(n, layers, 2, num_experts, 100 * rank + n) for key, n in zip(keys, tokens, strict=True)}


@pytest.mark.parametrize("chunk", [11, 200, 1 << 20])
@pytest.mark.parametrize("num_experts", [8, 300])
def test_tokens_of_ranks_follow_one_another_in_each_micro_batch(tmp_path, monkeypatch, chunk, num_experts):
    monkeypatch.setattr("moetrace.importers.reading.text.CHUNK_BYTES", chunk)
    ranks = [batches(0, [3, 2, 4, 1, 2], 3, num_experts), batches(1, [1, 5, 2, 2, 2], 3, num_experts)]
    texts = [records(rank, given, LAYERS, mtp=True, sidecar=True) for rank, given in enumerate(ranks)]
    trace = imported(save(tmp_path, texts)[::-1], "megatron", num_experts=num_experts)
    assert np.array_equal(column(trace, "experts"), np.concatenate([rank[key] for key in KEYS for rank in ranks]))
    assert steps(trace) == [(4, 2), (7, 0), (6, 0), (3, 2), (4, 0)]
    assert trace.source["left_out_mtp_records"] == 10 and trace.source["ranks"] == 2
    assert column(trace, "row_phase").tolist() == [0] * 3 + [1] + [0] * 13 + [1] + [0] * 6
    position = [*range(3), 0, *range(2), *range(5), *range(4), *range(2), 4, *range(2), *range(2), *range(2)]
    assert column(trace, "position").tolist() == position, "one token continues the request of its rank"
    request = column(trace, "request")
    assert request[17] == request[11], "as position 4 of the request that began in the step before"
    assert trace.layer_index.tolist() == LAYERS


def test_one_stream_that_decodes_is_one_request(tmp_path):
    given = batches(0, [4, 1, 1, 1, 3])
    trace = imported(save(tmp_path, [records(0, given, LAYERS)]), "megatron", num_experts=8)
    assert column(trace, "request").tolist() == [0] * 7 + [1] * 3
    assert column(trace, "position").tolist() == [*range(7), *range(3)]
    assert steps(trace) == [(4, 0), (1, 1), (1, 1), (1, 1), (3, 0)]


def test_pipeline_stages_join_and_copies_are_left_out(tmp_path):
    given = [batches(rank, [3, 2], layers=4) for rank in range(2)]
    parts = [(rank, stage) for stage in range(2) for rank in (0, 0, 1, 1)]  # each twice: tensor parallel
    texts = [
        records(number, {key: ids[:, 2 * stage : 2 * stage + 2] for key, ids in given[rank].items()}, layers)
        for number, (rank, stage) in enumerate(parts)
        for layers in [[2 * stage, 2 * stage + 1]]
    ]
    trace = imported(save(tmp_path, texts), "megatron", num_experts=8)
    expected = np.concatenate([rank[key] for key in KEYS[:2] for rank in given])
    assert np.array_equal(column(trace, "experts"), expected) and trace.layer_index.tolist() == [0, 1, 2, 3]
    assert trace.source["left_out_ranks_that_are_copies"] == [1, 3, 5, 7] and trace.source["ranks"] == 4


def test_a_layer_that_is_missing_in_a_step_is_absent(tmp_path):
    given = batches(0, [3, 2])
    lines = records(0, given, LAYERS).splitlines(keepends=True)
    trace = imported(save(tmp_path, ["".join(lines[:4] + lines[5:])]), "megatron", num_experts=8)
    expected = np.concatenate(list(given.values()))
    expected[3:, 1] = 255
    assert np.array_equal(column(trace, "experts"), expected)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"num_tokens": 3', '"num_tokens": 4', "record 1 does not hold the num_tokens, or step"),
        ('"num_tokens": 3', '"num_tokens": 1e99', "line 1 is not as expected"),
        ('"layer": 1', '"layer": -1', "record 2 is of layer -1"),
        ('"step": 0', '"step": -1', "record 1 does not hold the num_tokens, or step"),
        ('"topk": 2', '"topk": 3', "differ in rank or topk"),
        ('"rank": 0', '"rank": 1', "differ in rank or topk"),
        ('"top_indices": [[', '"top_indices": [[1, ', "record 1 and on have rows not of 2 experts"),
        ('"top_indices": [[', '"top_indices": [[9', "holds an expert that is not 0 to 7"),
        (
            '"top_indices": [[',
            '"top_indices": [[-9',
            "holds an expert|not as expected|more than once",
        ),
        ('"top_indices": [[', '"top_indices": [[99999999999999999999', "holds an expert|not as expected"),
        ('"top_indices": [[', '"top_indices": [["', "not as expected"),
        ("}\n", "\n", "line 1 is not as expected"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, old, new, sentence):
    text = records(0, batches(0, [3, 2]), LAYERS)
    assert old in text
    paths = save(tmp_path, [text.replace(old, new, 1)])
    refused(paths, sentence, "megatron", num_experts=8)


def test_steps_that_go_back_are_refused(tmp_path):
    given = batches(0, [3, 2, 1])
    text = records(0, given, LAYERS)
    refused(save(tmp_path, [text * 2]), "steps go back: import one run at a time", "megatron", num_experts=8)


def test_ranks_that_do_not_fit_are_refused(tmp_path):
    one, other = batches(0, [3, 2]), batches(1, [3, 2])
    refused(
        save(tmp_path, [records(0, one, LAYERS)] * 2), "both hold rank 0: import one run", "megatron", num_experts=8
    )
    texts = [records(0, one, LAYERS), records(1, other, LAYERS), records(2, one, [5, 6, 7])]
    refused(save(tmp_path, texts), "there are 2 and 1 ranks of such", "megatron", num_experts=8)
    lines = records(0, one, LAYERS).splitlines(keepends=True)
    lines[1] = records(0, batches(0, [4]), LAYERS).splitlines(keepends=True)[1]
    refused(save(tmp_path, ["".join(lines)]), "a layer of step 0 has 4 tokens, but another", "megatron", num_experts=8)
    refused(save(tmp_path, [records(0, one, LAYERS)]), "does not say num_experts", "megatron")
    refused(
        save(tmp_path, [records(0, one, LAYERS).replace("decoder", "mtp")]), "no records of", "megatron", num_experts=8
    )
