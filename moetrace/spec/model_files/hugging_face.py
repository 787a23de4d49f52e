"""Read a model from the `config.json` of a Hugging Face folder; the code that such a file may name is never run."""

from pathlib import Path
from typing import Any

from moetrace.spec.errors import MoetraceError, printable
from moetrace.spec.load import MAX_NAME
from moetrace.spec.model_files.anatomy import Anatomy, Layer, fields_of
from moetrace.spec.model_files.families import ALIASES, FAMILIES, Family
from moetrace.spec.model_files.json_fields import MAX_CONFIG_BYTES, MAX_LAYERS, Fields, read_json
from moetrace.spec.model_files.quantization import bits_of
from moetrace.spec.model_files.safetensors_index import stored_bits
from moetrace.spec.named import nearest

# Layers that predict further tokens, as DeepSeek and GLM, Qwen, and MiniMax call them.
_MTP_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")


def read_folder(path: Path) -> dict[str, Any]:
    """The fields of a `Model` from the config.json at `path` and, if they are beside it, the headers of the weights.

    `weight_bits` is missing if the name says that the model is quantized, but no file says how.

    Raises:
        MoetraceError: The file is not JSON, or not that of a MoE model that is known, or its numbers make no sense.
    """
    whole = read_json(path, MAX_CONFIG_BYTES)
    name = name_of(path)
    try:
        family, fields = family_of(path, whole)
        anatomy = anatomy_of(family, fields)
        values = {"name": name} | fields_of(anatomy, str(path)) | bits_of(whole, name, path.parent)
    except RecursionError:  # a value that is nested nearly as deep as JSON may be
        raise MoetraceError(f"Cannot read {path}: its JSON is nested too deep.") from None
    return values | stored_bits(path.parent, anatomy)


def name_of(path: Path) -> str:
    """Name of the model of a file: the folder's, the repository's in Hugging Face's cache, or the file's own."""
    try:
        path = path.resolve() if path.name != "config.json" else path.parent.resolve() / path.name
    except (OSError, RuntimeError):
        path = path.absolute()
    folder = path.parent
    if path.name != "config.json":
        name = path.stem.removesuffix("_config").replace("--", "/")
    elif folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        name = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    else:
        name = folder.name
    return printable(name).strip()[:MAX_NAME] or "unnamed"


def anatomy_of(family: Family, fields: Fields) -> Anatomy:
    """The parts of a model of a family, from the fields of its config.json.

    Raises:
        MoetraceError: A field is missing, or its value makes no sense.
    """
    count = _layers(fields)
    if count > MAX_LAYERS:
        fields.refuse(f"num_hidden_layers must be at most {MAX_LAYERS:,}, got {count:,}")
    experts = _each(fields, family.experts, count)
    if fields.get(*family.experts.split("|")) is None:  # some dense models have the model_type of their MoE kin
        fields.refuse(f"it has no {family.experts.replace('|', ' or ')}: the field is missing, or the model is dense")
    if max(experts) < 2:
        fields.refuse(f"it is dense, {family.experts.partition('|')[0]} says fewer than 2 experts")
    has_experts = [some and experts[index] > 0 for index, some in enumerate(family.has_experts(fields, count))]
    top_k, shared = _each(fields, family.top_k, count), _shared(family, fields, count)
    if not all(top_k[index] for index in range(count) if has_experts[index]):
        fields.refuse(f"it has no {family.top_k.replace('|', ' or ')} of at least 1")
    hidden, latent = fields.count("hidden_size"), fields.maybe(family.latent) if family.latent else 0
    kinds = family.kinds(fields, count)
    sizes = {kind: _mixer(family, fields, kind) for kind in sorted(set(kinds))}
    layers = []
    for index, kind in enumerate(kinds):
        if has_experts[index]:
            beside = family.matrices * hidden * shared[index] + 2 * hidden * latent
            layers.append(Layer(*sizes[kind], 0, beside, experts[index] * hidden, experts[index], top_k[index]))
        else:
            # In Nemotron-H, a layer is a mixer, or experts, or an MLP; elsewhere, a mixer and one of the others.
            width = 0 if family.one_part and kind != "mlp" else _width(fields, family.dense_width)
            layers.append(Layer(*sizes[kind], family.matrices * hidden * width))
    head = fields.count("vocab_size") * hidden
    said = fields.get(*_MTP_LAYERS)
    mtp_layers = None if said is None else fields.maybe(*_MTP_LAYERS)
    return Anatomy(layers, hidden, latent or None, _width(fields, family.width), family.matrices, head, mtp_layers)


def family_of(path: Path, whole: dict[str, Any]) -> tuple[Family, Fields]:
    """The family of a config.json, and the fields of its language model."""
    kind, values = whole.get("model_type"), whole
    for outer in ("thinker_config", "text_config", "llm_config"):
        inner = values.get(outer)
        if isinstance(inner, dict):
            values = inner
            # The inner model may have a type that the outer one refines: Kimi-K3 is more than its kimi_linear.
            known = isinstance(kind, str) and ALIASES.get(kind, kind) in FAMILIES
            kind = kind if known else inner.get("model_type", kind)
    if not isinstance(kind, str):
        Fields(str(path), whole, {}).refuse("it has no model_type")
    family = FAMILIES.get(ALIASES.get(kind, kind))
    if family is None:
        plain = Fields(str(path), values, {})
        shown = printable(kind[:60])
        if not any("expert" in str(name) or str(name).startswith("moe") for name in values):
            plain.refuse(f"it is dense, no field of the model type {shown!r} names experts")
        plain.refuse(
            f"the model type {shown!r} is unknown{nearest(kind[:60], [*FAMILIES, *ALIASES])}; describe the model in "
            "a TOML file"
        )
    return family, Fields(str(path), values, family.defaults)


def _layers(fields: Fields) -> int:
    listed = fields.get("layers_block_type")
    if fields.get("num_hidden_layers") is None and isinstance(listed, list) and listed:
        return len(listed)  # Nemotron-H, as Transformers writes it
    return fields.count("num_hidden_layers")


def _mixer(family: Family, fields: Fields, kind: str) -> tuple[int, float]:
    make = family.mixers.get(kind) or family.mixers.get("")
    if make is None:
        fields.refuse(f"its layers of the kind {printable(kind[:60])!r} are unknown")
    return make(fields, kind)


def _each(fields: Fields, names: str, layers: int) -> list[int]:
    """A number for each layer, said once or in a list."""
    for name in names.split("|"):
        if (listed := fields.numbers(name, layers)) is not None:
            return listed
    return [fields.maybe(*names.split("|"))] * layers


def _width(fields: Fields, names: str) -> int:
    """A width that all layers share; said once, or in a list of one and the same number."""
    for name in names.split("|"):
        value = fields.get(name)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            return Fields(fields.where, {name: value[0]}, {}).count(name)
    return fields.count(*names.split("|"))


def _shared(family: Family, fields: Fields, layers: int) -> list[int]:
    """Width of the shared experts of each layer together."""
    if not family.shared_width:
        return [0] * layers
    if not family.shared_count:
        return [fields.maybe(*family.shared_width.split("|"))] * layers
    counts = _each(fields, family.shared_count, layers)
    return [number * _width(fields, family.shared_width) for number in counts] if any(counts) else [0] * layers
