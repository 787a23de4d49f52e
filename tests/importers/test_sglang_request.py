"""SGLang's base64 by request: the shape is found out of band, ids come out exactly, and damage is one sentence."""

import json

import numpy as np
import pytest
from support.writers import imported, refused, steps
from support.writers.sglang_request import completion, generated, request, text

from moetrace.importers import sglang_request
from moetrace.importers.formats import detect

SAID = {"num_experts": 8, "top_k": 2}


def write(path, *responses, **options):
    path.write_text("\n".join(json.dumps(response, **options) for response in responses))
    return path


def test_responses_of_generate_tell_layers_and_prompts(tmp_path):
    first, second = request(6, 3, 2, 8, 0), request(5, 3, 2, 8, 1)
    trace = imported(tmp_path, write(tmp_path / "a.jsonl", generated(first, 4), generated(second, 5)), **SAID)
    assert np.array_equal(trace.read("experts", 0, 11), np.concatenate([first, second]))
    assert trace.read("position", 0, 11).tolist() == [*range(6), *range(5)]
    assert steps(trace) == [(4, 0), (1, 1), (1, 1), (5, 0)]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_responses(tmp_path, indent):
    first, second = request(6, 3, 2, 8, 0), request(5, 3, 2, 8, 1)
    path = write(tmp_path / "a.json", [generated(first, 4), generated(second, 5)], indent=indent)
    assert np.array_equal(imported(tmp_path, path, **SAID).read("experts", 0, 11), np.concatenate([first, second]))


def test_the_openai_interface(tmp_path):
    ids = request(6, 3, 2, 8)
    trace = imported(tmp_path, write(tmp_path / "a.json", completion(ids, 4), indent=1), **SAID)
    assert np.array_equal(trace.read("experts", 0, 6), ids) and trace.model == "x/Some-Model"
    assert steps(trace) == [(4, 0), (1, 1), (1, 1)]
    choices = [{"meta_info": generated(request(6, 3, 2, 8, n), 4)["meta_info"]} for n in range(2)]
    trace = imported(tmp_path, write(tmp_path / "b.json", {"choices": choices}), **SAID)
    assert np.array_equal(trace.read("experts", 6, 12), request(6, 3, 2, 8, 1))


def test_the_model_tells_the_layers_and_its_dense_ones_are_dropped(tmp_path):
    ids = request(4, 27, 6, 64, dense=1)
    (tmp_path / "a.b64").write_text(text(ids))
    trace = imported(tmp_path, tmp_path / "a.b64", model="deepseek-v2-lite")
    assert trace.layer_index.tolist() == list(range(1, 27)) and trace.source["dense_layers_dropped"] == [0]
    assert np.array_equal(trace.read("experts", 0, 4), ids[:, 1:]) and trace.source["phase"].startswith("unknown")


def test_the_number_of_layers_follows_from_the_places_of_zeros(tmp_path):
    ids = request(12, 4, 2, 8, dense=1)  # 96 ids: as well 16 tokens of 3 layers, but then zeros are everywhere
    (tmp_path / "a.b64").write_text(text(ids))
    trace = imported(tmp_path, tmp_path / "a.b64", layers=3, **SAID)
    assert np.array_equal(trace.read("experts", 0, 12), ids[:, 1:])


def test_routing_that_begins_later_has_later_positions(tmp_path):
    ids = request(5, 3, 2, 8)
    trace = imported(tmp_path, write(tmp_path / "a.json", generated(ids, 6, start_len=3)), layers=3, **SAID)
    assert trace.read("position", 0, 5).tolist() == [3, 4, 5, 6, 7] and steps(trace) == [(3, 0), (1, 1), (1, 1)]
    assert trace.source["first_position"].startswith("3 to 3")


def test_a_response_that_does_not_fit_is_refused_in_one_sentence(tmp_path):
    ids = request(6, 3, 2, 8)
    path = write(tmp_path / "a.json", generated(ids, 4))
    assert "--experts" in refused(tmp_path, path) and "--top-k" in refused(tmp_path, path, num_experts=8)
    assert "--experts" in refused(tmp_path, path, top_k=2)
    assert "there are 7 experts" in refused(tmp_path, path, top_k=2, num_experts=7)
    assert "does not say of how many layers" in refused(tmp_path, path, top_k=5, num_experts=8)
    (tmp_path / "a.b64").write_text(text(ids))
    assert "--model" in refused(tmp_path, tmp_path / "a.b64", **SAID)
    for meta, message in (
        ({"routed_experts": "AAA="}, "2 bytes, which are no int32"),
        ({"routed_experts": ""}, "0 bytes"),
        ({"routed_experts": "?"}, "no base64"),
        ({"routed_experts": [[[1]]]}, "is a list"),
        ({"prompt_tokens": -1}, "Expected"),
        ({}, "no routed_experts"),
    ):
        other = write(tmp_path / "b.json", {"meta_info": meta})
        assert message in refused(tmp_path, other, format="sglang-request", **SAID)
    both = write(tmp_path / "c.json", generated(ids, 4), generated(request(5, 4, 2, 8), 3))
    assert "no whole number of tokens" in refused(tmp_path, both, **SAID)
    long = write(
        tmp_path / "d.json",
        generated(ids, 4),
        generated(ids, 4) | {"meta_info": {"prompt_tokens": 1, "completion_tokens": 1, "routed_experts": text(ids)}},
    )
    assert "1 tokens of the prompt and 1 of this answer, which allow 1" in refused(tmp_path, long, **SAID)


def test_it_is_seen_from_the_content(tmp_path):
    ids = request(6, 3, 2, 8)
    (tmp_path / "a.b64").write_text(text(ids) + "\n")
    (tmp_path / "b.b64").write_text(text(request(9000, 3, 2, 8)))
    write(tmp_path / "a.json", generated(ids, 4))
    write(tmp_path / "c.json", completion(ids, 4))
    for name in ("a.b64", "b.b64", "a.json", "c.json"):
        assert detect(tmp_path / name) == "sglang-request", name
    for other in (b'{"meta_info": {}}', b"[]", b"", b"plaintext", b"AAAAAAAAAAAAAAAAAAAAAA", b"layer,expert\n1,2\n"):
        assert not sglang_request.recognize(other, "a.json")
