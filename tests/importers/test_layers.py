"""Which layers of a source a trace takes, and which numbers they have in the model; nothing is shifted in silence."""

import json

import numpy as np
import pytest
from support.writers import routing
from support.writers.bigmoeonedge import samples as route_trace
from support.writers.megatron import records
from support.writers.trtllm import counted, save
from support.writers.vllm import request

from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace

FIELDS = {"experts": 8, "top_k": 2, "hidden": 64, "expert_intermediate": 64, "weight_bits": 16, "dense_weight_bits": 16}
FIELDS |= {"dense_params_per_layer": 1000, "once_params": 1000, "kv_bytes_per_token_layer": 64}


def model(folder, layers, **said):
    """A model file of some MoE layers, and what else is `said` of it."""
    path = folder / "m.toml"
    values = {"moe_layers": layers} | FIELDS | said
    path.write_text("\n".join(['name = "m"', *(f"{name} = {value}" for name, value in values.items())]))
    return str(path)


def imported(folder, sources, named=None, **hints):
    notes = []
    folder.mkdir(exist_ok=True)
    import_traces(sources, folder / "out.h5", model=named, hints=Hints(**hints, note=notes.append))
    trace = Trace.open(folder / "out.h5")
    trace.verify()
    return trace, " ".join(notes)


def refused(folder, sources, named=None, **hints):
    out = folder / "refused"
    with pytest.raises(MoetraceError) as raised:
        imported(out, sources, named, **hints)
    assert "\n" not in str(raised.value)
    assert list(out.iterdir()) == []
    return str(raised.value)


def experts(trace):
    return trace.read("experts", 0, trace.rows)


def statistics(folder, layers, mtp_rows=8, raw=False, iterations=4, mtp_iterations=4):
    """TensorRT-LLM's, in which the last layer sees `mtp_rows` tokens in the first `mtp_iterations`; and the ids."""
    pytest.importorskip("safetensors")
    ids = {
        (i, layer): routing(mtp_rows if layer == layers[-1] else 32, 1, 2, 8, 100 * i + layer)[:, 0]
        for i in range(iterations)
        for layer in layers
        if layer != layers[-1] or i < mtp_iterations
    }
    cells = ids if raw else {cell: counted(array, 8) for cell, array in ids.items()}
    return save(folder / "run", 8, 2, [cells], raw=raw), ids


@pytest.mark.parametrize(
    "said",
    [{}, {"mtp_layers": 1}, {"dense_layers": 3}, {"dense_layers": 3, "mtp_layers": 1}],
    ids=["nothing", "mtp", "dense", "both"],
)
@pytest.mark.parametrize("raw", [False, True])
def test_an_mtp_layer_of_statistics_is_left_out_with_a_note(tmp_path, said, raw):
    files, ids = statistics(tmp_path, [3, 4, 5], raw=raw)
    trace, notes = imported(tmp_path, files, model(tmp_path, 2, **said))
    assert trace.layer_index.tolist() == [3, 4]
    assert trace.source["left_out_mtp_layers"] == [5]
    assert "left out layer 5, which is one of multi-token prediction (MTP): say --layers" in notes
    if raw:
        assert np.array_equal(experts(trace)[:32, 1], ids[0, 4])
    else:
        assert trace.read("counts", 0, 4).sum(axis=(0, 2)).tolist() == [256, 256]


def test_mtp_layer_of_fewer_iterations_is_left_out(tmp_path):
    files, _ = statistics(tmp_path, [3, 4, 5], mtp_iterations=2)
    assert imported(tmp_path, files, model(tmp_path, 2))[0].layer_index.tolist() == [3, 4]
    assert "the tensor 2_5 is missing" in refused(tmp_path, files)
    assert imported(tmp_path, files, only_layers=[(3, 5)])[0].layer_index.tolist() == [3, 4]


def test_mtp_layer_stays_if_the_user_takes_it(tmp_path):
    files, _ = statistics(tmp_path, [3, 4, 5])
    trace, notes = imported(tmp_path, files, model(tmp_path, 2, dense_layers=3), only_layers=[(3, None)])
    assert trace.layer_index.tolist() == [3, 4, 5]
    assert "m has 2: a replay needs --set model.moe_layers=3" in notes
    assert imported(tmp_path, files, only_layers=[(5, 6)])[0].layer_index.tolist() == [5]


def test_layer_too_many_is_refused_if_nothing_tells_that_it_is_of_mtp(tmp_path):
    files, _ = statistics(tmp_path, [3, 4, 5], mtp_rows=32)
    says = "has 3 MoE layers of 8 experts, but the model m has 2 of 8: name the right one with --model, or say with "
    assert says + "--layers which of the layers 3 to 5 to take" in refused(tmp_path, files, model(tmp_path, 2))
    assert says in refused(tmp_path, files, model(tmp_path, 2, mtp_layers=0))
    assert says in refused(tmp_path, files, model(tmp_path, 2, dense_layers=4)), "layer 3 would be dense"
    assert imported(tmp_path, files, model(tmp_path, 2, mtp_layers=1))[0].layer_index.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("planes", "said", "numbers", "taken"),
    [
        (3, {"dense_layers": 2}, [2, 3, 4], [0, 1, 2]),  # MoE layers only
        (4, {"dense_layers": 2, "mtp_layers": 1}, [2, 3, 4], [0, 1, 2]),  # these and one of MTP
        (4, {"dense_layers": 1, "mtp_layers": 1}, [1, 2, 3], [0, 1, 2]),  # as many as with the dense one
        (3, {"dense_layers": [0, 2, 4]}, [1, 3, 5], [0, 1, 2]),
        (3, {}, [0, 1, 2], [0, 1, 2]),
        (3, {"dense_layers": 0}, [0, 1, 2], [0, 1, 2]),
        (3, {"dense_layers": [3, 4]}, [0, 1, 2], [0, 1, 2]),
    ],
)
def test_planes_of_moe_layers_get_the_numbers_of_the_model(tmp_path, planes, said, numbers, taken):
    ids = request(9, planes, 2, 8)
    np.save(tmp_path / "a.npy", ids)
    trace, notes = imported(tmp_path, tmp_path / "a.npy", model(tmp_path, 3, **said))
    assert trace.layer_index.tolist() == numbers
    assert np.array_equal(experts(trace), ids[:, taken])
    shifted = numbers != taken
    assert ("layer_numbers" in trace.source) == shifted == ("0 to 2 is layer" in notes)
    assert ("left_out_mtp_layers" in trace.source) == (planes == 4) == ("(MTP)" in notes)


def test_more_layers_of_mtp_than_the_model_has_are_refused(tmp_path):
    files, _ = statistics(tmp_path, [1, 2, 3, 4, 5])
    says = "has 5 MoE layers of 8 experts, but the model m has 3"
    assert says in refused(tmp_path, files, model(tmp_path, 3, dense_layers=1, mtp_layers=1))
    trace, _ = imported(tmp_path, files, model(tmp_path, 3, dense_layers=1, mtp_layers=2))
    assert trace.source["left_out_mtp_layers"] == [4, 5]


@pytest.mark.parametrize("mtp", [0, 1])
@pytest.mark.parametrize("dense", [1, 2])
def test_planes_of_all_layers_lose_the_dense_ones(tmp_path, dense, mtp):
    ids = request(9, 3 + dense + mtp, 2, 8, dense=dense)
    ids[:, dense + 1] = 0  # nobody chose an expert in a layer that has some
    np.save(tmp_path / "a.npy", ids)
    trace, notes = imported(tmp_path, tmp_path / "a.npy", model(tmp_path, 3, dense_layers=dense, mtp_layers=1))
    assert trace.layer_index.tolist() == [dense, dense + 1, dense + 2]
    assert trace.source["dense_layers_dropped"] == list(range(dense))
    assert np.array_equal(experts(trace)[:, [0, 2]], ids[:, [dense, dense + 2]])
    assert (experts(trace)[:, 1] == 255).all()
    assert (trace.source.get("left_out_mtp_layers") == [dense + 3]) == bool(mtp) == ("(MTP)" in notes)


def test_layers_that_count_from_1_are_shifted(tmp_path):
    path = tmp_path / "router_trace_rank0.jsonl"
    path.write_text(records(0, {(0, 0): routing(6, 3, 2, 8)}, [2, 3, 4]))
    trace, notes = imported(tmp_path, path, model(tmp_path, 3, dense_layers=1))
    assert trace.layer_index.tolist() == [1, 2, 3]
    assert trace.source["layer_numbers"] == "2 to 4 in the source, 1 to 3 in the model"
    assert "source layers 2 to 4 is layers 1 to 3 of the model: if they are others, say --first-layer N" in notes
    trace, notes = imported(tmp_path, path, model(tmp_path, 3, dense_layers=1), first_layer=2)
    assert trace.layer_index.tolist() == [2, 3, 4]
    assert "1 layer of the trace (4) would have no experts in m" not in notes
    assert imported(tmp_path, path, model(tmp_path, 3))[0].layer_index.tolist() == [2, 3, 4], "it does not say"


def test_numbers_that_fit_no_model_stay_with_a_note(tmp_path):
    path = tmp_path / "router_trace_rank0.jsonl"
    path.write_text(records(0, {(0, 0): routing(6, 3, 2, 8)}, [0, 1, 4]))
    trace, notes = imported(tmp_path, path, model(tmp_path, 3, dense_layers=2))
    assert trace.layer_index.tolist() == [0, 1, 4]
    assert "2 layers of the trace (0, 1) would have no experts in m, whose MoE layers are 2 to 4" in notes


def test_one_layer_of_a_large_model(tmp_path):
    ids = request(9, 1, 8, 256)
    np.save(tmp_path / "a.npy", ids)
    says = refused(tmp_path, tmp_path / "a.npy", "deepseek-v3")
    assert "has 1 MoE layers of 256 experts, but the model deepseek-v3 has 58 of 256" in says
    trace, notes = imported(tmp_path, tmp_path / "a.npy", "deepseek-v3", first_layer=40)
    assert (trace.layer_index.tolist(), trace.model) == ([40], "deepseek-v3")
    assert np.array_equal(experts(trace), ids)
    assert "has 1 MoE layer, and deepseek-v3 has 58: a replay needs --set model.moe_layers=1" in notes
    assert "source layer 0 is layer 40 of the model" in notes
    trace, notes = imported(tmp_path, tmp_path / "a.npy", "deepseek-v3", only_layers=[(0, 1)])
    assert trace.layer_index.tolist() == [0]
    assert "1 layer of the trace (0) would have no experts in deepseek-v3" in notes
    assert "has 1 MoE layers of 256 experts, but the model mixtral-8x7b has 32 of 8" in refused(
        tmp_path, tmp_path / "a.npy", "mixtral-8x7b", num_experts=256, first_layer=0
    )


def test_part_of_the_planes_of_moe_layers_gets_the_numbers_of_the_model(tmp_path):
    ids = request(9, 4, 2, 8)
    np.save(tmp_path / "a.npy", ids)
    named = model(tmp_path, 4, dense_layers=[0, 2, 4, 6])
    trace, notes = imported(tmp_path, tmp_path / "a.npy", named, only_layers=[(0, 1), (3, 4)])
    assert trace.layer_index.tolist() == [1, 7]
    assert np.array_equal(experts(trace), ids[:, [0, 3]])
    assert trace.source["layers_taken"] == "0, 3 of 0 to 3"
    assert "took layers 0, 3 of 0 to 3" in notes


def test_without_a_model_layers_are_taken_and_numbered_as_said(tmp_path):
    ids = request(9, 6, 2, 8)
    np.save(tmp_path / "a.npy", ids)
    source = tmp_path / "a.npy"
    trace, _ = imported(tmp_path, source, num_experts=8, only_layers=[(3, 6)], first_layer=10)
    assert trace.layer_index.tolist() == [10, 11, 12]
    assert np.array_equal(experts(trace), ids[:, 3:])
    trace, _ = imported(tmp_path, source, num_experts=8, only_layers=[(0, 1), (5, None), (2, 3)])
    assert trace.layer_index.tolist() == [0, 2, 5]
    assert np.array_equal(experts(trace), ids[:, [0, 2, 5]])
    assert "has no layer 6, only 0 to 5" in refused(tmp_path, source, num_experts=8, only_layers=[(5, 6), (6, 7)])
    assert "the layers 4:4 are empty" in refused(tmp_path, source, num_experts=8, only_layers=[(4, 4)])
    says = refused(tmp_path, source, num_experts=8, first_layer=65534)
    assert "the last layer would have the number 65539" in says


def test_gates_residency_and_sizes_go_with_their_layers(tmp_path):
    source = route_trace(tmp_path)[0].files[0]
    whole, _ = imported(tmp_path / "whole", source)
    part, _ = imported(tmp_path / "part", source, only_layers=[(0, 1), (2, 3)])
    for name in ("experts", "gates", "recorded"):
        assert np.array_equal(part.read(name, 0, part.rows), whole.read(name, 0, whole.rows)[:, [0, 2]])
    assert part.expert_bytes is not None
    assert part.expert_bytes.tolist() == [1000, 1002]


def test_sources_that_differ_only_in_left_out_layers_share_a_trace(tmp_path):
    for name, planes in (("a", 3), ("b", 4)):
        arrays = {"expert_ids": routing(5, planes, 2, 8).astype(np.uint8), "layer_index": np.arange(planes)}
        arrays |= {name: np.zeros(5, int) for name in ("request_id", "phase")} | {"position": np.arange(5)}
        np.savez(tmp_path / f"{name}.npz", **arrays, meta=json.dumps({"num_experts": 8}))
    sources = [tmp_path / "a.npz", tmp_path / "b.npz"]
    assert "layer" in refused(tmp_path, sources)
    trace, _ = imported(tmp_path, sources, model(tmp_path, 3, mtp_layers=1))
    assert (trace.rows, trace.layer_index.tolist()) == (10, [0, 1, 2])
