"""How many bits a weight takes, from what a config.json says of its dtype and quantization."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrace.spec.model_files.json_fields import MAX_CONFIG_BYTES, read_json

# Names that say a model is not of 16 bits: Qwen3-30B-A3B-FP8, ...-AWQ, ...-w4a16, ...-W4AFP8, ...-Q4_K_M, ...-4bit.
_QUANTIZED = re.compile(
    r"(?<![a-z0-9])(?P<name>fp8|fp4|fp6|f8|e4m3(?:fn)?|e5m2|nvfp4|mxfp[468]|ptpc|awq|gptq|gguf|bnb|bitsandbytes|hqq|exl[23]|"
    r"aqlm|quip|autoround|higgs|vptq|spqr|eetq|quark|bitnet|ternary|dwq|nf4|u?int[ _]?[2348]|i?q[2-8](?:_[0-9a-z]+)*|"
    r"dq[2-8](?:_[0-9a-z]+)*|tq[12](?:[_ ]0)?|w[2-8](?:a(?:4|8|16|fp8|fp4|int8|int4))?|[1-8](?:\.[0-9]+)?[- ]?bits?|"
    r"[1-8](?:\.[0-9]+)?bpw|quantized|dynamic[- ]?quant|marlin|torchao|smoothquant|mixed [2-8] [2-8])(?![a-z0-9])"
)
# Names that say it is not quantized, as of gpt-oss-20b-BF16, whose release is of 4 bits.
_PLAIN = re.compile(r"(?<![a-z0-9])(?P<name>bf16|fp?16|fp?32|bfloat16|float(?:16|32))(?![a-z0-9])")
_WIDTHS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8}
# Letters of a listed name that are searched: the time of the search below grows with their square.
_MOST_LETTERS = 300
_ATTENTION = re.compile(r"(?:attn|attention)(?![^/]*(?:norm|index))")


def quantized_name(name: str) -> str | None:
    """The part of a model's name that says it is quantized (`fp8`, `awq`, `q4_k_m`); None if no part does."""
    return _part_of(_QUANTIZED, name)


def precision_name(name: str) -> str | None:
    """The part of a model's name that says its bits, quantized or not (`fp8`, `bf16`); None if no part does."""
    return quantized_name(name) or _part_of(_PLAIN, name)


def named_bits(name: str) -> float | None:
    """Bits of a weight that a name says surely, None if none: those of `int4` depend on its groups."""
    known = {"mxfp4": 4.25, "nvfp4": 4.5, "fp8": 8.0, "f8": 8.0, "e4m3": 8.0, "e4m3fn": 8.0, "int8": 8.0}
    part = precision_name(name)
    if part is None or quantized_name(name) is not None:
        return known.get(part or "")
    return 32.0 if part.endswith("32") else 16.0


def _part_of(pattern: re.Pattern[str], name: str) -> str | None:
    found = pattern.search(re.sub(r"[\s/]+", "-", name.lower()).replace("-", " "))
    return found["name"] if found else None


def bits_of(config: Mapping[str, Any], name: str, folder: Path) -> dict[str, float]:
    """`weight_bits` and `dense_weight_bits` of a config.json; nothing where they cannot be known.

    Scales of groups of weights are counted, those of blocks of 128 x 128 and of whole rows are not. The dense weights
    are of 16 bits if the list of modules that were not quantized names the attention, else of the same bits as the
    experts.
    """
    inner = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), {})
    quantization = _first(config, inner, "quantization_config", "quantization", "compression_config")
    plain = _WIDTHS.get(str(_first(inner, config, "dtype", "torch_dtype")).removeprefix("torch."), 16)
    if quantization is None:
        quantization = _beside(folder)
    if quantization is None:
        if quantized_name(name) is not None:
            return {"dense_weight_bits": plain}
        return {"weight_bits": plain, "dense_weight_bits": plain}
    bits = _quantized_bits(quantization)
    names = ("modules_to_not_convert", "ignore", "exclude_modules")
    left_out = next((quantization[each] for each in names if isinstance(quantization.get(each), list)), [])
    plain_attention = any(_ATTENTION.search(str(each)[:_MOST_LETTERS]) for each in left_out)
    plain_attention = plain_attention or quantization.get("quant_method") == "mxfp4"
    dense = plain if plain_attention or bits is None else bits
    if quantization.get("quant_method") == "bitsandbytes" and _fused_experts(config):
        bits = plain
    if config.get("expert_dtype") == "fp4" and bits == 8:
        bits = 4.25  # DeepSeek-V4: MXFP4 experts, and FP8 beside them
    return ({} if bits is None else {"weight_bits": bits}) | {"dense_weight_bits": dense}


def _fused_experts(config: Mapping[str, Any]) -> bool:
    """Whether Transformers 5 or later wrote this, which keeps a layer's experts as two tensors.

    bitsandbytes replaces linear layers only, so that it leaves such experts as they are.
    """
    major = str(config.get("transformers_version", "")).partition(".")[0]
    return major.isdecimal() and len(major) < 3 and int(major) >= 5


def _quantized_bits(quantization: Mapping[str, Any]) -> float | None:
    """Bits of a quantized weight with the scales of its group, or None if the method is not known."""
    method = str(quantization.get("quant_method", quantization.get("quant_algo", ""))).lower()
    if method == "modelopt":
        method = str(quantization.get("quant_algo", "")).lower()
    named = {"fp8": 8.0, "fbgemm_fp8": 8.0, "mxfp4": 4.25, "nvfp4": 4.5, "w4a8_mxfp4_fp8": 4.25, "mxfp8": 8.25}
    if method in named:
        return named[method]
    if method == "bitsandbytes":
        if quantization.get("load_in_4bit") is True:  # 4 bit, and a scale for each 64 weights
            return 4.0 + (8 / 64 if quantization.get("bnb_4bit_use_double_quant") is True else 32 / 64)
        return 8.0 if quantization.get("load_in_8bit") is True else None
    if method == "compressed-tensors":
        return _compressed_bits(quantization)
    if method in ("awq", "gptq", "auto-round", "auto_round", "autoround"):
        return _grouped(quantization.get("bits", quantization.get("w_bit")), quantization.get("group_size"), zeros=True)
    if "bits" in quantization and not method:  # MLX: a scale and a bias of 16 bit for each group
        mode = str(quantization.get("mode", "affine"))
        if mode in named:
            return named[mode]
        return _grouped(quantization["bits"], quantization.get("group_size", 64), biases=True)
    return None


def _compressed_bits(quantization: Mapping[str, Any]) -> float | None:
    """Bits of the one group of weights of compressed-tensors; None if there are groups of different widths."""
    groups, found = quantization.get("config_groups"), set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            return None
        form = str(group.get("format") or quantization.get("format"))
        if form.startswith(("nvfp4", "mxfp4")):
            found.add(4.5 if form.startswith("nvfp4") else 4.25)
            continue
        grouped = weights.get("strategy") in ("group", "tensor_group") and weights.get("group_size")
        zeros = grouped and weights.get("symmetric") is False
        found.add(_grouped(weights.get("num_bits"), grouped or None, zeros=bool(zeros)))
    return found.pop() if len(found) == 1 else None


def _grouped(bits: Any, group: Any, zeros: bool = False, biases: bool = False) -> float | None:
    """Bits with, for each group of weights, a scale of 16 bit, and a zero point or a bias."""
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 1 <= bits <= 16:
        return None
    if isinstance(group, bool) or not isinstance(group, int) or not 1 <= group <= 1 << 20:
        return float(bits)
    return bits + (16 + (bits if zeros else 0) + (16 if biases else 0)) / group


def _first(first: Mapping[str, Any], second: Mapping[str, Any], *names: str) -> Any:
    for source in (first, second):
        for name in names:
            if source.get(name) is not None:
                value = source[name]
                return value if isinstance(value, Mapping) or not name.endswith(("config", "quantization")) else None
    return None


def _beside(folder: Path) -> Mapping[str, Any] | None:
    """The content of ModelOpt's `hf_quant_config.json`; None if there is no such file."""
    path = folder / "hf_quant_config.json"
    if not path.is_file():
        return None
    found = read_json(path, MAX_CONFIG_BYTES).get("quantization")
    return found if isinstance(found, Mapping) else None
