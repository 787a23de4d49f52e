"""vLLM's routed experts by request: files and responses come out exactly, and damage is one sentence."""

import json

import numpy as np
import pytest
from support.writers import imported, refused, steps
from support.writers.vllm import npy_base64, request, response, response_0_21

from moetrace.importers import vllm
from moetrace.importers.captured import Hints
from moetrace.importers.formats import detect
from moetrace.importers.importing import import_traces


def save(path, ids):
    np.save(path, ids)
    return path


def test_files_are_requests_in_natural_order(tmp_path):
    ten, two = request(5, 3, 2, 8, 1), request(6, 3, 2, 8, 2)
    sources = save(tmp_path / "r10.npy", ten), save(tmp_path / "r2.npy", two)
    trace = imported(tmp_path, *sources, num_experts=8)
    assert np.array_equal(trace.read("experts", 0, 11), np.concatenate([two, ten]))
    assert trace.read("request", 0, 11).tolist() == [0] * 6 + [1] * 5
    assert trace.read("position", 0, 11).tolist() == [*range(6), *range(5)]
    assert steps(trace) == [(6, 0), (5, 0)] and trace.source["phase"].startswith("unknown")
    assert steps(imported(tmp_path, *sources, num_experts=8, decode_after=5)) == [(5, 0), (1, 1), (5, 0)]


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<i2", "<i4", ">i4", "<i8"])
def test_every_width_of_ids(tmp_path, dtype):
    ids = request(6, 3, 2, 100).astype(dtype)
    assert np.array_equal(imported(tmp_path, save(tmp_path / "a.npy", ids), num_experts=100).read("experts", 0, 6), ids)


def test_255_is_an_id_of_256_experts(tmp_path):
    ids = np.arange(256, dtype=np.uint8).reshape(16, 2, 8)
    found = imported(tmp_path, save(tmp_path / "a.npy", ids), num_experts=256).read("experts", 0, 16)
    assert np.array_equal(found, ids) and found.dtype == np.uint16


def test_planes_of_zeros_are_absent_and_minus_one_too(tmp_path):
    ids = request(6, 4, 2, 8, dense=1).astype(np.int16)
    ids[3, 2] = -1
    trace = imported(tmp_path, save(tmp_path / "a.npy", ids), num_experts=8)
    assert trace.layer_index.tolist() == [0, 1, 2, 3], "kept, as nobody knows that the layer is dense"
    found = trace.read("experts", 0, 6)
    assert (found[:, 0] == 255).all() and (found[3, 2] == 255).all()
    found[3, 2] = ids[3, 2] = 0
    assert np.array_equal(found[:, 1:], ids[:, 1:])


@pytest.mark.parametrize("top_k", [1, 2])
def test_dense_planes_are_dropped_if_the_model_then_fits(tmp_path, top_k):
    ids = request(40, 5, top_k, 8, dense=2)
    trace = imported(tmp_path, save(tmp_path / "a.npy", ids), num_experts=8, layers=3)
    assert trace.layer_index.tolist() == [2, 3, 4] and trace.source["dense_layers_dropped"] == [0, 1]
    assert np.array_equal(trace.read("experts", 0, 40), ids[:, 2:])
    trace = imported(tmp_path, tmp_path / "a.npy", num_experts=8, layers=4)
    assert trace.layers == 5 and "dense_layers_dropped" not in trace.source


def test_a_model_tells_experts_and_dense_layers(tmp_path):
    ids = request(4, 27, 6, 64, dense=1)
    trace = imported(tmp_path, save(tmp_path / "a.npy", ids), model="deepseek-v2-lite")
    assert trace.model == "deepseek-v2-lite" and trace.layer_index.tolist() == list(range(1, 27))


def test_responses_tell_the_prompt(tmp_path):
    first, second, third = (request(rows, 3, 2, 8, rows) for rows in (6, 5, 4))
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps(response([first, second], 4)) + "\n\n" + json.dumps(response([third], 4)))
    trace = imported(tmp_path, lines, num_experts=8)
    assert np.array_equal(trace.read("experts", 0, 15), np.concatenate([first, second, third]))
    assert steps(trace) == [(4, 0), (1, 1), (1, 1), (4, 0), (1, 1), (4, 0)] and "phase" not in trace.source
    assert trace.model == "x/Some-Model" and trace.read("request", 0, 15).tolist() == [0] * 6 + [1] * 5 + [2] * 4


@pytest.mark.parametrize("encode", [np.ndarray.tolist, npy_base64])
@pytest.mark.parametrize("indent", [None, 2])
def test_prompt_and_output_parts_of_0_21(tmp_path, encode, indent):
    ids = request(6, 3, 2, 8).astype(np.int16)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(response_0_21(ids[:4], [ids[4:], ids[5:]], encode), indent=indent))
    trace = imported(tmp_path, path, num_experts=8)
    assert np.array_equal(trace.read("experts", 0, 11), np.concatenate([ids, ids[:4], ids[5:]]))
    assert steps(trace) == [(4, 0), (1, 1), (1, 1), (4, 0), (1, 1)]


def test_a_single_base64_text_and_files_of_both_kinds(tmp_path):
    ids = request(6, 3, 2, 8)
    (tmp_path / "a.b64").write_text(npy_base64(ids) + "\n")
    sources = [tmp_path / "a.b64", save(tmp_path / "b.npy", ids)]
    assert np.array_equal(imported(tmp_path, *sources, num_experts=8).read("experts", 0, 12), np.concatenate([ids] * 2))


def test_large_arrays_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrace.importers.reading.request_spool.BLOCK_BYTES", 64)
    ids = request(50, 3, 2, 8)
    assert np.array_equal(imported(tmp_path, save(tmp_path / "a.npy", ids), num_experts=8).read("experts", 0, 50), ids)


def test_arrays_that_are_refused(tmp_path):
    ids = request(6, 3, 2, 8)
    path = tmp_path / "a.npy"
    for array, message in (
        (np.asfortranarray(ids), "Fortran order"),
        (ids.astype(float), "not integers"),
        (ids[0], "not integers [tokens, layers, top_k]"),
        (ids[:0], "is empty"),
        (np.array([[["a"]]], object), "Python objects"),
        (ids + np.uint8(7), "but there are 8 experts"),
        (np.full((2, 2, 2), -2), "token 0, layer 0 holds the id -2"),
        (np.zeros((2, 2, 2), np.uint8), "every id is 0 or -1"),
    ):
        np.save(path, array, allow_pickle=True)
        assert message in refused(tmp_path, path, num_experts=8, format="vllm")
    assert "--experts" in refused(tmp_path, save(path, ids))
    assert "2 experts a token, but --top-k says 3" in refused(tmp_path, path, num_experts=8, top_k=3)
    assert "more than once" in refused(tmp_path, save(path, np.full((1, 1, 2), 3)), num_experts=8)
    header = path.read_bytes().replace(b"(1, 1, 2)", b"(9999999999999, 1, 2)"[:9] + b")")
    path.write_bytes(header)
    assert refused(tmp_path, path, num_experts=8, format="vllm")
    assert "the earlier ones have (3, 2)" in refused(
        tmp_path, save(path, ids), save(tmp_path / "b.npy", request(6, 4, 2, 8)), num_experts=8
    )


def test_a_size_that_is_not_there_is_not_believed(tmp_path):
    path = save(tmp_path / "a.npy", request(6, 3, 2, 8))
    path.write_bytes(path.read_bytes().replace(b"(6, 3, 2), }" + b" " * 12, b"(666666666666, 3, 2), } "))
    assert "its size differs" in refused(tmp_path, path, num_experts=8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"choices": []}, "no choices"),
        ({"choices": [{"routed_experts": None}]}, "no routed_experts"),
        ({"choices": [{"routed_experts": "k05V!"}]}, "no base64"),
        ({"choices": [{"routed_experts": "AAAA"}]}, "no NumPy array"),
        ({"choices": [{"routed_experts": [[[1, 2]], [[1]]]}]}, "no array of one shape"),
        ({"choices": [{"routed_experts": [[[1, 2]]], "prompt_routed_experts": [[[1]]]}]}, "the prompt's routing"),
        ({"choices": [{"routed_experts": [[["1"]]]}]}, "Expected"),
        ({"choices": 3}, "Expected"),
    ],
)
def test_responses_that_are_refused(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert message in refused(tmp_path, path, num_experts=8, format="vllm")
    path.write_text(json.dumps(content, indent=1))
    assert message in refused(tmp_path, path, num_experts=8, format="vllm")


def test_it_is_seen_from_the_content(tmp_path):
    ids = request(6, 3, 2, 8)
    (tmp_path / "a.json").write_text(json.dumps(response([ids], 4)))
    (tmp_path / "b.json").write_text(json.dumps(response_0_21(ids[:4], [ids[4:]])))
    for path in (save(tmp_path / "a.npy", ids), tmp_path / "a.json", tmp_path / "b.json"):
        assert detect(path) == "vllm"
    for other in (b'{"choices": []}', b'{"a": "routed_experts"}', b"[1]", b"{", b"", b"layer,expert\n1,2\n"):
        assert not vllm.recognize(other, "a.json")
    np.save(tmp_path / "c.npy", np.zeros((3, 4)))
    assert not vllm.recognize((tmp_path / "c.npy").read_bytes(), "c.npy")


def test_an_array_of_more_layers_than_tokens_is_asked_about(tmp_path):
    ids = request(20, 3, 2, 8)
    for array, asked in ((ids, 0), (ids.transpose(1, 0, 2), 1)):
        notes = []
        np.save(tmp_path / "a.npy", array)
        import_traces(tmp_path / "a.npy", tmp_path / "o.h5", hints=Hints(num_experts=8, note=notes.append))
        assert sum("transpose the array to [tokens, layers, top_k]" in note for note in notes) == asked
