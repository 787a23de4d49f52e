"""Find the preset that a capture's name of its model means."""

import re

from moetrace.spec import Model, check_shape, list_presets, load_model
from moetrace.spec.model_files.quantization import named_bits, precision_name

# Releases of other bits than those that their names begin with, and the preset of their shape and bits. The first is
# quantized to 4 bits by its maker (config.json of moonshotai/Kimi-K2-Thinking on Hugging Face).
_RELEASES = {"kimi-k2-thinking": "kimi-k2.5"}


def model_name(
    where: str,
    said: str,
    layers: int,
    experts: int,
    model: str | None = None,
    *,
    sized: bool = False,
    part: bool = False,
) -> str:
    """The preset that is meant: `model` if given, else the longest whose name is part of `said` and that fits.

    A name that says a precision (FP8, AWQ, MXFP4, Q4_K_M, BF16) means no preset of other bits, unless the trace is
    `sized`: it holds the bytes of its experts, which then count. If no preset is meant, the name itself, or "unknown".
    Raises UsageError, beginning with `where`, if `model` (a preset or a TOML file) has other layers or experts; the
    layers may be a `part` of the model's.
    """
    if model is not None:
        spec = load_model(model)
        if not (part and experts == spec.most_experts):
            check_shape(where, layers, experts, spec)
        return spec.name
    for name in presets_in(said):
        spec = load_model(name)
        if (spec.moe_layers, spec.most_experts) == (layers, experts) and (sized or _same_bits(said, name, spec)):
            return name
    return said[:200] or "unknown"


def presets_in(said: str) -> list[str]:
    """The presets whose names are part of what a source calls its model, the longest first; a release's own before."""
    plain = _plain(said)
    names = [name for name in sorted(list_presets("models"), key=len, reverse=True) if _plain(name) in plain]
    return [preset for release, preset in _RELEASES.items() if release in plain] + names


def other_bits(said: str, layers: int, experts: int) -> str | None:
    """Why a model that is called `said` means no preset, if only its bits differ from those of one; else None."""
    fitting = [(name, load_model(name)) for name in presets_in(said)]
    fitting = [pair for pair in fitting if (pair[1].moe_layers, pair[1].most_experts) == (layers, experts)]
    if not fitting or any(_same_bits(said, name, spec) for name, spec in fitting):
        return None
    name, spec = fitting[0]
    return (
        f"its model is called {said[:200]!r}, and the preset {name} is of {spec.weight_bits:g} bits a weight, so its "
        f"bytes are not known: name a model of its bits with --model (a TOML, config.json or GGUF file, or the preset "
        f"{name} if those bits are right)."
    )


def _same_bits(said: str, name: str, spec: Model) -> bool:
    """Whether the preset `name` has the bits in a name; a name without bits means the preset's own."""
    rest = _plain(said).replace(_plain(name), " ")
    return precision_name(rest) is None or spec.weight_bits == named_bits(rest)


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.lower())
