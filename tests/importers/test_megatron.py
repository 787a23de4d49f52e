"""Megatron-LM: records of all ranks, steps and micro-batches find their rows."""

import numpy as np
import pytest
from support.writers import routing, steps
from support.writers.check import column, imported, refused
from support.writers.megatron import records

from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
from moetrace.trace import Trace

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
        ('"layer": 1', '"layer": -1', "line 2 is not as expected: Expected `int` >= 0 - at `\\$.layer`"),
        ('"step": 0', '"step": -1', "line 1 is not as expected: Expected `int` >= 0"),
        ('"rank": 0', '"rank": 1', "records up to 6 differ in rank"),
        ('"top_indices": [[', '"top_indices": [[9', "holds an expert that is not 0 to 7"),
        (
            '"top_indices": [[',
            '"top_indices": [[-9',
            "holds an expert|not as expected|more than once",
        ),
        ('"top_indices": [[', '"top_indices": [[99999999999999999999', "holds an expert|not as expected"),
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
    sentence = "a layer of step 0 has 4 tokens, but another one in the same micro-batch has 3"
    refused(save(tmp_path, ["".join(lines)]), sentence, "megatron", num_experts=8, strict=True)
    refused(save(tmp_path, ["".join(lines[1:3])]), "has . tokens, but another one", "megatron", num_experts=8)
    refused(save(tmp_path, [records(0, one, LAYERS)]), "does not say num_experts", "megatron")
    refused(
        save(tmp_path, [records(0, one, LAYERS).replace("decoder", "mtp")]), "no records of", "megatron", num_experts=8
    )


ODD = [
    ('"num_tokens": 3', '"num_tokens": 4', "layer 1 does not hold the ids of the num_tokens"),
    ('"num_tokens": 3', '"num_tokens": null', "layer 1 does not hold the ids of the num_tokens"),
    ('"topk": 2', '"topk": 3', "has topk 3, but others 2"),
    ('"topk": 2', '"topk": null', "has no topk"),
    ('"top_indices": [[', '"top_indices": [[1, ', "has rows that are not of 2 experts"),
    ('"top_indices": [[', '"top_indices": [["', None),
    ('"top_indices": [[', '"top_indices": [[null, ', "does not hold the ids"),
    ('"top_indices": ', '"top_indices": null, "other": ', "does not hold the ids"),
    ('"top_indices": ', '"other": ', "does not hold the ids"),
    ('"top_indices": [[', '"top_indices": [[], [', "does not hold the ids"),
]


@pytest.mark.parametrize(("old", "new", "sentence"), ODD)
def test_a_record_that_cannot_be_used_leaves_its_cells_absent(tmp_path, old, new, sentence):
    given = {(step, 0): routing(n, 3, 2, 8) for step, n in enumerate([3, 2, 1])}
    lines = records(0, given, LAYERS).splitlines(keepends=True)
    assert old in lines[1]
    lines[1] = lines[1].replace(old, new, 1)
    notes = []
    paths = save(tmp_path, ["".join(lines)])
    import_traces(paths, tmp_path / "o.h5", hints=Hints(num_experts=8, note=notes.append))
    trace, wanted = Trace.open(tmp_path / "o.h5"), np.concatenate(list(given.values()))
    wanted[:3, 1] = 255
    assert np.array_equal(column(trace, "experts"), wanted) and steps(trace) == [(3, 0), (2, 0), (1, 1)]
    assert len(notes) == 1 and "\n" not in notes[0]
    if sentence:
        assert trace.source["absent_routes_of_another_shape"] == 1
        assert f"1 record of another shape left absent: {paths[0]}: the record of step 0, layer 1 " in notes[0]
        assert sentence in notes[0]
    else:  # no JSON
        assert trace.source["left_out_lines"] == 1 and "left out 1 line that can't be read" in notes[0]
    refused(paths, sentence or "line 2 is not as expected", "megatron", num_experts=8, strict=True)


@pytest.mark.parametrize("bad", ["null", "{}", '{"step": 0}', '"x"', "{", '{"step": "0", "layer": 1}', "[]"])
@pytest.mark.parametrize("at", [1, 3, 8])
def test_a_line_that_is_no_record_is_left_out_and_counted(tmp_path, bad, at):
    given = {(step, 0): routing(n, 3, 2, 8) for step, n in enumerate([3, 2, 1])}
    lines = records(0, given, LAYERS).splitlines(keepends=True)
    paths = save(tmp_path, ["".join([*lines[:at], bad + "\n", *lines[at:]])])
    trace = imported(paths, "megatron", num_experts=8)
    assert np.array_equal(column(trace, "experts"), np.concatenate(list(given.values())))
    assert trace.source["left_out_lines"] == 1
    refused(paths, "null|not as expected", "megatron", num_experts=8, strict=True)


def test_a_record_with_other_tokens_than_its_micro_batch_is_absent(tmp_path):
    given = batches(0, [3, 2])
    lines = records(0, given, LAYERS).splitlines(keepends=True)
    lines[1] = records(0, batches(0, [4]), LAYERS).splitlines(keepends=True)[1]
    trace, wanted = imported(save(tmp_path, ["".join(lines)]), "megatron", num_experts=8), [*given.values()]
    wanted[0][:, 1] = 255
    assert np.array_equal(column(trace, "experts"), np.concatenate(wanted))
    assert trace.source["absent_routes_of_another_shape"] == 1


def test_a_micro_batch_of_which_nothing_can_be_used_is_left_out(tmp_path):
    given = {(step, 0): routing(3, 2, 2, 8) for step in range(3)}
    text = records(0, given, [0, 1]).splitlines(keepends=True)
    text[2:4] = [line.replace("[[", "[[null,") for line in text[2:4]]
    trace = imported(save(tmp_path, ["".join(text)]), "megatron", num_experts=8)
    assert steps(trace) == [(3, 0), (3, 0)] and trace.source["absent_routes_of_another_shape"] == 2


def test_a_log_of_mostly_bad_records_is_refused(tmp_path):
    text = records(0, batches(0, [3, 2]), LAYERS).splitlines(keepends=True)
    text[:3] = [line.replace("[[", "[[null,") for line in text[:3]]
    refused(save(tmp_path, ["".join(text)]), "layer 0 does not hold the ids", "megatron", num_experts=8)


def test_topk_may_be_missing_from_the_beginning(tmp_path, monkeypatch):
    given = {(step, 0): routing(n, 3, 2, 8) for step, n in enumerate([3, 2, 1])}
    lines = records(0, given, LAYERS).splitlines(keepends=True)
    lines[0] = lines[0].replace('"topk": 2', '"topk": null')
    paths = save(tmp_path, ["".join(lines)])
    monkeypatch.setattr("moetrace.importers.reading.text.CHUNK_BYTES", len(lines[0]))  # the first piece has no topk
    trace, wanted = imported(paths, "megatron", num_experts=8), np.concatenate(list(given.values()))
    wanted[:3, 0] = 255
    assert np.array_equal(column(trace, "experts"), wanted) and trace.source["absent_routes_of_another_shape"] == 1
    paths = save(tmp_path, ["".join(lines).replace('"topk": 2', '"topk": null')])
    refused(paths, "the record of step 0, layer 0 has no topk.", "megatron", num_experts=8)


def test_copies_are_known_in_spite_of_a_bad_record(tmp_path):
    given = {(step, 0): routing(n, 3, 2, 8) for step, n in enumerate([3, 2, 1])}
    texts = [records(rank, given, LAYERS) for rank in range(3)]
    texts[1] = texts[1].replace("[[", "[[null,", 1)
    lines = texts[2].splitlines(keepends=True)
    texts[2] = "".join([*lines[:2], lines[2].replace("[[", "[[null,", 1), *lines[3:]])
    trace = imported(save(tmp_path, texts), "megatron", num_experts=8)
    assert trace.source["left_out_ranks_that_are_copies"] == [1, 2]
    assert np.array_equal(column(trace, "experts"), np.concatenate(list(given.values())))
    texts[1] = texts[0].replace('"rank": 0', '"rank": 1') + "null\n"
    refused(save(tmp_path, texts), "nothing tells whether .* is a copy of", "megatron", num_experts=8)


def test_a_lost_line_among_micro_batches_is_refused(tmp_path):
    lines = records(0, batches(0, [3, 3]), LAYERS).splitlines(keepends=True)
    lines[1] = "null\n"
    refused(
        save(tmp_path, ["".join(lines)]), "several micro-batches in a step nothing tells", "megatron", num_experts=8
    )
