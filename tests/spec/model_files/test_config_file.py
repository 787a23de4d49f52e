"""config.json of the user: bits, layers that differ, and one sentence for each file that is no MoE model's."""

import json
import os
import tomllib

import pytest
from support.small_configs import QWEN

from moetrace.spec import MoetraceError, UsageError, canonical, load_model
from moetrace.spec.model_files.bits import FORMAT_BITS, FORMATS
from moetrace.spec.model_files.json_fields import Fields
from moetrace.spec.model_files.quantization import quantized_name
from moetrace.spec.toml_text import toml

HUNYUAN = {
    "model_type": "hunyuan_v1_moe",
    "num_hidden_layers": 3,
    "num_experts": [4, 8, 6],
    "moe_topk": [1, 2, 2],
    "moe_intermediate_size": [32, 32, 32],
    "num_shared_expert": [1, 1, 0],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def write(path, config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def refused(path, config, kind=MoetraceError):
    with pytest.raises(kind) as caught:
        load_model(write(path, config))
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    return text


def quantized(**said):
    return QWEN | {"quantization_config": said}


GROUPS = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "strategy": "group"}}}}
ROWS = {"config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "channel"}}}}
QUANTIZED = [
    (quantized(quant_method="fp8"), "FP8, blocks of 128 x 128", 8),
    (quantized(quant_method="fp8", modules_to_not_convert=["model.layers.0.self_attn.q_proj"]), None, 16),
    (quantized(quant_method="mxfp4"), "MXFP4", 16),
    (quantized(quant_method="awq", bits=4, group_size=128), "AWQ, GPTQ, 4 bit, groups of 128", 4.15625),
    (quantized(quant_method="gptq", bits=4, group_size=128), "AWQ, GPTQ, 4 bit, groups of 128", 4.15625),
    (quantized(quant_method="modelopt", quant_algo="NVFP4", ignore=["lm_head", "*.self_attn*"]), "NVFP4", 16),
    (quantized(quant_method="compressed-tensors", **GROUPS), "compressed-tensors, 4 bit, groups of 32", 4.5),
    (quantized(quant_method="compressed-tensors", **ROWS), "INT8, a scale a row", 8),
    (quantized(quant_method="bitsandbytes", load_in_4bit=True), "bitsandbytes, 4 bit", 4.5),
    (
        quantized(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_use_double_quant=True),
        "bitsandbytes, 4 bit, double quantization",
        4.125,
    ),
    (quantized(quant_method="mxfp8"), "MXFP8", 8.25),
    (QWEN | {"quantization": {"bits": 4, "group_size": 64}}, "MLX, 4 bit, groups of 64", 4.5),
    (QWEN | {"torch_dtype": "bfloat16"}, "BF16, FP16", 16),
]


@pytest.mark.parametrize(("config", "form", "dense"), QUANTIZED)
def test_bits_of_the_table(tmp_path, config, form, dense):
    model = load_model(write(tmp_path, config))
    assert (model.weight_bits, model.dense_weight_bits) == (FORMAT_BITS[form] if form else 8, dense)


def test_every_format_of_the_table_is_read():
    assert {form for _, form, _ in QUANTIZED if form} == {form.name for form in FORMATS}


@pytest.mark.parametrize(("version", "experts"), [("4.57.1", 4.5), ("5.24.0", 16), (None, 4.5), ("five", 4.5), (5, 16)])
def test_bitsandbytes_leaves_fused_experts(tmp_path, version, experts):
    config = quantized(quant_method="bitsandbytes", load_in_4bit=True) | {"torch_dtype": "bfloat16"}
    model = load_model(write(tmp_path, config if version is None else config | {"transformers_version": version}))
    assert (model.weight_bits, model.dense_weight_bits) == (experts, 4.5)


def test_quantized_model_of_unknown_bits_is_not_of_16(tmp_path):
    for config, folder in ((QWEN, "Qwen3-FP8"), (quantized(quant_method="hqq"), "plain"), (QWEN, "q-Q4_K_M")):
        path = write(tmp_path / folder, config)
        text = refused(path, config, UsageError)
        assert "is quantized, but its files do not say to how many bits: give --set model.weight_bits=BITS" in text
        assert load_model(path, {"weight_bits": 4.5}).weight_bits == 4.5
    (tmp_path / "Qwen3-FP8" / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert load_model(tmp_path / "Qwen3-FP8").weight_bits == 8


@pytest.mark.parametrize("name", ["MoE-4-bit", "MoE-8-bit", "MoE-torchao", "MoE-1.58bit", "MoE-dynamic-quant"])
def test_names_with_a_hyphen_say_it_too(name):
    assert quantized_name(name) is not None


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "Mixtral-8x7B-v0.1", "OLMoE-1B-7B-0924", "phi-3.5-moe", "Kimi-K2"])
def test_plain_names(name):
    assert quantized_name(name) is None


def test_layers_of_different_experts(tmp_path):
    model = load_model(write(tmp_path, HUNYUAN))
    assert (model.experts, model.top_k) == ([4, 8, 6], [1, 2, 2])
    assert (model.most_experts, model.all_experts, model.most_top_k) == (8, 18, 2)
    expert = 3 * 64 * 32 * 2
    assert model.expert_bytes().sum(axis=1).tolist() == [4 * expert, 8 * expert, 6 * expert]
    assert (model.expert_bytes() > 0).tolist() == model.has_expert.tolist()
    attention, router, shared = 4 * 64 * 64, 18 * 64, 2 * 3 * 64 * 32
    assert model.dense_params_per_layer == round((3 * attention + router + shared) / 3)


def test_toml_of_a_model_is_that_model(tmp_path):
    for name, config in (("q", QWEN), ("h", HUNYUAN)):
        model = load_model(write(tmp_path / name, config))
        (tmp_path / "kept.toml").write_text(toml(canonical(model)))
        assert load_model(tmp_path / "kept.toml") == model
    assert "moe_hidden" not in tomllib.loads(toml(canonical(model)))


def test_name_is_that_of_the_repository(tmp_path):
    folder = tmp_path / "models--Qwen--Qwen3-30B-A3B" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    assert load_model(write(folder, QWEN)).name == "Qwen/Qwen3-30B-A3B"


def test_language_model_inside(tmp_path):
    whole = {
        "model_type": "qwen3_vl_moe",
        "text_config": QWEN | {"model_type": "qwen3_vl_moe_text"},
        "vision_config": {},
    }
    assert load_model(write(tmp_path, whole)) == load_model(write(tmp_path, QWEN))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "llama", "hidden_size": 64}, "it is dense, no field of the model type 'llama' names experts"),
        ({key: QWEN[key] for key in QWEN if key != "num_experts"}, "it has no num_experts or num_local_experts: "),
        (QWEN | {"num_experts": None}, "the field is missing, or the model is dense"),
        (QWEN | {"num_experts": 1}, "it is dense, num_experts says fewer than 2 experts"),
        (QWEN | {"mlp_only_layers": [0, 1, 2, 3]}, "it is dense, none of its layers has experts"),
        ({"model_type": "qwen9_moe", "num_experts": 4}, "the model type 'qwen9_moe' is unknown (the nearest is 'qwen"),
        ({"num_experts": 4}, "it has no model_type"),
        (QWEN | {"mlp_only_layers": 3}, "mlp_only_layers must be a list of layers, got 3"),
        (
            QWEN | {"model_type": "nemotron_h", "n_routed_experts": 8, "layers_block_type": [["moe"]] * 4},
            "hybrid_override_pattern must have one of",
        ),
        ({key: value for key, value in QWEN.items() if key != "hidden_size"}, "it has no hidden_size"),
        ({key: value for key, value in QWEN.items() if key != "num_experts_per_tok"}, "it has no num_experts_per_tok"),
        (QWEN | {"hidden_size": "64"}, "hidden_size must be a whole number from 1 to 2^31, got '64'"),
        (QWEN | {"hidden_size": 64.0}, "hidden_size must be a whole number"),
        (QWEN | {"hidden_size": True}, "hidden_size must be a whole number"),
        (QWEN | {"hidden_size": -1}, "hidden_size must be a whole number"),
        (QWEN | {"hidden_size": 2**40}, "hidden_size must be a whole number"),
        (QWEN | {"num_hidden_layers": 20_000}, "num_hidden_layers must be at most 10,000, got 20,000"),
        (HUNYUAN | {"moe_topk": [1, 2]}, "moe_topk must have a number for each of the 3 layers, got 2"),
        ('{"model_type": ' + "9" * 5000 + "}", "it is not JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[1]", "it must be a JSON object"),
        ("\xff{", "it is not JSON"),
        (" " * (5 << 20), "it has more than 4 MiB"),
    ],
)
def test_bad_config_is_one_sentence(tmp_path, config, says):
    assert says in refused(tmp_path, config)


def test_a_sentence_takes_of_a_value_what_it_shows():
    shown = []

    class Loud:
        def __repr__(self):
            shown.append(self)
            return "loud"

    for read in (lambda fields: fields.count("field"), lambda fields: fields.places("field")):
        with pytest.raises(MoetraceError, match=r"got .*loud, \.\.\."):
            read(Fields("here", {"field": {"inner": [Loud()] * 1000}}, {}))
    assert len(shown) < 50


def test_numbers_of_a_config_are_bounded(tmp_path):
    """Sizes that are each allowed, but absurd together, end in a sentence as well, or in finite figures."""
    huge = QWEN | dict.fromkeys(("hidden_size", "moe_intermediate_size", "vocab_size", "head_dim"), 2**31 - 1)
    try:
        assert load_model(write(tmp_path, huge)).expert_params > 0
    except MoetraceError as error:
        assert "below 2^63" in str(error)


def test_more_experts_than_ids(tmp_path):
    assert "experts" in refused(tmp_path, QWEN | {"num_experts": 70_000}, UsageError)


def test_files_that_are_no_config_are_refused(tmp_path):
    with pytest.raises(MoetraceError, match=r"it has no config\.json and no GGUF file"):
        load_model(tmp_path)
    with pytest.raises(MoetraceError, match="No such file"):
        load_model(tmp_path / "absent.json")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(MoetraceError, match="not an ordinary file"):
        load_model(tmp_path)
    for suffix in ("gguf", "safetensors"):
        os.mkfifo(tmp_path / f"pipe.{suffix}")
        with pytest.raises(MoetraceError, match="not an ordinary file"):
            load_model(tmp_path / f"pipe.{suffix}")


def test_code_of_a_config_is_never_run(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "modeling.py").write_text(f"open({str(mark)!r}, 'w')")
    load_model(write(tmp_path, QWEN | {"auto_map": {"AutoConfig": "modeling.Config"}}))
    assert not mark.exists()
