"""A plan of more layers than the trace has: they are the right ones, or one sentence says that nobody can know."""

import json

import numpy as np
import pytest
from msgspec import UNSET
from msgspec.structs import replace

import moetrace as mt
from moetrace.spec.errors import MoetraceError
from moetrace.spec.plan import load_plan

GOOD, PLAIN = [0, 2, 1, 3], [0, 1, 2, 3]


def sglang(folder, rows):
    (folder / "plan.json").write_text(json.dumps({"physical_to_logical_map": rows}))
    return folder / "plan.json"


def trtllm(folder, rows):
    text = "".join(f"  {layer}: {row}\n" for layer, row in rows.items())
    (folder / "plan.yaml").write_text(f"num_slots: 4\nlayer_updates_per_iter: 0\ninitial_global_assignments:\n{text}")
    return folder / "plan.yaml"


def model(layers, **said):
    return replace(mt.load_model("mixtral-8x7b"), moe_layers=layers, experts=4, **said)


def rows_of(path, layers, known=None):
    return load_plan(path, np.array(layers), 4, 2, known).reshape(len(layers), -1).tolist()


def refused(path, layers, known=None):
    with pytest.raises(MoetraceError) as raised:
        rows_of(path, layers, known)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_rows_of_dense_layers_are_not_taken_for_moe_layers(tmp_path):
    path = sglang(tmp_path, [PLAIN] * 3 + [GOOD] * 2)
    says = "has 5 layers (0 to 4), but the trace has 2 (0 to 1), and nothing says which of them these are: name the "
    assert says + "model with --model, number the trace as the plan" in refused(path, [0, 1])
    assert "and nothing says" in refused(path, [1, 2]), "counted from 1"
    assert rows_of(path, [3, 4]) == [GOOD] * 2
    assert rows_of(path, [1, 4]) == [PLAIN, GOOD], "the other layers are dense, since the trace ends with the plan"
    assert rows_of(sglang(tmp_path, [GOOD] * 2), [0, 1]) == [GOOD] * 2
    assert rows_of(sglang(tmp_path, [GOOD] * 2), [3, 4]) == [GOOD] * 2, "a row for each MoE layer"


def test_a_model_tells_which_rows_are_meant(tmp_path):
    path, known = sglang(tmp_path, [PLAIN] * 3 + [GOOD] * 2), model(2, dense_layers=3, mtp_layers=1)
    assert rows_of(path, [3, 4], known) == [GOOD] * 2
    assert rows_of(path, [4], known) == [GOOD], "of a trace with one layer of the model"
    assert "and mixtral-8x7b has MoE layers from 3 to 4: number the trace" in refused(path, [0, 1], known)
    assert rows_of(sglang(tmp_path, [PLAIN] * 3 + [GOOD] * 3), [3, 4], known) == [GOOD] * 2, "and one of MTP"
    assert "has 7 layers (0 to 6)" in refused(sglang(tmp_path, [GOOD] * 7), [3, 4], known)
    assert rows_of(sglang(tmp_path, [GOOD] * 7), [3, 4], replace(known, mtp_layers=4)) == [GOOD] * 2
    path = sglang(tmp_path, [PLAIN] * 3 + [GOOD] * 2)
    every = model(5, dense_layers=0)
    assert rows_of(path, [0, 1], every) == [PLAIN] * 2, "a part of a model whose layers all have experts"
    odd = model(2, dense_layers=[0, 2, 4])
    assert rows_of(path, [1, 3], odd) == [PLAIN, GOOD]
    assert "and nothing says" in refused(path, [0, 1], model(2, dense_layers=UNSET)), "a model that does not say"
    assert "number the trace" in refused(path, [0, 1], model(2, dense_layers=0)), "of another model"


def test_layers_of_a_yaml_have_numbers(tmp_path):
    mtp = trtllm(tmp_path, {3: GOOD, 4: PLAIN, 5: GOOD})
    assert rows_of(mtp, [3, 4]) == [GOOD, PLAIN]
    assert rows_of(mtp, [3, 4], model(2, dense_layers=3, mtp_layers=1)) == [GOOD, PLAIN]
    assert "has 3 layers (3 to 5)" in refused(mtp, [3, 4], model(2, dense_layers=3, mtp_layers=0))
    assert "has no layer 0" in refused(mtp, [0, 1])
    whole = trtllm(tmp_path, dict(enumerate([PLAIN] * 3 + [GOOD] * 2)))
    assert "has 5 layers (0 to 4), but the trace has 2 (0 to 1)" in refused(whole, [0, 1])
    assert rows_of(whole, [3, 4]) == [GOOD] * 2
