"""Importance matrices of llama.cpp: the counts of experts, by layer; what has none is refused in one sentence."""

import warnings

import numpy as np
import pytest
from support.writers import steps
from support.writers.check import imported, refused
from support.writers.imatrix import imatrix, older, tensors_of

from moetrace.importers.sglang_dumps import whole
from moetrace.spec.errors import MoetraceError

COUNTS = {layer: np.random.default_rng(layer).integers(0, 90, 8) for layer in (10, 2, 5)}


@pytest.mark.parametrize("version", [2, 3])
def test_counts_come_back_by_layer(tmp_path, version):
    trace = imported(imatrix(tmp_path / "a.gguf", tensors_of(COUNTS), version=version), "imatrix", top_k=2)
    expected = np.stack([COUNTS[layer] for layer in (2, 5, 10)])
    assert np.array_equal(trace.read("counts", 0, 9), expected[None]) and trace.layer_index.tolist() == [2, 5, 10]
    rows = max(*(-(-sum(own) // 2) for own in expected.tolist()), expected.max())
    assert steps(trace) == [(rows, 0)]
    assert (trace.source["chunk_count"], trace.source["chunk_size"]) == (7, 512)


@pytest.mark.parametrize("matrices", [("gate_up", "down"), ("up",), ("down", "up")])
def test_any_of_the_matrices_of_experts_will_do(tmp_path, matrices):
    tensors = {f"blk.1.ffn_{name}_exps.weight.counts": np.array([[3], [4], [1]]) for name in matrices}
    trace = imported(imatrix(tmp_path / "a.gguf", tensors), "imatrix", top_k=1)
    assert trace.read("counts", 0, 1).tolist() == [[[3, 4, 1]]] and "matrices_that_count_otherwise" not in trace.source


def test_a_note_names_matrices_of_a_layer_with_other_counts(tmp_path):
    tensors = tensors_of(COUNTS)
    tensors["blk.2.ffn_down_exps.weight.counts"] = tensors["blk.2.ffn_down_exps.weight.counts"] + 1
    trace = imported(imatrix(tmp_path / "a.gguf", tensors), "imatrix", top_k=2)
    assert trace.source["matrices_that_count_otherwise"] == 1
    assert np.array_equal(trace.read("counts", 0, 1)[0, 0], COUNTS[2])


def test_a_file_without_counts_of_experts_is_refused_in_one_sentence(tmp_path):
    name = "blk.1.ffn_up_exps.weight.counts"
    for tensors, sentence in (
        ({"blk.1.ffn_up.weight.counts": np.array([[9]])}, "has no counts of stacked experts"),
        ({name: np.array([[9]])}, "counts the calls of all experts together, as converted older files do"),
        ({name: np.array([[0], [0]])}, "counts nothing"),
        ({name: np.array([[1.5], [0]])}, "holds numbers that are not whole"),
        ({name: np.array([[-1], [1]])}, "holds an impossible count, -1"),
        ({name: np.array([[1, 2]])}, r"is F32 \(2, 1\), not F32 \(1, experts\)"),
        ({name: np.ones((70000, 1))}, r"is F32 \(1, 70000\)"),
        ({"blk.70000.ffn_up_exps.weight.counts": np.ones((2, 1))}, "layers up to 70000"),
        (
            {name: np.ones((2, 1)), "blk.2.ffn_up_exps.weight.counts": np.ones((3, 1))},
            "layers up to 2 count 2 to 3 experts",
        ),
    ):
        refused(imatrix(tmp_path / "a.gguf", tensors), sentence, "imatrix", top_k=1)
    refused(imatrix(tmp_path / "a.gguf", {name: np.ones((2, 1))}, kind=1), "is F16", "imatrix", top_k=1)
    refused(older(tmp_path / "imatrix.dat"), "older form, which has no counts of experts: make it again", "imatrix")


def test_a_file_that_was_cut_is_refused(tmp_path):
    path = imatrix(tmp_path / "a.gguf", tensors_of(COUNTS))
    path.write_bytes(path.read_bytes()[:-40])
    refused(path, "it is truncated", "imatrix", top_k=1)


@pytest.mark.parametrize("bits", [0x7FA00000, 0x7FC00000, 0x7F800000, 0x3F000000])
def test_counts_of_any_bits_are_refused_without_a_warning(bits):
    counts = np.full((1, 2, 3), bits, np.uint32).view(np.float32)  # signalling and quiet NaN, infinity, a half
    with warnings.catch_warnings(action="error"), pytest.raises(MoetraceError, match="not whole"):
        whole("here", counts)
