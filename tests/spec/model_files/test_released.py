"""Released models: what their config.json says gives the preset, and the parameters that their makers state."""

import json
from pathlib import Path

import msgspec
import pytest

from moetrace.spec import load_model
from moetrace.spec.model_files.hugging_face import anatomy_of, family_of
from moetrace.trace.naming import model_name, other_bits

# The fields of config.json that make a model's sizes, one model a line, and what its maker says of it in billions.
RELEASED = json.loads(Path(__file__).with_name("released.json").read_text(encoding="utf-8"))
# Presets of version 1, from the same files; their own test computes them from their dimensions.
FIRST = {
    "mixtral-8x7b": {"model_type": "mixtral", "num_hidden_layers": 32, "num_local_experts": 8, "hidden_size": 4096}
    | {"intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
    "qwen1.5-moe-a2.7b": {"model_type": "qwen2_moe", "num_hidden_layers": 24, "num_experts": 60, "hidden_size": 2048}
    | {"num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
    | {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936},
    "deepseek-v2-lite": {"model_type": "deepseek_v2", "num_hidden_layers": 27, "first_k_dense_replace": 1}
    | {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408}
    | {"hidden_size": 2048, "intermediate_size": 10944, "num_attention_heads": 16, "kv_lora_rank": 512}
    | {"q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 102400},
    "deepseek-v3": {"model_type": "deepseek_v3", "num_hidden_layers": 61, "first_k_dense_replace": 3}
    | {"num_nextn_predict_layers": 1}
    | {"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048}
    | {"hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128, "kv_lora_rank": 512}
    | {"q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280}
    | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "gpt-oss-20b": {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32, "hidden_size": 2880}
    | {"num_experts_per_tok": 4, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8}
    | {"head_dim": 64, "vocab_size": 201088, "quantization_config": {"quant_method": "mxfp4"}},
    "phi-3.5-moe": {"model_type": "phimoe", "num_hidden_layers": 32, "num_local_experts": 16, "hidden_size": 4096}
    | {"num_experts_per_tok": 2, "intermediate_size": 6400, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"vocab_size": 32064},
}
FIRST["mixtral-8x7b"]["num_experts_per_tok"] = 2


def write(folder, config):
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", [*RELEASED, *FIRST])
def test_config_gives_the_preset(name, tmp_path):
    config = FIRST.get(name) or RELEASED[name]["config"]
    folder = tmp_path / "model"  # a name that says no quantization
    folder.mkdir()
    path = write(folder, config)
    # A config.json does not say which dense weights are of shared experts; presets of the largest models do.
    preset = msgspec.structs.replace(load_model(name), shared_params_per_layer=msgspec.UNSET)
    assert msgspec.structs.replace(load_model(path), name=name) == preset
    assert load_model(folder).name == "model"


@pytest.mark.parametrize("name", [name for name, model in RELEASED.items() if model["billions"]])
def test_preset_has_the_parameters_that_its_maker_states(name, tmp_path):
    config, billions, active = (RELEASED[name][key] for key in ("config", "billions", "active"))
    family, fields = family_of(tmp_path, config)
    anatomy = anatomy_of(family, fields)
    embedding = 0 if config.get("tie_word_embeddings") else anatomy.head
    # Vision towers and blocks that predict further tokens are counted by some makers, and not here.
    assert (anatomy.params + embedding) / 1e9 == pytest.approx(billions, rel=0.012)
    idle = sum(layer.experts - layer.top_k for layer in anatomy.layers) * anatomy.expert_params
    assert active - 1.5 < (anatomy.params - idle) / 1e9 < active + 1.5


@pytest.mark.parametrize(
    ("said", "layers", "experts", "preset"),
    [
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", 48, 128, "qwen3-30b-a3b"),
        ("Qwen/Qwen3-30B-A3B-FP8", 48, 128, None),
        ("Qwen3-30B-A3B-AWQ", 48, 128, None),
        ("Qwen3-30B-A3B-Q4_K_M", 48, 128, None),
        ("Qwen3-30B-A3B-4bit-DWQ", 48, 128, None),
        ("gpt-oss-20b-MXFP4", 24, 32, "gpt-oss-20b"),
        ("gpt-oss-20b-Q8_0", 24, 32, None),
        ("deepseek-ai/DeepSeek-V3-FP8", 58, 256, "deepseek-v3"),
        ("nvidia/DeepSeek-V3-0324-NVFP4", 58, 256, None),
        ("novita/Deepseek-V3-0324-W4AFP8", 58, 256, None),
        ("unsloth/DeepSeek-V3-0324-BF16", 58, 256, None),
        ("unsloth/gpt-oss-20b-BF16", 24, 32, None),
        *[(f"Qwen3-30B-A3B-{end}", 48, 128, None) for end in ("W4AFP8", "int-4", "w4", "E4M3", "DQ3", "BitNet")],
        *[(f"Qwen3-30B-A3B-{end}", 48, 128, None) for end in ("TQ1_0", "DQ3_K_M", "mixed-3-6", "HIGGS", "ptpc")],
        *[(f"Qwen3-30B-A3B-{end}", 48, 128, "qwen3-30b-a3b") for end in ("BF16", "F16", "fp16", "Thinking-2507")],
        ("zai-org/GLM-4.5-Air", 45, 128, "glm-4.5-air"),
        ("DeepSeek-V3.2", 58, 256, "deepseek-v3.2"),
        ("moonshotai/Kimi-K2-Instruct-0905", 60, 384, "kimi-k2"),
        ("moonshotai/Kimi-K2-Thinking", 60, 384, "kimi-k2.5"),
        ("Kimi_K2_Thinking-FP8", 60, 384, "kimi-k2"),
        ("unsloth/Kimi-K2-Thinking-BF16", 60, 384, None),
    ],
)
def test_quantized_name_gets_no_preset_of_other_bits(said, layers, experts, preset):
    assert model_name("here", said, layers, experts) == (preset or said)
    assert (other_bits(said, layers, experts) is None) == (preset is not None)


def test_a_trace_that_holds_bytes_of_experts_gets_the_preset_of_any_bits():
    assert model_name("here", "Qwen3-30B-A3B-Q4_K_M.gguf", 48, 128, sized=True) == "qwen3-30b-a3b"
