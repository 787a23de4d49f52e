"""The presets: every number that follows from a model's dimensions is recomputed from them here."""

import json
import re
from importlib import resources
from pathlib import Path

import pytest

from moetrace.spec import (
    check_fits,
    check_policy,
    default_policies,
    gpu_slots,
    list_presets,
    load_model,
    load_policy,
    load_system,
)

# (heads, KV heads, head dim), or for MLA (heads, q_lora or None) with kv_lora 512, rope 64, nope 128, v 128.
# model: (L, E, k, shared, h, I, attention, vocab, dense first layers, their width, expert bits)
MODELS = {
    "mixtral-8x7b": (32, 8, 2, 0, 4096, 14336, (32, 8, 128), 32000, 0, 0, 16),
    "mixtral-8x22b": (56, 8, 2, 0, 6144, 16384, (48, 8, 128), 32768, 0, 0, 16),
    "qwen1.5-moe-a2.7b": (24, 60, 4, 5632, 2048, 1408, (16, 16, 128), 151936, 0, 0, 16),
    "qwen2-57b-a14b": (28, 64, 8, 20480, 3584, 2560, (28, 4, 128), 151936, 0, 0, 16),
    "qwen3-30b-a3b": (48, 128, 8, 0, 2048, 768, (32, 4, 128), 151936, 0, 0, 16),
    "qwen3-235b-a22b": (94, 128, 8, 0, 4096, 1536, (64, 4, 128), 151936, 0, 0, 16),
    "deepseek-v2-lite": (26, 64, 6, 2816, 2048, 1408, (16, None), 102400, 1, 10944, 16),
    "deepseek-v2": (59, 160, 6, 3072, 5120, 1536, (128, 1536), 102400, 1, 12288, 16),
    "deepseek-v3": (58, 256, 8, 2048, 7168, 2048, (128, 1536), 129280, 3, 18432, 8),
    "olmoe-1b-7b": (16, 64, 8, 0, 2048, 1024, (16, 16, 128), 50304, 0, 0, 16),
    "phi-3.5-moe": (32, 16, 2, 0, 4096, 6400, (32, 8, 128), 32064, 0, 0, 16),
    "gpt-oss-20b": (24, 32, 4, 0, 2880, 2880, (64, 8, 64), 201088, 0, 0, 4.25),
    "gpt-oss-120b": (36, 128, 4, 0, 2880, 2880, (64, 8, 64), 201088, 0, 0, 4.25),
    "kimi-k2": (60, 384, 8, 2048, 7168, 2048, (64, 1536), 163840, 1, 18432, 8),
    "glm-4.5-air": (45, 128, 8, 1408, 4096, 1408, (96, 8, 128), 151552, 1, 10944, 16),
    "tiny-olmoe": (6, 32, 4, 0, 2048, 1024, (16, 16, 128), 50304, 0, 0, 16),
}

# The makers' figures: all parameters in billions, without the embedding (looked up, so not counted here).
PARAMETERS = {"mixtral-8x7b": 46.7, "qwen3-30b-a3b": 30.5, "deepseek-v3": 671, "gpt-oss-120b": 117, "olmoe-1b-7b": 6.9}


def attention_params(h, attention):
    if len(attention) == 3:
        heads, kv_heads, dim = attention
        return h * heads * dim + 2 * h * kv_heads * dim + heads * dim * h
    heads, q_lora = attention
    q = h * heads * 192 if q_lora is None else h * q_lora + q_lora * heads * 192
    return q + h * (512 + 64) + 512 * heads * (128 + 128) + heads * 128 * h


def test_every_model_of_the_tables_is_a_preset():
    """Those that are not in the table above are compared with their config.json in `model_files/test_released.py`."""
    released = json.loads(Path(__file__).with_name("model_files").joinpath("released.json").read_text(encoding="utf-8"))
    assert list_presets("models") == sorted([*MODELS, *released])


@pytest.mark.parametrize("name", MODELS)
def test_model_preset_follows_from_its_dimensions(name):
    layers, experts, k, shared, h, width, attention, vocab, dense_layers, dense_width, bits = MODELS[name]
    model = load_model(name)
    assert model.name == name
    assert (model.moe_layers, model.experts, model.top_k) == (layers, experts, k)
    assert (model.hidden, model.expert_intermediate, model.expert_matrices) == (h, width, 3)
    assert model.weight_bits == bits
    assert model.dense_weight_bits == (8 if name in ("deepseek-v3", "kimi-k2") else 16)
    assert model.dense_params_per_layer == attention_params(h, attention) + experts * h + 3 * h * shared
    assert model.once_params == vocab * h + dense_layers * 3 * h * dense_width
    kv = 2 * attention[1] * attention[2] * 2 if len(attention) == 3 else (512 + 64) * 2
    assert model.kv_bytes_per_token_layer == kv


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_preset_has_the_parameters_that_its_maker_states(name):
    model = load_model(name)
    counted = model.moe_layers * (model.experts * model.expert_params + model.dense_params_per_layer)
    embedding = MODELS[name][7] * model.hidden
    assert (counted + model.once_params + embedding) / 1e9 == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize("kind", ["models", "systems", "policies"])
def test_preset_is_named_as_its_file_and_numbers_have_a_source(kind):
    load = {"models": load_model, "systems": load_system, "policies": load_policy}[kind]
    for name in list_presets(kind):
        assert load(name).name == name
        text = resources.files("moetrace.spec").joinpath("presets", kind, f"{name}.toml").read_text()
        previous = ""
        for line in text.splitlines():
            if re.match(r"\w+ = [\d.]", line):
                assert "#" in line or previous.startswith("#"), f"{name}: no source for {line}"
            previous = line


def test_systems():
    gpus = {"a100-sxm", "b200", "b300", "gb200", "gb300", "h100-sxm", "h200", "l40s", "rtx-pro-6000"}
    gpus |= {name for name in list_presets("systems") if load_system(name).cluster}
    assert gpus <= set(list_presets("systems"))
    assert [name for name in list_presets("systems") if name not in gpus] == [
        "a6000-xeon",
        "dgx-spark",
        "edge-ndp",
        "edge-pi-cluster",
        "edge-robot",
        "epyc-ktransformers",
        "h100-amx-dimm",
        "h100-dimm-ndp",
        "jetson-orin",
        "mac-m4-max",
        "mac-mini-m4",
        "monde-cxl",
        "phone-ufs",
        "remoe",
        "rtx3060-ddr4",
        "rtx3090-ddr4",
        "rtx4090-ddr5",
        "rtx4090-nvme",
        "rtx4090-offload",
        "rtx5090-ddr5",
        "strix-halo",
    ]
    edge = load_system("edge-ndp")
    assert (edge.units, edge.gpu.flop_s, edge.gpu.bytes_s, edge.gpu.launch_s) == (6, 112e12, 960e9, 5e-6)
    assert edge.ndp is not None and edge.link is not None
    assert (edge.ndp.flop_s, edge.ndp.bytes_s, edge.ndp.command_s) == (512e9, 102.4e9, 2e-6)
    assert (edge.link.bytes_s, edge.link.latency_s) == (55e9, 5e-6)
    monde = load_system("monde-cxl")
    assert monde.ndp is not None
    assert (monde.units, monde.ndp.gmac_s, monde.ndp.bandwidth_gb_s, monde.ndp.capacity_gb) == (1, 1020, 512, 512)
    assert load_system("h100-dimm-ndp").units == 16
    offload, jetson = load_system("rtx4090-offload"), load_system("jetson-orin")
    assert (offload.units, jetson.units, jetson.link) == (0, 0, None)
    assert offload.link is not None and offload.link.bandwidth_gb_s == 25
    for name, reached_gb_s in (
        ("rtx3060-ddr4", 16.896),
        ("rtx3090-ddr4", 16.896),
        ("rtx4090-ddr5", 29.568),
        ("rtx5090-ddr5", 29.568),
        ("epyc-ktransformers", 165.888),
    ):
        system = load_system(name)
        assert system.home is not None and (system.home.name, system.home.starts_once) == ("cpu", True)
        assert system.home.bytes_s == pytest.approx(reached_gb_s * 1e9)
        assert (system.home.start_s, system.gpu.layer_overhead_s) == (5e-6, 0)
    for name, read_gb_s in (
        ("strix-halo", 5.6),
        ("dgx-spark", 5.6),
        ("mac-m4-max", 5.92),
        ("mac-mini-m4", 2.4),
        ("phone-ufs", 1419 * 2**20 / 1e9),
    ):
        unified = load_system(name)
        assert unified.home is None and unified.link is not None
        assert unified.link.bytes_s == pytest.approx(read_gb_s * 1e9, rel=1e-3)


def test_default_policies_of_each_preset():
    pairs = {name: default_policies(load_system(name)) for name in list_presets("systems")}
    assert pairs["edge-ndp"] == pairs["monde-cxl"] == ("monde", "edge-ndp")
    assert pairs["rtx4090-ddr5"] == pairs["epyc-ktransformers"] == ("n-cpu-moe", "hybrid")
    assert pairs["rtx4090-offload"] == pairs["dgx-spark"] == ("resident", "on-demand-lfu")
    assert pairs["remoe"] == ("n-cpu-moe", "hybrid")
    assert pairs["jetson-orin"] == ("resident",)
    assert pairs["h100-x8"] == pairs["h20-x32"] == ("ep-serial", "eplb")
    for name, policies in pairs.items():
        for policy in policies:
            check_policy(load_policy(policy), load_system(name))


def test_policies():
    expected = {
        "on-demand": ("ep", "gpu", "lru", "none", "layer"),
        "on-demand-lfu": ("ep", "gpu", "lfu", "none", "layer"),
        "resident": ("ep", "gpu", "static-layers", "none", "global"),
        "n-cpu-moe": ("ep", "in-place", "static-layers", "none", "global"),
        "ktransformers": ("ep", "home", "none", "none", "layer"),
        "fiddler": ("ep", "fiddler", "static-popular", "none", "global"),
        "hybrid": ("ep", "balance", "lru", "none", "layer"),
        "haq": ("ep", "in-place", "static-popular", "none", "global"),
        "monde": ("ep", "hot", "none", "none", "layer"),
        "monde-ratio": ("ep", "hot:ratio", "none", "none", "layer"),
        "trimoe": ("mixed", "bottleneck", "ewma", "relayout", "layer"),
        "trimoe-no-cpu": ("mixed", "bottleneck", "ewma", "relayout", "layer"),
        "trimoe-greedy": ("mixed", "cheapest", "ewma", "relayout", "layer"),
        "trimoe-static": ("ep", "bottleneck", "ewma", "online:1", "layer"),
        "halo": ("ep", "halo", "static-popular", "none", "global"),
        "strict": ("ep", "balance", "static-popular", "none", "global"),
        "ndp-ep": ("ep", "ndp", "none", "none", "layer"),
        "ndp-tp": ("tp", "ndp", "none", "none", "layer"),
        "edge-ndp-tp": ("tp", "ndp", "none", "none", "layer"),
        "edge-ndp-tp-lb": ("tp", "balance", "none", "none", "layer"),
        "edge-ndp": ("tp", "balance", "prefill", "prefill", "global"),
        **dict.fromkeys(
            ("foresee", "foresee-no-ahead", "foresee-no-follows", "foresee-long"),
            ("tp", "balance", "foresee", "foresee", "global"),
        ),
        "remoe": ("ep", "home", "none", "none", "layer"),
        "all-cpu": ("ep", "home", "none", "none", "layer"),
        "all-gpu": ("ep", "gpu", "static-layers", "none", "global"),
        "foresee-split": ("tp", "split", "foresee", "foresee", "global"),
    }
    policies = {name: load_policy(name) for name in list_presets("policies")}
    clusters = {name: policies.pop(name) for name in [*policies] if policies[name].schedule}
    assert {name: (policy.placement, policy.schedule) for name, policy in clusters.items()} == {
        "bulk": ("ep-block", "serial"),
        "dep-naive": ("ep-block", "pipeline:1,1"),
        "dep-pppipe": ("ep-block", "pipeline:2,1"),
        "ep-serial": ("ep-block", "serial"),
        "eplb": ("eplb", "serial"),
        "findep": ("ep-block", "pipeline:auto"),
        "fused": ("ep-block", "serial"),
        "two-batch-overlap": ("ep-block", "pipeline:2,1"),
    }
    assert {
        name: (policy.placement, policy.dispatch, policy.residency, policy.prefetch, policy.scope)
        for name, policy in policies.items()
    } == expected


def test_mixtral_needs_three_dimms():
    model = load_model("mixtral-8x7b")
    check_fits(model, load_system("edge-ndp", {"ndp.units": 3}), model.expert_bytes())


def test_tiny_olmoe_would_all_fit():
    model = load_model("tiny-olmoe")
    assert gpu_slots(model, load_system("edge-ndp"), model.expert_bytes()) == 192


def test_every_model_says_which_weights_are_shared_experts():
    """As `findep` asks: as many as the comment above them counts, none where there are none."""
    for name in list_presets("models"):
        text = (resources.files("moetrace.spec") / f"presets/models/{name}.toml").read_text()
        said = re.findall(r"^# (?:shared experts|dense MLP beside the experts): .* = ([0-9_]+)$", text, re.MULTILINE)
        assert load_model(name).shared_params_per_layer == (int(*said) if said else 0), name
