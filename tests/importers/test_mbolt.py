"""mbolt's logs of llama.cpp: passes, the last layer of prompts, and what is damaged."""

import struct

import numpy as np
import pytest
from support.writers import routing, steps
from support.writers.check import column, imported, refused
from support.writers.mbolt import log


def passes(*tokens, layers=3):
    return [routing(n, layers, 2, 8, n + 10 * at) for at, n in enumerate(tokens)]


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_the_last_layer_of_a_prompt_has_its_last_token(tmp_path, monkeypatch, block):
    monkeypatch.setattr("moetrace.importers.mbolt._BLOCK_CELLS", block)
    given = passes(5, 1, 1, 4, 1)
    path = tmp_path / "a.bin"
    path.write_bytes(log(given, [1, 2, 4], 8))
    trace, wanted = imported(path, "mbolt"), np.concatenate(given)
    wanted[[0, 1, 2, 3, 7, 8, 9], 2] = 255
    assert np.array_equal(column(trace, "experts"), wanted) and trace.layer_index.tolist() == [1, 2, 4]
    assert steps(trace) == [(5, 0), (1, 1), (1, 1), (4, 0), (1, 1)]
    assert column(trace, "request").tolist() == [0] * 7 + [1] * 5
    assert trace.source["absent_rows_of_last_layer"] == 7 and trace.num_experts == 8


def test_a_log_of_all_tokens_and_a_cut_end(tmp_path):
    given = passes(3, 1, layers=2)
    path = tmp_path / "a.bin"
    path.write_bytes(log(given, [0, 1], 0, last=False))
    assert np.array_equal(column(imported(path, "mbolt", num_experts=8), "experts"), np.concatenate(given))
    refused(path, "does not say num_experts", "mbolt")
    path.write_bytes(log(given, [0, 1], 8, last=False)[:-5])
    trace, wanted = imported(path, "mbolt"), np.concatenate(given)
    wanted[3, 1] = 255
    assert np.array_equal(column(trace, "experts"), wanted) and trace.source["left_out_cut_records"] == 1
    refused(path, "record 3, the last one, is cut", "mbolt", strict=True)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ((9999999, 2, 1), "record 2 is of layer 9999999 with 1 tokens of 2 experts, which does not fit"),
        ((0, 3, 1), "record 2 is of layer 0 with 1 tokens of 3 experts"),
        ((0, 2, -1), "record 2 is of layer 0 with -1 tokens"),
    ],
)
def test_a_bad_record_is_one_sentence(tmp_path, record, sentence):
    path = tmp_path / "a.bin"
    path.write_bytes(log(passes(3, layers=2), [0, 1], 8) + struct.pack("<3i", *record) + bytes(64))
    refused(path, sentence, "mbolt")


@pytest.mark.parametrize("record", [0, 6, 7])
@pytest.mark.parametrize("tokens", [5_000, 1 << 30])
def test_a_damaged_count_loses_no_records_silently(tmp_path, record, tokens):
    path = tmp_path / "a.bin"
    words = np.frombuffer(log(passes(*[1] * 300), [0, 1, 2], 8), "<i4").copy()
    words[3 + 5 * record + 2] = tokens
    path.write_bytes(words.tobytes())
    refused(path, f"record {record} is of {tokens} tokens, more than are left", "mbolt")


def test_a_prompt_may_be_cut_anywhere(tmp_path):
    path = tmp_path / "a.bin"
    whole = log(passes(1, 40), [0, 1, 2], 8)
    starts = [72, 72 + 12 + 320, 72 + 2 * (12 + 320), len(whole)]  # of the prompt's records, and the end
    for size in range(72, len(whole) + 1, 4):
        path.write_bytes(whole[:size])
        assert imported(path, "mbolt").source.get("left_out_cut_records", 0) == (size not in starts)


def test_a_log_that_does_not_fit_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "a.bin"
    whole = log(passes(3, layers=3), [0, 1, 2], 8)
    path.write_bytes(whole[:12])
    refused(path, "has no records of routing", "mbolt")
    path.write_bytes(whole[:9])
    refused(path, "does not begin as a log of mbolt", "mbolt")
    path.write_bytes(whole[:12] + struct.pack("<3i2i", 0, 2, 1, 1, 2) + whole[12 + 36 :])
    refused(path, "record 0 has 1 tokens, but others of its pass 3", "mbolt")
    path.write_bytes(log(passes(3, layers=2), [0, 1], 4))
    refused(path, "holds the expert ., but the model has 4 experts", "mbolt")
