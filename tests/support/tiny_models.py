"""Tiny Hugging Face models with random weights, one of each family that capture is verified on."""

import warnings

import numpy as np

VOCABULARY = 64
EXPERTS, TOP_K = 8, 2
# Sizes by their names in configurations; each takes those that it knows.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
}
_MLA = {"num_key_value_heads": 4}  # in latent attention, keys have the same number of heads as queries
_GROUPS = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
_MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim", "num_value_heads", "num_key_heads")}
_GEMMA = {"enable_moe_block": True, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 0}
_LFM2 = {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "use_expert_bias": True}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": 8}
_NEMOTRON = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "moe_shared_expert_intermediate_size": 16,
}
# Family -> configuration class, what else it needs, and the absolute layers that have experts.
FAMILIES = {
    "olmoe": ("OlmoeConfig", {"norm_topk_prob": False}, [0, 1, 2]),
    "mixtral": ("MixtralConfig", {}, [0, 1, 2]),
    "qwen2-moe": ("Qwen2MoeConfig", {"mlp_only_layers": [0]}, [1, 2]),
    "qwen3-moe": ("Qwen3MoeConfig", {"mlp_only_layers": [1], "norm_topk_prob": True}, [0, 2]),
    "deepseek-v2": ("DeepseekV2Config", {"topk_method": "greedy", "routed_scaling_factor": 1.5} | _MLA, [1, 2]),
    "deepseek-v2-groups": ("DeepseekV2Config", _GROUPS | _MLA, [1, 2]),
    "deepseek-v3": ("DeepseekV3Config", {"routed_scaling_factor": 2.5} | _MLA, [1, 2]),
    "gpt-oss": ("GptOssConfig", {"sliding_window": 6}, [0, 1, 2]),
    "afmoe": ("AfmoeConfig", {}, [1, 2]),
    "cohere2-moe": ("Cohere2MoeConfig", {}, [0, 1, 2]),
    "deepseek-v32": ("DeepseekV32Config", {"index_n_heads": 2, "index_head_dim": 8} | _MLA, [1, 2]),
    "deepseek-v4": ("DeepseekV4Config", {}, [0, 1, 2]),
    "dots1": ("Dots1Config", {}, [1, 2]),
    "ernie4.5-moe": ("Ernie4_5_MoeConfig", {}, [1, 2]),
    "exaone-moe": ("ExaoneMoeConfig", {}, [1, 2]),
    "flex-olmo": ("FlexOlmoConfig", {}, [0, 1, 2]),
    "gemma4": ("Gemma4TextConfig", _GEMMA, [0, 1, 2]),
    "glm4-moe": ("Glm4MoeConfig", {}, [1, 2]),
    "glm4-moe-lite": ("Glm4MoeLiteConfig", _MLA, [1, 2]),
    "granitemoe": ("GraniteMoeConfig", {}, [0, 1, 2]),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {"layer_types": ["attention", "mamba", "attention"]} | _MAMBA,
        [0, 1, 2],
    ),
    "granitemoeshared": ("GraniteMoeSharedConfig", {}, [0, 1, 2]),
    "hunyuan-v1-moe": ("HunYuanMoEV1Config", {}, [0, 1, 2]),
    "hy-v3": ("HYV3Config", {}, [1, 2]),
    "jamba": ("JambaConfig", {"attn_layer_period": 2, "attn_layer_offset": 1}, [1]),
    "kimi-linear": ("KimiLinearConfig", {"linear_head_dim": 8, "linear_num_heads": 4} | _MIXED | _MLA, [1, 2]),
    "laguna": ("LagunaConfig", {}, [1, 2]),
    "lfm2-moe": ("Lfm2MoeConfig", _LFM2, [1, 2]),
    "llama4": ("Llama4TextConfig", {"intermediate_size_mlp": 16, "interleave_moe_layer_step": 2}, [1]),
    "mellum": ("MellumConfig", {}, [0, 1, 2]),
    "mimo-v2-flash": ("MiMoV2FlashConfig", {}, [1, 2]),
    "minimax": ("MiniMaxConfig", {}, [0, 1, 2]),
    "minimax-m2": ("MiniMaxM2Config", {}, [0, 1, 2]),
    "nemotron-h": ("NemotronHConfig", _NEMOTRON, [1]),
    "phimoe": ("PhimoeConfig", {}, [0, 1, 2]),
    "qwen3-next": ("Qwen3NextConfig", _MIXED | _LINEAR, [0, 1, 2]),
    "qwen3.5-moe": ("Qwen3_5MoeTextConfig", _MIXED | _LINEAR, [0, 1, 2]),
    "solar-open": ("SolarOpenConfig", {}, [0, 1, 2]),
    # Not known to capture:
    "jetmoe": ("JetMoeConfig", {}, []),
    "llama": ("LlamaConfig", {}, []),
    "longcat-flash": ("LongcatFlashConfig", {"num_layers": 2, "zero_expert_num": 2, "head_dim": 4} | _MLA, []),
}
# Those of which each row of each layer is compared with what a second path says.
CAPTURED = [family for family, (_, _, layers) in FAMILIES.items() if layers]


def build(family: str, **changes):
    """A model with random weights, the same at each call, in evaluation mode."""
    import torch
    import transformers

    name, more, _ = FAMILIES[family]
    kind = getattr(transformers, name)
    known = {*kind.__dataclass_fields__, *getattr(kind, "attribute_map", {})}
    config = kind(**{key: value for key, value in _SIZES.items() if key in known} | more | changes)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name or "expert_bias" in name:  # else zero, and no difference
                tensor.copy_(torch.randn_like(tensor) * 0.2)
            elif "tid2eid" in name:  # experts by token id: distinct ones
                tensor.copy_(torch.rand(len(tensor), EXPERTS).argsort(dim=1)[:, : tensor.shape[1]])
    return model


def save(family: str, folder, **changes):
    """Save such a model in `folder`, and return that."""
    with warnings.catch_warnings(action="ignore"):
        build(family, **changes).save_pretrained(folder)
    return folder


def prompts(seed: int = 0, count: int = 3) -> list[list[int]]:
    """Prompts of different lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, 4 + 3 * (index % 3)).tolist() for index in range(count)]
