"""Which number each MoE layer has among all layers of a model."""

import json

import msgspec
import numpy as np
import pytest

from moetrace.spec import Model, load_model
from moetrace.spec.errors import UsageError

SMALL = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 100}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6, "num_experts_per_tok": 2}


def of_config(folder, config):
    path = folder / "config.json"
    path.write_text(json.dumps(SMALL | config))
    return load_model(path)


@pytest.mark.parametrize(
    ("config", "numbers", "dense", "mtp"),
    [
        ({"model_type": "glm4_moe", "n_routed_experts": 8, "first_k_dense_replace": 2}, [2, 3, 4, 5], 2, None),
        (
            {"model_type": "glm4_moe", "n_routed_experts": 8, "first_k_dense_replace": 1}
            | {"num_nextn_predict_layers": 1},
            [1, 2, 3, 4, 5],
            1,
            1,
        ),
        ({"model_type": "qwen3_moe", "num_experts": 8, "decoder_sparse_step": 2}, [1, 3, 5], [0, 2, 4], None),
        ({"model_type": "qwen3_moe", "num_experts": 8, "mlp_only_layers": [0, 3]}, [1, 2, 4, 5], [0, 3], None),
        ({"model_type": "qwen3_moe", "num_experts": 8, "mlp_only_layers": [1, 0]}, [2, 3, 4, 5], 2, None),
        ({"model_type": "minimax_m2", "num_local_experts": 8, "num_mtp_modules": 3}, [0, 1, 2, 3, 4, 5], 0, 3),
        ({"model_type": "ernie4_5_moe", "moe_num_experts": 8}, [1, 2, 3, 4, 5], 1, None),
    ],
)
def test_config_says_which_layers_have_experts(tmp_path, config, numbers, dense, mtp):
    model = of_config(tmp_path, config)
    assert model.layer_index is not None
    assert model.layer_index.tolist() == numbers
    assert (model.dense_layers, model.all_layers) == (dense, 6)
    assert (None if model.mtp_layers is msgspec.UNSET else model.mtp_layers) == mtp


@pytest.mark.parametrize(
    ("name", "first", "layers", "mtp"),
    [
        ("deepseek-v3", 3, 61, 1),
        ("glm-4.5", 3, 92, 1),
        ("glm-4.5-air", 1, 46, 1),
        ("qwen3-next-80b-a3b", 0, 48, 1),
        ("qwen3-30b-a3b", 0, 48, None),
        ("kimi-k2", 1, 61, 0),
        ("llama-4-maverick", 1, 48, None),
        ("nemotron-3-nano-30b-a3b", 1, 52, None),
    ],
)
def test_presets_know_their_layers(name, first, layers, mtp):
    model = load_model(name)
    assert model.layer_index is not None
    assert (int(model.layer_index[0]), model.all_layers) == (first, layers)
    assert model.layer_index.size == model.moe_layers
    assert (None if model.mtp_layers is msgspec.UNSET else model.mtp_layers) == mtp


def test_a_model_that_does_not_say_has_no_numbers():
    plain = msgspec.structs.replace(load_model("deepseek-v3"), dense_layers=msgspec.UNSET)
    assert plain.layer_index is None
    assert plain.all_layers is None


def test_numbers_are_the_first_that_are_not_dense():
    rng = np.random.default_rng(1)
    model = load_model("deepseek-v3")
    for _ in range(50):
        dense = rng.integers(0, 30, rng.integers(0, 12)).tolist()
        count = int(rng.integers(1, 20))
        numbers = msgspec.structs.replace(model, dense_layers=dense, moe_layers=count).layer_index
        assert numbers is not None
        assert numbers.tolist() == [at for at in range(100) if at not in dense][:count]


def test_impossible_numbers_are_refused():
    for field, value in (("dense_layers", -1), ("dense_layers", [1, 70000]), ("mtp_layers", -1)):
        with pytest.raises(UsageError, match=field):
            load_model("deepseek-v3", {field: value})
    assert isinstance(load_model("deepseek-v3", {"dense_layers": [0, 5]}), Model)
