"""The names of the sizes of families of models in `config.json`: one line for each `model_type`, and no code for any.

Verified against the models that Transformers builds from such files (`tests/spec/model_files/`), except for the
families marked `remote`, whose code stands in their repositories and is never run; their lines follow what that code
says.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from moetrace.spec.model_files import layer_kinds, mixers
from moetrace.spec.model_files.layer_kinds import Kinds, Places
from moetrace.spec.model_files.mixers import Mix

_NONE: Mapping[str, object] = MappingProxyType({})
# The mixers of a family, by the kind of a layer; "" is any other kind.
_ATTENTION: Mapping[str, Mix] = MappingProxyType({"": mixers.grouped_attention})
_LATENT: Mapping[str, Mix] = MappingProxyType({"": mixers.latent_attention})


class Family(NamedTuple):
    """How a family writes its sizes. Names with a bar between them are alternatives, in this order."""

    experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"  # of an expert
    matrices: int = 3
    latent: str = ""  # width of the latent vector in which experts work
    shared_count: str = ""  # shared experts; "": as many as `shared_width` is wide, once
    shared_width: str = ""  # "": no shared experts
    dense_width: str = "intermediate_size"  # of a layer without experts
    has_experts: Places = layer_kinds.every
    kinds: Kinds = layer_kinds.alike
    mixers: Mapping[str, Mix] = _ATTENTION
    defaults: Mapping[str, object] = _NONE  # what released files may leave out
    one_part: bool = False  # a layer is a mixer, or experts, or an MLP
    remote: bool = False


_SHARED: dict[str, Any] = {
    "shared_count": "n_shared_experts|num_shared_experts",
    "shared_width": "moe_intermediate_size",
}
_OWN_SHARED: dict[str, Any] = {"shared_width": "shared_expert_intermediate_size"}
_DELTA = {"": mixers.gated_attention, "linear_attention": mixers.delta_net}
_GRANITE: dict[str, Any] = {"experts": "num_local_experts", "width": "intermediate_size"}
_MIXTRAL = Family(experts="num_local_experts", width="intermediate_size")
_QWEN_2 = Family(has_experts=layer_kinds.sparse_steps, **_OWN_SHARED)
_QWEN_3 = Family(experts="num_experts|num_local_experts", has_experts=layer_kinds.sparse_steps)
_QWEN_NEXT = Family(
    has_experts=layer_kinds.sparse_steps, kinds=layer_kinds.every_fourth_full, mixers=_DELTA, **_OWN_SHARED
)
_DEEPSEEK = Family(experts="n_routed_experts", has_experts=layer_kinds.after_first, mixers=_LATENT, **_SHARED)
_GLM = _DEEPSEEK._replace(mixers=_ATTENTION)
_FIRST_DENSE = {"first_k_dense_replace": 1}
_BAILING = Family(has_experts=layer_kinds.after_first, remote=True, **_SHARED)
_ERNIE = Family(
    experts="moe_num_experts",
    top_k="moe_k",
    shared_count="moe_num_shared_experts",
    shared_width="moe_intermediate_size",
    has_experts=layer_kinds.between,
    defaults={"moe_k": 6, "moe_num_shared_experts": 2, "moe_layer_start_index": 1},
)
_HUNYUAN = Family(
    top_k="moe_topk",
    width="moe_intermediate_size|intermediate_size",
    shared_count="num_shared_expert",
    shared_width="moe_intermediate_size|intermediate_size",
    has_experts=layer_kinds.after_first,
    defaults={"num_shared_expert": 1},
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "afmoe": Family(has_experts=layer_kinds.after_first, mixers={"": mixers.gated_attention}, **_SHARED),
        "bailing_hybrid": Family(
            experts="num_local_experts|num_experts",
            top_k="num_experts_per_tok|num_experts_per_token",
            has_experts=layer_kinds.after_first,
            kinds=layer_kinds.grouped_full,
            mixers={"": mixers.ling_attention, "linear_attention": mixers.ling_delta},
            **_SHARED,
        ),
        "bailing_moe": _BAILING,
        "bailing_moe_v2": _BAILING,
        "cohere2_moe": Family(
            width="intermediate_size",
            shared_count="num_shared_experts",
            shared_width="intermediate_size",
            dense_width="prefix_dense_intermediate_size|intermediate_size",
            has_experts=layer_kinds.after_first,
        ),
        "deepseek": _GLM._replace(remote=True),
        "deepseek_v2": _DEEPSEEK,
        "deepseek_v3": _DEEPSEEK,
        "deepseek_v32": _DEEPSEEK,
        "deepseek_v4": Family(
            experts="n_routed_experts",
            kinds=layer_kinds.compression_rates,
            mixers={"": mixers.compressed_attention},
            **_SHARED,
        ),
        "dots1": _GLM,
        "ernie4_5_moe": _ERNIE,
        "exaone_moe": Family(has_experts=layer_kinds.after_first, defaults=_FIRST_DENSE, **_SHARED),
        "flex_olmo": Family(width="intermediate_size"),
        "gemma4_text": Family(
            top_k="top_k_experts",
            shared_width="intermediate_size",  # the dense MLP beside the experts
            kinds=layer_kinds.listed,
            mixers={"": mixers.gemma_attention},
            defaults={"global_head_dim": 512},
        ),
        "glm4_moe": _GLM,
        "glm4_moe_lite": _DEEPSEEK._replace(defaults=_FIRST_DENSE),
        "glm_moe_dsa": _DEEPSEEK._replace(kinds=layer_kinds.indexer_kinds),
        "gpt_oss": _MIXTRAL,
        "granitemoe": Family(**_GRANITE),
        "granitemoeshared": Family(shared_width="shared_intermediate_size", **_GRANITE),
        "granitemoehybrid": Family(
            shared_width="shared_intermediate_size",
            kinds=layer_kinds.listed,
            mixers={"": mixers.grouped_attention, "mamba": mixers.mamba2, "linear_attention": mixers.mamba2},
            **_GRANITE,
        ),
        "hunyuan_v1_moe": _HUNYUAN,
        "hy_v3": Family(has_experts=layer_kinds.after_first, defaults=_FIRST_DENSE, **_SHARED),
        "jamba": Family(
            width="intermediate_size",
            has_experts=layer_kinds.periodic,
            kinds=layer_kinds.attention_period,
            mixers={"": mixers.grouped_attention, "mamba": mixers.mamba1},
        ),
        "kimi_linear": Family(
            top_k="num_experts_per_token|num_experts_per_tok",
            shared_count="num_shared_experts|n_shared_experts",
            shared_width="moe_intermediate_size",
            experts="num_experts|num_local_experts",
            latent="routed_expert_hidden_size",
            has_experts=layer_kinds.after_first,
            kinds=layer_kinds.kimi_lists,
            mixers={"": mixers.latent_attention, "linear_attention": mixers.kimi_delta},
        ),
        "kimi_k2": _DEEPSEEK,
        "laguna": Family(has_experts=layer_kinds.after_first, mixers={"": mixers.head_gated_attention}, **_OWN_SHARED),
        "lfm2_moe": Family(
            has_experts=layer_kinds.after_first,
            kinds=layer_kinds.convolutions,
            mixers={"": mixers.grouped_attention, "conv": mixers.short_convolution},
        ),
        "llama4_text": Family(
            experts="num_local_experts",
            width="intermediate_size",
            shared_width="intermediate_size",
            dense_width="intermediate_size_mlp",
            has_experts=layer_kinds.interleaved,
        ),
        "mellum": Family(experts="num_experts|num_local_experts", has_experts=layer_kinds.after_first),
        "mimo_v2_flash": Family(
            experts="n_routed_experts",
            has_experts=layer_kinds.after_first,
            kinds=layer_kinds.sliding_pattern,
            mixers={"": mixers.mimo_attention},
        ),
        "minimax": _MIXTRAL._replace(
            kinds=layer_kinds.alternating,
            mixers={"": mixers.grouped_attention, "linear_attention": mixers.lightning_attention},
        ),
        "minimax_m2": _MIXTRAL,
        "minimax_m3": Family(
            experts="num_local_experts",
            width="moe_intermediate_size|intermediate_size",
            shared_count="n_shared_experts",
            shared_width="shared_intermediate_size|moe_intermediate_size",
            dense_width="dense_intermediate_size",
            has_experts=layer_kinds.after_first,
            kinds=layer_kinds.indexed,
            mixers={"": mixers.indexed_attention},
            defaults={"n_shared_experts": 1},
        ),
        "mistral4": _DEEPSEEK,
        "mixtral": _MIXTRAL,
        "nemotron_h": Family(
            experts="n_routed_experts",
            matrices=2,
            one_part=True,
            latent="moe_latent_size",
            shared_count="n_shared_experts",
            shared_width="moe_shared_expert_intermediate_size",
            has_experts=layer_kinds.pattern_experts,
            kinds=layer_kinds.pattern,
            mixers={
                "mamba": mixers.mamba2,
                "full_attention": mixers.grouped_attention,
                "experts": mixers.nothing,
                "mlp": mixers.nothing,
            },
        ),
        "olmoe": Family(width="intermediate_size"),
        "phimoe": _MIXTRAL,
        "qwen2_moe": _QWEN_2,
        "qwen3_5_moe_text": _QWEN_NEXT,
        "qwen3_moe": _QWEN_3,
        # Its config.json does not say that its weights have a layer mtp.layers.0.
        "qwen3_next": _QWEN_NEXT._replace(defaults={"num_nextn_predict_layers": 1}),
        "qwen3_vl_moe_text": _QWEN_3,
        "solar_open": _GLM,
    }
)

# Names of one and the same family, or of a model for pictures whose language model stands in `text_config`.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "gemma4": "gemma4_text",
        "hunyuan": "hunyuan_v1_moe",
        "kimi_k25": "kimi_k2",
        "llama4": "llama4_text",
        "deepseek_ref": "deepseek_v4",
        "minimax_m3_vl": "minimax_m3",
        "minimax_m3_vl_text": "minimax_m3",
        "minimax_text_01": "minimax",
        "qwen3_5_moe": "qwen3_5_moe_text",
        "qwen3_vl_moe": "qwen3_vl_moe_text",
    }
)
