"""The parts of a layer beside its MLP: attention and its replacements, in weights and in bytes of KV cache.

Each function takes the fields of a config.json and the kind of the layer, as `layer_kinds.py` names it. Biases, norms
and vectors are left out; a matrix is left out nowhere. Windows are not modelled: a sliding layer counts as a full one.
"""

from collections.abc import Callable
from typing import NamedTuple

from moetrace.spec.model_files.anatomy import CACHE_BYTES
from moetrace.spec.model_files.json_fields import Fields


class Mixer(NamedTuple):
    """Weights, and bytes of KV cache of one token."""

    params: int
    kv_bytes: float


def grouped_attention(fields: Fields, _: str = "") -> Mixer:
    """Attention with groups of query heads: q, k, v and o."""
    hidden, heads, head_dim = _heads(fields)
    return _grouped(hidden, heads, fields.maybe("num_key_value_heads", default=heads), head_dim, head_dim)


def gated_attention(fields: Fields, _: str = "") -> Mixer:
    """Attention whose output is gated by one more projection of the size of q (Qwen3-Next, AFMoE)."""
    hidden, heads, head_dim = _heads(fields)
    plain = grouped_attention(fields)
    return plain._replace(params=plain.params + hidden * heads * head_dim)


def head_gated_attention(fields: Fields, _: str = "") -> Mixer:
    """Attention with one gate for each head (Laguna)."""
    hidden, heads, _dim = _heads(fields)
    plain = grouped_attention(fields)
    return plain._replace(params=plain.params + hidden * heads)


def latent_attention(fields: Fields, kind: str = "") -> Mixer:
    """Multi-head latent attention (DeepSeek-V2), whose cache holds the compressed vector; with an indexer in V3.2.

    The keys of the indexer are not counted in the cache, and all tokens are read, not only those that it selects.
    """
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    rank, rope = fields.count("kv_lora_rank"), fields.maybe("qk_rope_head_dim")
    nope, value = fields.count("qk_nope_head_dim"), fields.count("v_head_dim")
    q_rank = fields.maybe("q_lora_rank")
    query = heads * (nope + rope)
    params = q_rank * (hidden + query) if q_rank else hidden * query
    params += hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    if (index_heads := fields.maybe("index_n_heads")) and kind != "shared_indexer":
        index_dim = fields.count("index_head_dim")
        params += (q_rank or hidden) * index_heads * index_dim + hidden * (index_dim + index_heads)
    if fields.flag("mla_use_output_gate"):  # Kimi-K3
        params += hidden * heads * value
    return Mixer(params, (rank + rope) * CACHE_BYTES)


def gemma_attention(fields: Fields, kind: str) -> Mixer:
    """Gemma 4: full layers have heads of another size, and may use their keys as values."""
    for name in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
        if fields.maybe(name):
            fields.refuse(f"{name} is not 0, which this reader does not know")
    hidden, heads, head_dim = _heads(fields)
    kv_heads = fields.maybe("num_key_value_heads", default=heads)
    if kind != "full_attention":
        return _grouped(hidden, heads, kv_heads, head_dim, head_dim)
    full = _overrides(fields)  # how Transformers writes it; released files have global_head_dim
    head_dim = full.maybe("head_dim") or fields.maybe("global_head_dim") or head_dim
    if not fields.flag("attention_k_eq_v"):
        return _grouped(hidden, heads, kv_heads, head_dim, head_dim)
    kv_heads = full.maybe("num_key_value_heads") or fields.maybe("num_global_key_value_heads") or kv_heads
    full = _grouped(hidden, heads, kv_heads, head_dim, head_dim)
    return full._replace(params=full.params - hidden * kv_heads * head_dim)


def mimo_attention(fields: Fields, kind: str) -> Mixer:
    """MiMo-V2: values have a width of their own; sliding layers have other numbers of heads."""
    prefix = "swa_" if kind == "sliding_attention" else ""
    hidden, heads, head_dim = _heads(fields)
    kv_heads = fields.maybe("num_key_value_heads", default=heads)
    value_dim = fields.maybe("v_head_dim", default=head_dim)
    if prefix:
        heads = fields.maybe("swa_num_attention_heads", default=heads)
        kv_heads = fields.maybe("swa_num_key_value_heads", default=2 * kv_heads)
        head_dim = fields.maybe("swa_head_dim", default=head_dim)
        value_dim = fields.maybe("swa_v_head_dim", default=value_dim)
    return _grouped(hidden, heads, kv_heads, head_dim, value_dim)


def delta_net(fields: Fields, _: str = "") -> Mixer:
    """Gated DeltaNet (Qwen3-Next, Qwen3.5): a state and no KV cache."""
    hidden = fields.count("hidden_size")
    value_heads = fields.count("linear_num_value_heads")
    keys = fields.count("linear_num_key_heads") * fields.count("linear_key_head_dim")
    values = value_heads * fields.count("linear_value_head_dim")
    convolved = 2 * keys + values
    params = hidden * (convolved + values + 2 * value_heads) + convolved * fields.count("linear_conv_kernel_dim")
    return Mixer(params + values * hidden, 0.0)


def kimi_delta(fields: Fields, _: str = "") -> Mixer:
    """Kimi Delta Attention: q, k, v, o, two gates of low rank (in K3, one) and one of a number for each head."""
    hidden = fields.count("hidden_size")
    heads = fields.count("linear_attn_config.num_heads", "linear_num_heads", "num_attention_heads")
    dim = fields.count("linear_attn_config.head_dim", "linear_head_dim", "head_dim")
    kernel = fields.count("linear_attn_config.short_conv_kernel_size", "linear_conv_kernel_dim")
    wide = heads * dim
    low_rank = hidden * dim + dim * wide
    output_gate = hidden * wide if fields.get("linear_attn_config.use_full_rank_gate") is True else low_rank
    gates = low_rank + output_gate + hidden * heads
    return Mixer(4 * hidden * wide + 3 * wide * kernel + gates, 0.0)


def ling_delta(fields: Fields, _: str = "") -> Mixer:
    """The delta attention of Ling 3: q, k, v, o, two gates of full rank and one of a number for each head."""
    hidden, heads = fields.count("hidden_size"), fields.count("linear_num_heads", "num_attention_heads")
    wide = heads * fields.count("linear_head_dim", "head_dim")
    return Mixer(6 * hidden * wide + 3 * wide * fields.count("short_conv_kernel_size") + hidden * heads, 0.0)


def ling_attention(fields: Fields, _: str = "") -> Mixer:
    """The latent attention of Ling 3, with one gate for each head."""
    plain = latent_attention(fields)
    return plain._replace(params=plain.params + fields.count("hidden_size") * fields.count("num_attention_heads"))


def lightning_attention(fields: Fields, _: str = "") -> Mixer:
    """The linear attention of MiniMax-Text-01: q, k, v, o and an output gate."""
    hidden, heads, head_dim = _heads(fields)
    return Mixer(5 * hidden * heads * head_dim, 0.0)


def mamba2(fields: Fields, _: str = "") -> Mixer:
    """A Mamba-2 block (Granite 4, Nemotron-H)."""
    hidden, heads = fields.count("hidden_size"), fields.count("mamba_n_heads", "mamba_num_heads")
    dim = fields.get("mamba_d_head", "mamba_head_dim")
    inner = fields.maybe("mamba_expand", default=2) * hidden if dim in (None, "auto") else None
    inner = inner or heads * fields.count("mamba_d_head", "mamba_head_dim")
    states = fields.count("mamba_n_groups", "n_groups") * fields.count("mamba_d_state", "ssm_state_size")
    convolved = inner + 2 * states
    kernel = fields.count("mamba_d_conv", "conv_kernel")
    return Mixer(hidden * (inner + convolved + heads) + convolved * kernel + inner * hidden, 0.0)


def mamba1(fields: Fields, _: str = "") -> Mixer:
    """A Mamba block of the first kind (Jamba)."""
    hidden = fields.count("hidden_size")
    inner, state = fields.count("mamba_expand") * hidden, fields.count("mamba_d_state")
    rank = fields.get("mamba_dt_rank")
    rank = -(-hidden // 16) if rank in (None, "auto") else fields.count("mamba_dt_rank")
    params = hidden * 2 * inner + inner * fields.count("mamba_d_conv") + inner * (rank + 2 * state)
    return Mixer(params + rank * inner + inner * state + inner * hidden, 0.0)


def short_convolution(fields: Fields, _: str = "") -> Mixer:
    """The gated short convolution of LFM2."""
    hidden = fields.count("hidden_size")
    return Mixer(4 * hidden * hidden + hidden * fields.count("conv_L_cache"), 0.0)


def compressed_attention(fields: Fields, kind: str) -> Mixer:
    """DeepSeek-V4: one key for all heads, which is its value, too; most layers keep one vector for some tokens."""
    hidden, heads, dim = _heads(fields)
    q_rank, groups, o_rank = fields.count("q_lora_rank"), fields.count("o_groups"), fields.count("o_lora_rank")
    streams = fields.count("hc_mult")  # of the residual, mixed before and after attention and MLP
    params = hidden * q_rank + q_rank * heads * dim + hidden * dim + o_rank * heads * dim + groups * o_rank * hidden
    params += 2 * (streams * streams + 2 * streams) * streams * hidden
    rate = int(kind)
    if rate:
        # Two halves overlap where few tokens share a vector, and an indexer selects among these.
        overlap = 2 if rate < 32 else 1
        params += overlap * dim * (2 * hidden + rate)
        if overlap == 2:
            index_heads, index_dim = fields.count("index_n_heads"), fields.count("index_head_dim")
            params += overlap * index_dim * (2 * hidden + rate) + q_rank * index_heads * index_dim
            params += hidden * index_heads
    return Mixer(params, dim * CACHE_BYTES / max(rate, 1))


def indexed_attention(fields: Fields, kind: str) -> Mixer:
    """MiniMax-M3: attention, and in most layers an indexer that selects blocks of tokens; all are read here."""
    plain, hidden = grouped_attention(fields), fields.count("hidden_size")
    if kind != "indexed_attention":
        return plain
    heads = fields.count("sparse_attention_config.sparse_num_index_heads", "index_n_heads")
    dim = fields.count("sparse_attention_config.sparse_index_dim", "index_head_dim")
    return plain._replace(params=plain.params + hidden * dim * (heads + 1))


def nothing(_: Fields, __: str = "") -> Mixer:
    """A layer of Nemotron-H that is an MLP or experts only."""
    return Mixer(0, 0.0)


Mix = Callable[[Fields, str], Mixer]


def _heads(fields: Fields) -> tuple[int, int, int]:
    """Hidden size, query heads, and numbers in a head."""
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    return hidden, heads, fields.maybe("head_dim", "attention_head_dim") or hidden // heads


def _overrides(fields: Fields) -> Fields:
    """The fields that `per_layer_config` gives the layers that it names, which must be equal for all of them."""
    layers = fields.get("per_layer_config")
    changes = list(layers.values()) if isinstance(layers, dict) else []
    if not all(isinstance(each, dict) and each == changes[0] for each in changes):
        fields.refuse("per_layer_config must be equal for all layers that it names")
    return Fields(fields.where, changes[0] if changes else {}, {})


def _grouped(hidden: int, heads: int, kv_heads: int, key_dim: int, value_dim: int) -> Mixer:
    params = hidden * (heads * key_dim + kv_heads * (key_dim + value_dim) + heads * value_dim)
    return Mixer(params, kv_heads * (key_dim + value_dim) * CACHE_BYTES)
