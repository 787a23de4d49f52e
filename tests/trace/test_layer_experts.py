"""Layers with a number of experts of their own: no figure counts an expert that a layer lacks."""

import json

import h5py
import numpy as np
import pytest

from moetrace.analyze.cache.hit_curve import lru_curve
from moetrace.analyze.locality.measure import locality
from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
from moetrace.lints import lint
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace
from moetrace.trace.rebatch import rebatch
from moetrace.trace.select import select

EXPERTS, TOP_K = [8, 16, 8], [1, 2, 1]
FIELDS = "hidden = 64\nexpert_intermediate = 64\nweight_bits = 16\ndense_weight_bits = 16\n"
FIELDS += "dense_params_per_layer = 1000\nonce_params = 1000\nkv_bytes_per_token_layer = 64\n"


def ids_of(experts=EXPERTS, rows=400, seed=1):
    rng = np.random.default_rng(seed)
    ids = np.full((rows, len(experts), 2), -1, np.int16)
    for layer, (own, k) in enumerate(zip(experts, TOP_K, strict=True)):
        ids[:, layer, :k] = np.argsort(rng.random((rows, own)))[:, :k]
    return ids


def trace_of(ids=None, experts=EXPERTS, **more):
    ids = ids_of() if ids is None else ids
    request = np.repeat(np.arange(4), len(ids) // 4)
    ids = np.where(ids < 0, 255, ids).astype(np.uint8)
    return Trace.from_arrays(ids, num_experts=16, layer_experts=experts, request=request, **more)


def archive(folder, ids):
    rows = len(ids)
    arrays = {"position": np.tile(np.arange(rows // 4), 4), "request_id": np.repeat(np.arange(4), rows // 4)}
    arrays |= {"expert_ids": ids, "phase": np.zeros(rows, int), "layer_index": np.arange(3)}
    np.savez(folder / "t.npz", **arrays, meta=json.dumps({"num_experts": 16}))
    return folder / "t.npz"


def model(folder, experts, more=""):
    text = f'name = "m"\nmoe_layers = {len(experts)}\nexperts = {experts}\ntop_k = {TOP_K}\n{more}\n{FIELDS}'
    (folder / "m.toml").write_text(text)
    return str(folder / "m.toml")


def test_import_takes_them_from_the_model_and_missing_experts_are_not_dead(tmp_path):
    ids = ids_of()
    import_traces(archive(tmp_path, ids), tmp_path / "t.h5", model=model(tmp_path, EXPERTS))
    with Trace.open(tmp_path / "t.h5") as trace:
        trace.verify()
        assert trace.layer_experts is not None
        assert trace.layer_experts.tolist() == EXPERTS
        found = locality(trace)
    assert found.layers["dead"].to_list() == [0, 0, 0]
    chosen = [np.bincount(ids[:, layer][ids[:, layer] >= 0], minlength=own) for layer, own in enumerate(EXPERTS)]
    most = [count.max() * count.size / count.sum() for count in chosen]
    assert found.layers["max_over_mean"].to_list() == pytest.approx(most)
    assert found.layers["max_over_mean"][0] == pytest.approx(1.14)
    assert found.load.group_by("layer", maintain_order=True).len()["len"].to_list() == EXPERTS
    for layer, count in enumerate(chosen):
        load = found.load.filter(found.load["layer"] == layer)
        assert (load["prefill"] + load["decode"]).to_list() == count.tolist()


def test_figures_are_those_of_a_trace_of_that_layer_only():
    whole = locality(trace_of())
    alone = Trace.from_arrays(ids_of()[:, :1, :1].astype(np.uint8), num_experts=8, request=np.repeat(np.arange(4), 100))
    single = locality(alone)
    for name in ("zipf", "gini", "top10_share", "max_over_mean", "dead", "lru_e8", "lru_e4"):
        assert whole.layers[name][0] == pytest.approx(single.layers[name][0]), name
    both = whole.hit_curve.filter(whole.hit_curve["layer"] == 0), single.hit_curve
    assert both[0]["hit_rate"].to_list() == pytest.approx(both[1]["hit_rate"].to_list())


def test_a_part_of_the_layers_keeps_its_numbers(tmp_path):
    named = model(tmp_path, EXPERTS, "dense_layers = 2")
    for wish, experts in (([(1, 2)], [16]), ([(0, 2)], [8, 16]), ([(2, None)], [8])):
        import_traces(archive(tmp_path, ids_of()), tmp_path / "t.h5", model=named, hints=Hints(only_layers=wish))
        with Trace.open(tmp_path / "t.h5") as trace:
            assert trace.layer_experts is not None
            assert trace.layer_experts.tolist() == experts
            assert trace.layer_index[0] == wish[0][0] + 2


def test_copies_keep_them(tmp_path):
    trace_of().write(tmp_path / "a.h5", compress="zstd")
    select(tmp_path / "a.h5", tmp_path / "b.h5", layers=[(1, None)])
    rebatch(tmp_path / "a.h5", tmp_path / "c.h5", batch=2)
    for name, experts in (("a", EXPERTS), ("b", EXPERTS[1:]), ("c", EXPERTS)):
        with Trace.open(tmp_path / f"{name}.h5") as trace:
            trace.verify()
            assert trace.layer_experts is not None
            assert trace.layer_experts.tolist() == experts
    assert Trace.from_arrays(np.zeros((1, 1, 1), np.uint8), num_experts=4).layer_experts is None


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        ([8, 17, 8], r"/layers/experts of layer entry 1 is 17, but must be 1 to num_experts \(16\)"),
        ([0, 16, 8], "/layers/experts of layer entry 0 is 0"),
        ([8, 16], "experts"),
        ([8, -1, 8], "numbers from -1"),
    ],
)
def test_impossible_numbers_are_refused(tmp_path, experts, says):
    with pytest.raises(MoetraceError, match=says):
        trace_of(experts=experts)
    trace_of().write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as raw:
        del raw["/layers/experts"]
        raw["/layers/experts"] = np.array(experts).astype("<u2" if min(experts) >= 0 else "<i4")
    with pytest.raises(MoetraceError):
        Trace.open(tmp_path / "a.h5")


def test_an_expert_that_its_layer_lacks_is_refused(tmp_path):
    ids = ids_of()
    ids[7, 2, 0] = 9
    trace = trace_of(ids)
    for check in (trace.verify, lambda: trace.write(tmp_path / "a.h5"), lambda: locality(trace)):
        with pytest.raises(MoetraceError, match=r"that layer has 8 experts|from 8 on in layer entry 2, which has 8"):
            check()
    with pytest.raises(MoetraceError, match="holds the id 9, but that layer has 8 experts"):
        import_traces(archive(tmp_path, ids), tmp_path / "t.h5", model=model(tmp_path, EXPERTS))
    assert not (tmp_path / "t.h5").exists()


def test_lint_takes_layers_as_they_are():
    """A layer whose cells always lack one id chooses fewer experts; random draws are judged by its own numbers."""
    rows = 4000
    found = {one.code: one for one in lint(trace_of(ids_of(rows=rows)))}
    assert "partial-cells" not in found and "unused-slots" not in found
    assert found["random-routing"].layers == [0, 1, 2]
    without = Trace.from_arrays(
        np.where(ids_of(rows=rows) < 0, 255, ids_of(rows=rows)).astype(np.uint8), num_experts=16
    )
    assert "random-routing" not in {one.code for one in lint(without)}
    dropped = ids_of(rows=rows)
    dropped[7, 1, 1] = -1
    one = {one.code: one for one in lint(trace_of(dropped))}["partial-cells"]
    assert one.count == 1 and one.layers == [1]
    dropped[9, 0, 0] = 12
    one = {one.code: one for one in lint(trace_of(dropped))}["impossible-id"]
    assert (one.count, one.layers, one.rows) == (1, [0], [(9, 10)])
    assert one.what == "Ids beyond the layer's own experts stand in 1 cell."


def test_a_cache_of_all_experts_is_of_those_that_there_are():
    curve = lru_curve(trace_of())
    assert curve["capacity_experts"].max() == sum(EXPERTS)
    assert lru_curve(trace_of(), scope="layer")["capacity_experts"].max() == 3 * max(EXPERTS)
