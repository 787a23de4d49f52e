"""The layers of a model that have experts, and the mixer of each: the rules that families of models follow."""

from collections.abc import Callable

from moetrace.spec.model_files.json_fields import Fields

Places = Callable[[Fields, int], list[bool]]
Kinds = Callable[[Fields, int], list[str]]


def every(_: Fields, layers: int) -> list[bool]:
    """Every layer has experts."""
    return [True] * layers


def after_first(fields: Fields, layers: int) -> list[bool]:
    """All but the first ones; a list for each layer goes first where there is one."""
    if kinds := fields.words("mlp_layer_types", layers):
        return [kind not in ("dense",) for kind in kinds]
    if listed := fields.numbers("moe_layer_freq", layers):
        return [bool(number) for number in listed]
    first = fields.maybe("first_k_dense_replace", "num_dense_layers", "moe_layer_num_skipped")
    step = max(fields.maybe("moe_layer_freq", default=1), 1)
    return [index >= first and index % step == 0 for index in range(layers)]


def sparse_steps(fields: Fields, layers: int) -> list[bool]:
    """Every `decoder_sparse_step`-th layer, but those that `mlp_only_layers` names (Qwen)."""
    step, dense = max(fields.maybe("decoder_sparse_step", default=1), 1), fields.places("mlp_only_layers") or set()
    return [index not in dense and (index + 1) % step == 0 for index in range(layers)]


def interleaved(fields: Fields, layers: int) -> list[bool]:
    """The layers that `moe_layers` names, else every `interleave_moe_layer_step`-th (Llama 4)."""
    listed, step = fields.places("moe_layers"), max(fields.maybe("interleave_moe_layer_step", default=1), 1)
    if listed is not None:
        return [index in listed for index in range(layers)]
    return [(index + 1) % step == 0 for index in range(layers)]


def periodic(fields: Fields, layers: int) -> list[bool]:
    """Every `expert_layer_period`-th, from `expert_layer_offset` on (Jamba)."""
    period, offset = fields.count("expert_layer_period"), fields.maybe("expert_layer_offset")
    return [index % period == offset % period for index in range(layers)]


def between(fields: Fields, layers: int) -> list[bool]:
    """From `moe_layer_start_index` to `moe_layer_end_index`, every `moe_layer_interval`-th (ERNIE 4.5)."""
    first, last = fields.maybe("moe_layer_start_index"), fields.get("moe_layer_end_index")
    last = layers - 1 if last in (None, -1) else fields.maybe("moe_layer_end_index")
    step = max(fields.maybe("moe_layer_interval", default=1), 1)
    return [first <= index <= last and (index + 1) % step == 0 for index in range(layers)]


def pattern_experts(fields: Fields, layers: int) -> list[bool]:
    """The letters E of a pattern (Nemotron-H)."""
    return [kind == "experts" for kind in pattern(fields, layers)]


def alike(_: Fields, layers: int) -> list[str]:
    """All layers have the same mixer."""
    return ["full_attention"] * layers


def listed(fields: Fields, layers: int) -> list[str]:
    """The kind of each layer by `layer_types`; all are full attention if it is missing."""
    return fields.words("layer_types", layers) or alike(fields, layers)


def every_fourth_full(fields: Fields, layers: int) -> list[str]:
    """Linear attention, and every `full_attention_interval`-th layer full attention (Qwen3-Next)."""
    step = max(fields.maybe("full_attention_interval", default=4), 1)
    return fields.words("layer_types", layers) or [
        "linear_attention" if (index + 1) % step else "full_attention" for index in range(layers)
    ]


def grouped_full(fields: Fields, layers: int) -> list[str]:
    """Linear attention, and the last layer of each group full attention (Ling 3)."""
    step = fields.count("layer_group_size")
    return fields.words("layer_types", layers) or [
        "linear_attention" if (index + 1) % step else "full_attention" for index in range(layers)
    ]


def kimi_lists(fields: Fields, layers: int) -> list[str]:
    """`layer_types`, or the lists of `linear_attn_config`, which count from 1 (Kimi Linear)."""
    if kinds := fields.words("layer_types", layers):
        return kinds
    full = fields.places("linear_attn_config.full_attn_layers")
    if full is None:
        fields.refuse("it has neither layer_types nor linear_attn_config.full_attn_layers")
    return ["full_attention" if index + 1 in full else "linear_attention" for index in range(layers)]


def alternating(fields: Fields, layers: int) -> list[str]:
    """`layer_types`, or `attn_type_list` with 1 for full attention (MiniMax-Text-01)."""
    if kinds := fields.words("layer_types", layers):
        return kinds
    numbers = fields.numbers("attn_type_list", layers) or [(index + 1) % 2 for index in range(layers)]
    return ["full_attention" if number else "linear_attention" for number in numbers]


def sliding_pattern(fields: Fields, layers: int) -> list[str]:
    """`layer_types`, or `hybrid_layer_pattern` with 1 for a sliding layer (MiMo-V2)."""
    if kinds := fields.words("layer_types", layers):
        return kinds
    numbers = fields.numbers("hybrid_layer_pattern", layers)
    numbers = numbers or [int(index > 0 and (index + 1) % 6 > 0) for index in range(layers)]
    return ["sliding_attention" if number else "full_attention" for number in numbers]


def attention_period(fields: Fields, layers: int) -> list[str]:
    """Mamba, and every `attn_layer_period`-th layer attention (Jamba)."""
    period, offset = fields.count("attn_layer_period"), fields.maybe("attn_layer_offset")
    return ["full_attention" if index % period == offset % period else "mamba" for index in range(layers)]


def convolutions(fields: Fields, layers: int) -> list[str]:
    """`layer_types`, or convolutions except for the layers in `full_attn_idxs` (LFM2)."""
    if kinds := fields.words("layer_types", layers):
        return kinds
    full = fields.places("full_attn_idxs")
    if full is None:
        fields.refuse("it has neither layer_types nor full_attn_idxs")
    return ["full_attention" if index in full else "conv" for index in range(layers)]


def indexer_kinds(fields: Fields, layers: int) -> list[str]:
    """Latent attention; layers that use the indexer of the layer before have none of their own (GLM-5.2)."""
    kinds = fields.words("indexer_types", layers) or ["full"] * layers
    return ["shared_indexer" if kind == "shared" else "full_attention" for kind in kinds]


_RATES = {"sliding_attention": "0", "compressed_sparse_attention": "4", "heavily_compressed_attention": "128"}


def compression_rates(fields: Fields, layers: int) -> list[str]:
    """How many tokens share a vector of the cache, in each layer; 0: the layer has a window only (DeepSeek-V4)."""
    if kinds := fields.words("layer_types", layers):
        if not set(kinds) <= set(_RATES):
            fields.refuse(f"layer_types must be of {', '.join(_RATES)}")
        return [_RATES[kind] for kind in kinds]
    rates = fields.numbers("compress_ratios", layers)
    if rates is None or not set(rates) <= {0, 4, 128}:
        fields.refuse("compress_ratios must have 0, 4 or 128 for each layer")
    return [str(rate) for rate in rates]


def indexed(fields: Fields, layers: int) -> list[str]:
    """`layer_types`, or a 1 of `sparse_attention_freq` for a layer with an indexer (MiniMax-M3)."""
    if kinds := fields.words("layer_types", layers):
        return ["full_attention" if kind == "full_attention" else "indexed_attention" for kind in kinds]
    frequency = fields.get("sparse_attention_config.sparse_attention_freq")
    if not isinstance(frequency, list) or len(frequency) < layers:
        fields.refuse("it has neither layer_types nor sparse_attention_config.sparse_attention_freq")
    return ["indexed_attention" if number == 1 else "full_attention" for number in frequency[:layers]]


_LETTERS = {"M": "mamba", "*": "full_attention", "E": "experts", "-": "mlp"}
_WORDS = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "full_attention",
    "full_attention": "full_attention",
    "moe": "experts",
    "mlp": "mlp",
}


def pattern(fields: Fields, layers: int) -> list[str]:
    """A letter or word for each layer, which is one of mamba, full_attention, experts and mlp (Nemotron-H)."""
    letters, words = fields.get("hybrid_override_pattern"), fields.get("layers_block_type")
    if isinstance(letters, str) and len(letters) >= layers and set(letters) <= set(_LETTERS):
        return [_LETTERS[letter] for letter in letters[:layers]]
    if not isinstance(words, list) or len(words) < layers or not set(map(str, words)) <= set(_WORDS):
        fields.refuse("its hybrid_override_pattern must have one of M, *, E and - for each layer")
    return [_WORDS[word] for word in words[:layers]]
