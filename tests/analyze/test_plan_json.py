"""Expert maps of vLLM and vllm-ascend: read as plans, written, and in one sentence if they are none."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

import moetrace as mt
from moetrace.analyze.balance.plan_files import plan_bytes, read_plan
from moetrace.analyze.balance.plans import Plan, Tier, make_plan
from moetrace.exports.planned import PlanChoice
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.plan import load_plan

LAYERS = np.array([1, 2, 4], np.uint16)
ROWS = [[0, 1, 2, 0], [2, 1, 0, 1], [0, 2, 1, 2]]
KEYS = st.sampled_from(["layer_list", "moe_layer_count", "device_list", "device_expert", "physical_to_logical_map"])


def ascend(rows, units=2, **more):
    """A file as vllm-ascend writes it, by plain code."""
    size = len(rows[0]) // units
    layers = []
    for number, row in enumerate(rows):
        devices = [{"device_id": u, "device_expert": row[u * size : (u + 1) * size]} for u in range(units)]
        layers.append({"layer_id": number, "device_count": units, "device_list": devices})
    return {"moe_layer_count": len(rows), "layer_list": layers} | more


def read(folder, content, layers=LAYERS, units=2, model=None, experts=3):
    (folder / "map.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return load_plan(folder / "map.json", layers, experts, units, model).reshape(len(layers), -1).tolist()


def test_a_list_of_lists_is_a_row_for_each_moe_layer(tmp_path):
    assert read(tmp_path, ROWS) == ROWS
    assert read(tmp_path, f"\n [ {json.dumps(ROWS)[1:]}") == ROWS


def test_a_flat_list_is_for_all_layers(tmp_path):
    assert read(tmp_path, ROWS[0]) == [ROWS[0]] * 3
    assert read(tmp_path, list(range(8)) + [0] * 8, units=4, experts=8) == [[*range(8), *[0] * 8]] * 3


def test_a_plan_of_vllm_ascend_is_read(tmp_path):
    assert read(tmp_path, ascend(ROWS)) == ROWS
    bare = ascend(ROWS)
    for layer in bare["layer_list"]:
        del layer["layer_id"], layer["device_count"]
        for device in layer["device_list"]:
            del device["device_id"]
    assert read(tmp_path, bare | {"version": 1}) == ROWS, "place decides"


@pytest.mark.parametrize("form", [list, ascend])
def test_a_map_of_more_layers_needs_a_model(tmp_path, form):
    rows = [*ROWS, [1, 2, 0, 0]]
    model = replace(mt.load_model("mixtral-8x7b"), moe_layers=4, experts=3, dense_layers=[0, 3], mtp_layers=1)
    some = np.array([2, 5])
    with pytest.raises(MoetraceError, match="a row for each of 4 MoE layers, but the trace has 2, and no model says"):
        read(tmp_path, form(rows), some)
    assert read(tmp_path, form(rows), some, model=model) == [rows[1], rows[3]]
    assert read(tmp_path, form([*rows, ROWS[0]]), some, model=model) == [rows[1], rows[3]], "and a layer of MTP"
    for wrong in (rows[:3], [*rows, *ROWS]):
        with pytest.raises(MoetraceError, match="no model says which"):
            read(tmp_path, form(wrong), some, model=model)
    with pytest.raises(MoetraceError, match="no model says which"):
        read(tmp_path, form(rows), np.array([0, 5]), model=model)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "is a plan without slots"),
        ([[]], "a row for each of 1 MoE layers"),
        ([[], [], []], "is a plan without slots"),
        ([[0, 1, 2, 0], 1, 2], "is no plan of SGLang's, vLLM's or vllm-ascend's: Expected `array`"),
        ([0, 1, [2]], "Expected `int`"),
        ([0, 1, 2, -1], "is no plan of SGLang's, vLLM's or vllm-ascend's"),
        ([0, 1, 2, 70000], "is no plan of SGLang's, vLLM's or vllm-ascend's"),
        ([0, 1, 1, 0], "layer 1 has no slot for expert 2"),
        ([0, 1, 2, 3], "layer 1 has expert 3, but the trace has 3"),
        ("[" * 100_000, "is no plan of"),
        ({"layer_list": []}, "missing required field `moe_layer_count`"),
        (ascend(ROWS, moe_layer_count=2), "moe_layer_count is 2, but there are 3"),
        ({"moe_layer_count": 0, "layer_list": []}, "a row for each of 0 MoE layers"),
        (ascend(ROWS, layer_list=ascend(ROWS)["layer_list"][::-1]), "entry 0 of layer_list must have layer_id 0"),
        ({"moe_layer_count": 3, "layer_list": [{"device_list": 5}] * 3}, "Expected `array`"),
    ],
)
def test_a_file_that_is_no_map_is_refused_in_one_sentence(tmp_path, content, sentence):
    with pytest.raises(MoetraceError) as error:
        read(tmp_path, content)
    assert sentence in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_units_of_vllm_ascend(tmp_path):
    with pytest.raises(UsageError, match="is a plan for 2 units, not 4: set the units to 2"):
        read(tmp_path, ascend(ROWS), units=4)
    odd = ascend(ROWS)
    odd["layer_list"][1]["device_list"][0]["device_expert"].append(2)
    with pytest.raises(MoetraceError, match="units of layer 1 have from 2 to 3 slots"):
        read(tmp_path, odd)
    odd = ascend(ROWS)
    odd["layer_list"][2]["device_count"] = 3
    with pytest.raises(MoetraceError, match="device_count of layer 2 is not the number of its devices"):
        read(tmp_path, odd)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), units=st.integers(1, 4), form=st.sampled_from(["vLLM", "vllm-ascend"]))
def test_round_trip(tmp_path_factory, seed, units, form):
    path = tmp_path_factory.getbasetemp() / "map.json"
    loads = np.random.default_rng(seed).integers(0, 50, (3, 5))
    plan = make_plan("eplb", Tier(units), loads.shape, loads)
    path.write_bytes(plan_bytes(plan, LAYERS, 5, form))
    found = read_plan(path, LAYERS, 5, units)
    assert np.array_equal(found.expert_of_slot, plan.expert_of_slot)
    assert plan_bytes(found, LAYERS, 5, form) == path.read_bytes()
    if form == "vllm-ascend":
        rows = plan.expert_of_slot.reshape(3, -1).tolist()
        assert json.loads(path.read_bytes()) == ascend(rows, units)


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x) | st.dictionaries(KEYS, x)))
def test_any_json_is_a_plan_or_a_sentence(tmp_path_factory, content):
    try:
        read(tmp_path_factory.getbasetemp(), content)
    except MoetraceError as error:
        assert "\n" not in str(error)


def test_maps_of_a_trace(tmp_path):
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((60, 3, 8)))[..., :2].astype(np.uint8)
    trace = mt.Trace.from_arrays(ids, num_experts=8, layer_index=LAYERS)
    loads = np.stack([np.bincount(ids[:, layer].ravel(), minlength=8) for layer in range(3)])
    wanted = make_plan("eplb", Tier(4, 4), loads.shape, loads)
    mt.export(trace, tmp_path / "a.json", to="vllm-map", choice=PlanChoice(4, 4))
    assert json.loads((tmp_path / "a.json").read_text()) == wanted.expert_of_slot.reshape(3, -1).tolist()
    mt.export(trace, tmp_path / "b.json", to="vllm-ascend-map", choice=PlanChoice(4, plan=tmp_path / "a.json"))
    assert read_plan(tmp_path / "b.json", LAYERS, 8, 4).expert_of_slot.tolist() == wanted.expert_of_slot.tolist()
    for form, choice, sentence in (
        ("vllm-map", None, "vllm-map holds a plan for units: give --units N"),
        ("npz", PlanChoice(4), "npz holds no plan for units: give no --units"),
        ("vllm-map", PlanChoice(4, 2, tmp_path / "a.json"), "--plan FILE is the plan itself"),
        ("vllm-map", PlanChoice(5, plan=tmp_path / "a.json"), "which 5 units cannot share"),
    ):
        with pytest.raises(UsageError, match=sentence):
            mt.export(trace, tmp_path / "c.json", to=form, choice=choice)
    with pytest.raises(UsageError, match="is also an input"):
        mt.export(trace, tmp_path / "a.json", to="vllm-map", choice=PlanChoice(4, plan=tmp_path / "a.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_a_plan_without_slots_to_share_is_not_written():
    with pytest.raises(UsageError, match="splits experts"):
        plan_bytes(Plan(2, np.zeros((1, 2, 2), np.int32)), LAYERS[:1], 2, "vLLM")
