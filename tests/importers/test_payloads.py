"""Routing as payloads of training stacks, and as streams of server-sent events: in answers of engines, and alone."""

import base64
import json

import numpy as np
import pytest
from support.answers import answer, ids_of, no, one, places, read
from support.writers import imported, refused
from support.writers.sglang_request import stream_of_chat, stream_of_generate, with_payload
from support.writers.vllm import payload, response

from moetrace.importers.formats import detect
from moetrace.spec.errors import MoetraceError


@pytest.mark.parametrize("dtype", ["uint16", "int32", "torch.uint8", "int64"])
def test_the_payload_of_training_stacks(tmp_path, dtype):
    ids = ids_of(7).astype(dtype.removeprefix("torch."))
    payload = {"data": base64.b64encode(ids.tobytes()).decode(), "shape": [7, 3, 2], "dtype": dtype, "start": 4}
    whole = response([ids], 10) | {"usage": {"prompt_tokens": 10, "completion_tokens": 2}}
    whole["choices"][0]["routed_experts"] = payload
    trace = read(tmp_path, "vllm", whole)
    assert places(trace) == one(range(4, 11), 10) and np.array_equal(trace.read("experts", 0, 7), ids)
    for change, message in (
        ({"shape": [7, 3, 3]}, "but its size differs"),
        ({"dtype": "float32"}, "not integers"),
        ({"dtype": "O"}, "not integers"),
        ({"dtype": "?!"}, "not integers"),
        ({"shape": [42]}, "not integers"),
        ({"start": 5}, "7 tokens from position 5 on, but says that there are 10 tokens of the prompt and 2"),
    ):
        whole["choices"][0]["routed_experts"] = payload | change
        assert message in no(tmp_path, "vllm", whole)


def test_a_single_payload_is_a_request(tmp_path):
    ids = ids_of(7).astype(np.int16)
    path = tmp_path / "a.json"
    for form in (payload(ids, 4), [payload(ids, 4)], dict(reversed(payload(ids, 4).items()))):
        path.write_text(json.dumps(form, indent=2))
        assert detect(path) == "vllm"
        trace = imported(tmp_path, path, num_experts=16)
        assert places(trace) == one(range(4, 11), 99) and np.array_equal(trace.read("experts", 0, 7), ids)
        assert trace.source["engine"] == "not recorded" and trace.source["phase"].startswith("unknown")
    long = np.tile(ids_of(9), (4000, 1, 1)).astype(np.int32)  # its text hides shape and dtype from recognition
    path.write_text(json.dumps(payload(long)))
    assert detect(path) == "vllm" and imported(tmp_path, path, num_experts=16).rows == 36_000
    path.write_text("".join(json.dumps(payload(ids_of(rows, rows))) + "\n" for rows in (3, 5)))
    assert places(imported(tmp_path, path, num_experts=16)) == one(range(3), 99) + one(range(5), 99, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "7"}, "the payload is not as expected: Expected `array`"),
        ({"shape": [7, -3, 2]}, "Expected `int` >= 0"),
        ({"shape": [2**40, 2**40, 2**40]}, "but its size differs"),
        ({"dtype": 3}, "Expected `str`"),
        ({"dtype": "(2,)i4"}, "not integers"),
        ({"start": -1}, "Expected `int` >= 0"),
        ({"start": 2**31 - 2}, "would begin at position"),
        ({"data": "AAA"}, "no base64"),
    ],
)
def test_a_payload_that_does_not_fit_is_one_sentence(tmp_path, change, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(payload(ids_of(7)) | change))
    assert message in refused(tmp_path, path, num_experts=16) and detect(path) == "vllm"


def test_other_json_with_data_is_no_payload(tmp_path):
    path = tmp_path / "a.json"
    for text_of_it in ('{"data": [1], "shape": [1], "dtype": "u1"}', '{"data": "AAAA", "shape": [1]}', '{"data": {}}'):
        path.write_text(text_of_it)
        with pytest.raises(MoetraceError, match="in no format"):
            detect(path)


def test_payloads_in_answers_of_sglang(tmp_path):
    ids = ids_of(7)
    whole = with_payload(ids, 10, 4)
    assert places(read(tmp_path, "sglang-request", whole)) == one(range(4, 11), 10)
    path = tmp_path / "log.jsonl"
    assert np.array_equal(imported(tmp_path, path, num_experts=16).read("experts", 0, 7), ids), "no top_k is needed"
    whole["meta_info"]["routed_experts"]["start"] = 5
    assert "7 tokens from position 5 on" in no(tmp_path, "sglang-request", whole)
    whole["meta_info"]["routed_experts"]["shape"] = [3, 7, 3]
    assert "but its size differs" in no(tmp_path, "sglang-request", whole)
    choices = [{"index": n, "meta_info": with_payload(ids_of(8, n), 6)["meta_info"]} for n in range(2)]
    trace = read(tmp_path, "sglang-request", {"choices": choices})
    assert places(trace) == one(range(8), 6) + one(range(8), 6, 1)


def test_streams_of_sglang(tmp_path):
    ids = ids_of(9)
    path = stream_of_generate(tmp_path / "a.txt", ids, 6)
    assert detect(path) == "sglang-request"
    trace = imported(tmp_path, path, num_experts=16, top_k=2)
    assert places(trace) == one(range(9), 6) and "left_out_answers" not in trace.source, "parts without are no answers"
    path = stream_of_chat(tmp_path / "b.txt", ids, 6)
    assert detect(path) == "sglang-request"
    trace = imported(tmp_path, path, num_experts=16, top_k=2)
    assert places(trace) == one(range(9), 6) and trace.model == "x/Some-Model", "tokens come after the routing"
    lines = [line for line in path.read_text().splitlines() if "usage" not in line or "null" in line]
    path.write_text("\n".join(lines))
    assert "give --model" in refused(tmp_path, path, num_experts=16, top_k=2)
    assert places(imported(tmp_path, path, num_experts=16, top_k=2, layers=3)) == one(range(9), 99)
    path.write_text("\n".join(line for line in lines if "sglext" not in line))
    assert "no part of an answer" in refused(tmp_path, path, num_experts=16, top_k=2, format="sglang-request")


def test_streams_of_several_answers_in_one_log_are_joined_by_id(tmp_path):
    first, second = ids_of(9), ids_of(8, 1)
    lines = [
        stream_of_generate(tmp_path / f"{name}.txt", ids, 6, name).read_text().splitlines()
        for name, ids in (("a", first), ("b", second))
    ]
    path = tmp_path / "log.txt"
    mixed = [line for pair in zip(*lines, strict=False) for line in pair] + lines[0][len(lines[1]) :]
    path.write_text("\n".join(mixed))
    trace = imported(tmp_path, path, num_experts=16, top_k=2)
    assert places(trace) == one(range(8), 6) + one(range(9), 6, 1), "the shorter one ends first"


@pytest.mark.parametrize("engine", ["vllm", "sglang-request", "megatron"])
def test_lines_that_a_batch_of_requests_writes_hold_answers(tmp_path, engine):
    ids = [ids_of(9, seed) for seed in range(2)]
    lines = [
        {"custom_id": f"c{n}", "response": {"status_code": 200, "body": answer(engine, one_, 6, 4, name=f"x{n}")}}
        for n, one_ in enumerate(ids)
    ]
    failed = {"custom_id": "c9", "response": None, "error": {"message": "too long"}}
    trace = read(tmp_path, engine, *lines, failed)
    assert places(trace) == one(range(9), 6) + one(range(9), 6, 1)
    assert np.array_equal(trace.read("experts", 0, 18), np.concatenate(ids))
    assert trace.source["left_out_answers"] == {"without routing": 1}
    lines[1]["response"]["body"]["usage"] = lines[1]["response"]["body"]["meta_info"] = {"prompt_tokens": -1}
    trace = read(tmp_path, engine, *lines)
    assert trace.rows == 9 and sum(trace.source["left_out_answers"].values()) == 1
    plain = answer(engine, ids[0], 6, 4, response="a text of another log's")
    assert read(tmp_path, engine, plain).rows == 9
