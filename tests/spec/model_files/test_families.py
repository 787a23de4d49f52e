"""config.json of each family: the same weights as the model that Transformers builds from it, on no device."""

import json
import warnings

import pytest
from support import tiny_models

from moetrace.spec import load_model
from moetrace.spec.model_files.anatomy import fields_of
from moetrace.spec.model_files.families import ALIASES, FAMILIES
from moetrace.spec.model_files.hugging_face import anatomy_of, family_of
from moetrace.spec.model_files.json_fields import read_json

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Sizes that all differ, so that one taken for another is noticed; six layers, so that patterns show.
SIZES = {
    "hidden_size": 48,
    "vocab_size": 72,
    "intermediate_size": 40,
    "intermediate_size_mlp": 56,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_hidden_layers": 6,
}
MORE = {
    "deepseek-v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    },
    "granitemoehybrid": {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_expand": 2},
    "cohere2-moe": {"num_shared_experts": 2},
}
MORE["deepseek-v4"] |= {"o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 8}
_M3 = {"dense_intermediate_size": 56, "index_n_heads": 2, "index_head_dim": 8}
_M3 |= {"mlp_layer_types": ["dense", "dense", *["sparse"] * 4]}
EXTRA = {
    "bailing-hybrid": ("BailingHybridConfig", tiny_models._MLA | {"layer_group_size": 3, "num_local_experts": 8}),
    "glm-moe-dsa": ("GlmMoeDsaConfig", tiny_models._MLA | {"index_n_heads": 2, "index_head_dim": 8}),
    "minimax-m3": ("MiniMaxM3VLTextConfig", _M3),
    "mistral4": ("Mistral4Config", tiny_models._MLA),
    "nemotron-h-latent": ("NemotronHConfig", tiny_models._NEMOTRON | {"moe_latent_size": 20}),
    "gemma4-keys-as-values": (
        "Gemma4TextConfig",
        tiny_models._GEMMA | {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 16},
    ),
    "olmoe-uneven-heads": ("OlmoeConfig", {"num_attention_heads": 8, "num_key_value_heads": 1}),
}
UNKNOWN = ("jetmoe", "longcat-flash", "llama")
KNOWN = {name: (kind, more) for name, (kind, more, _) in tiny_models.FAMILIES.items() if name not in UNKNOWN} | EXTRA


def configuration(name, text):
    """A configuration of a family, and the model that it describes on the device that holds no data."""
    import torch

    kind, more = KNOWN[name]
    kind = getattr(transformers, kind)
    known = {*kind.__dataclass_fields__, *getattr(kind, "attribute_map", {})}
    sizes = {key: value for key, value in (tiny_models._SIZES | SIZES).items() if key in known}
    changes = more | MORE.get(name, {})
    if "layer_types" in changes:
        changes["layer_types"] = [*changes["layer_types"], *changes["layer_types"]]
    with warnings.catch_warnings(action="ignore"):
        found = kind(**sizes | changes)
        with torch.device("meta"):
            model = built_as(found)
    text.write_text(found.to_json_string(use_diff=False))
    return model


def built_as(found):
    """The language model of a configuration, also where Transformers lists it only inside one for pictures."""
    if type(found) in transformers.AutoModelForCausalLM._model_mapping:
        return transformers.AutoModelForCausalLM.from_config(found)
    return getattr(transformers, type(found).__name__.replace("Config", "ForCausalLM"))(found)


def weights(model) -> int:
    """Matrices of a model but its embedding and LM head: no norms, no biases, nor the gate of a shared expert."""
    left_out = ("embed", "lm_head", "shared_expert_gate", "forget_gate.A_log", "hc_head", "_proj_bias")
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not any(part in name for part in left_out) and not name.endswith(("correction_bias",))
    )


@pytest.mark.parametrize("name", KNOWN)
def test_family_has_the_weights_of_the_model(name, tmp_path):
    path = tmp_path / "config.json"
    built = configuration(name, path)
    family, fields = family_of(path, read_json(path, 1 << 20))
    anatomy = anatomy_of(family, fields)
    assert anatomy.params - anatomy.head == weights(built)
    assert anatomy.head == SIZES["vocab_size"] * SIZES["hidden_size"]

    # The layers that have experts in the built model.
    places = {
        int(parameter.split("layers.")[1].split(".")[0])
        for parameter, _ in built.named_parameters()
        if ".experts." in parameter
    }
    assert {index for index, layer in enumerate(anatomy.layers) if layer.experts} == places
    model = load_model(tmp_path)
    assert (model.moe_layers, model.experts, model.top_k) == (len(places), 8, 2)
    experts = sum(
        parameter.numel()
        for path, parameter in built.named_parameters()
        if ".experts." in path and "bias" not in path and "shared" not in path and parameter.ndim > 1
    )
    assert model.all_experts * model.expert_params == experts

    # Nothing is lost between the parts and the model, but the attention of first dense layers.
    lost = sum(layer.mixer for layer in anatomy.layers[: anatomy.first_dense])
    counted = model.all_experts * model.expert_params + model.moe_layers * model.dense_params_per_layer
    assert counted + model.once_params + lost == pytest.approx(anatomy.params, abs=model.moe_layers)
    assert fields_of(anatomy, "")["hidden"] == 48


def test_all_families_but_those_of_other_repositories_are_built():
    built = set()
    for kind, _ in KNOWN.values():
        built.add(getattr(transformers, kind).model_type)
    tested = {ALIASES.get(kind, kind) for kind in built}
    remote = {name for name, family in FAMILIES.items() if family.remote}
    assert len(tested) >= 20 and set(FAMILIES) - tested == remote | {"kimi_k2", "qwen3_vl_moe_text"}


def test_saved_model_of_any_kind(tmp_path):
    """A saved folder, weights included, gives the same as its config.json, and the bits of its dtype."""
    for name in ("qwen3-moe", "deepseek-v3"):
        folder = tiny_models.save(name, tmp_path / name)
        saved = load_model(folder)
        alone = tmp_path / f"{name}.json"
        alone.write_text((folder / "config.json").read_text())
        described = load_model(alone)
        assert saved.weight_bits == described.weight_bits == 32
        assert saved.dense_weight_bits == described.dense_weight_bits == 32
        assert json.loads(alone.read_text())["model_type"].startswith(name[:5])
