"""The tables of docs/models.md: the presets, the bits of formats, and the families that a config.json may be of.

python bench/model_table.py     write them between their markers
"""

from collections.abc import Iterator
from pathlib import Path

from markers import replaced_between
from msgspec import UNSET

from moetrace.spec import list_presets, load_model
from moetrace.spec.model_files.bits import FORMATS, GGML_TYPES
from moetrace.spec.model_files.families import ALIASES, FAMILIES

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def page() -> str:
    """Return what the page should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in (
        ("presets", _presets()),
        ("bits", _bits()),
        ("few-bits", _few_bits()),
        ("ggml", _ggml()),
        ("families", _families()),
    ):
        text = replaced_between(text, name, "\n".join(lines))
    return text


def _presets() -> Iterator[str]:
    """Yield the table of the presets, with the sizes that follow from them."""
    numbers = (
        "MoE layers",
        "dense layers",
        "MTP layers",
        "experts",
        "top-k",
        "hidden",
        "width",
        "bits",
        "expert, MB",
        "experts, GB",
        "dense, GB",
    )
    yield f"| preset | {' | '.join(numbers)} |"
    yield "| --- |" + " --: |" * len(numbers)
    for name in list_presets("models"):
        model = load_model(name)
        sizes = model.expert_bytes()
        dense = (model.moe_layers * model.dense_bytes + model.head_bytes) / 1e9
        assert model.all_layers is not None
        mtp = "" if model.mtp_layers is UNSET else model.mtp_layers
        layers = f"{model.moe_layers} | {model.all_layers - model.moe_layers} | {mtp}"
        hidden = f"{model.hidden}" if model.expert_hidden == model.hidden else f"{model.hidden}, {model.expert_hidden}"
        shape = f"{layers} | {model.most_experts} | {model.most_top_k} | {hidden} | {model.expert_intermediate}"
        yield (
            f"| `{name}` | {shape} | {model.weight_bits:g} | {sizes.max() / 1e6:.1f} | {sizes.sum() / 1e9:,.1f} "
            f"| {dense:.2f} |"
        )


def _bits() -> Iterator[str]:
    """Yield the table of formats that a config.json may name."""
    yield "| format | bits | stored |"
    yield "| --- | --: | --- |"
    for form in FORMATS:
        yield f"| {form.name} | {form.bits:g} | {form.stored} |"


def _few_bits() -> Iterator[str]:
    """Yield the table of published bits and sizes beside those of the formula."""
    yield "| weights | by the formula | in the paper |"
    yield "| --- | --: | --: |"
    for bits, sparse, paper in ((3, 0, 3.02), (3, 0.0045, 3.24), (4, 0, 4.05), (4, 0.0045, 4.27)):
        table = {"weight_bits": {"bits": bits, "codebook_bits": 16, "sparse": sparse}}
        mlp = load_model("mixtral-8x7b", {"hidden": 4096, "expert_intermediate": 11008} | table)
        apart = f", {100 * sparse:.2f} % apart" if sparse else ""
        average = mlp.bits_of_experts().mean()
        yield f"| SqueezeLLM, MLP of LLaMA-7B, {bits} bit{apart} | {average:.3f} bits | {paper} bits |"
    size_gb = load_model("mixtral-8x7b", {"weight_bits": 8}).expert_bytes().sum() / 1e9
    yield f"| HAQ, experts of Mixtral-8x7B, 8 bit | {size_gb:.1f} GB | not given |"


def _ggml() -> Iterator[str]:
    """Yield the table of the types of GGUF tensors, by their bits."""
    yield "| type | bits | weights in a block | bytes of a block |"
    yield "| --- | --: | --: | --: |"
    for kind in sorted(GGML_TYPES.values(), key=lambda kind: (-kind.bits, kind.name)):
        yield f"| {kind.name} | {kind.bits:g} | {kind.block} | {kind.block_bytes} |"


def _families() -> Iterator[str]:
    """Yield one paragraph with every `model_type`."""
    yield ", ".join(f"`{name}`" for name in sorted([*FAMILIES, *ALIASES])) + "."


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
