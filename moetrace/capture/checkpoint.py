"""Load a Hugging Face causal language model from a folder: no network, no code of the model's, no pickle."""

import contextlib
import hashlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moetrace.capture.prompts import in_short
from moetrace.spec.errors import MoetraceError
from moetrace.trace.atomic import real_path

CONFIG_BYTES = 16 << 20
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


class ModelFolder(NamedTuple):
    """A folder with a model that can be loaded; nothing but its config.json was read."""

    path: Path
    config: Any  # transformers' configuration of the text model
    name: str  # of the model, from the folder's
    config_sha256: str


def open_folder(path: Path) -> ModelFolder:
    """Look at the folder of a model.

    Raises MoetraceError if it is not a model's folder, if only code of its own could run it, if its weights are pickled
    or missing, or if PyTorch or Transformers is not installed.
    """
    if not path.is_dir():
        raise MoetraceError(f"{path} is not a folder with a model." if path.exists() else f"there is no folder {path}.")
    data, fields = _read_config(path)
    _check_weights(path)
    _check_attention(path, fields)
    transformers = extra("transformers")
    extra("torch")
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        own = " and would need its own code, which is never run" if "auto_map" in fields else ""
        raise MoetraceError(
            f"{path}: transformers {transformers.__version__} does not know the model type {kind!r:.60}{own}."
        )
    with _quiet(transformers), _one_sentence(f"{path}: config.json does not describe a model"):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        config = config.get_text_config()
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise MoetraceError(f"{path}: config.json gives no vocab_size, so this is not a language model.")
    return ModelFolder(path, config, _name(real_path(path)), hashlib.sha256(data).hexdigest())


def load_tokenizer(folder: ModelFolder) -> Any:
    """The tokenizer in a model's folder; raise MoetraceError if none can be loaded."""
    transformers = extra("transformers")
    # Without a vocabulary, Transformers makes an empty tokenizer for some models.
    if not any(file for pattern in VOCABULARIES for file in folder.path.glob(pattern)):
        raise MoetraceError(f"{folder.path} holds no tokenizer, which prompts of text need: give token_ids in JSONL.")
    with _quiet(transformers), _one_sentence(f"{folder.path} holds no tokenizer that can be loaded"):
        return transformers.AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)


def load_weights(folder: ModelFolder, dtype: str, device: str) -> Any:
    """The model in a folder as a PyTorch module, for inference.

    `dtype` is one of `DTYPES`, auto meaning the checkpoint's own; `device` is PyTorch's name of one, auto meaning cuda
    where there is one. Raises MoetraceError if that fails, or if the checkpoint lacks weights: Transformers would fill
    them with random numbers.
    """
    torch, transformers = extra("torch"), extra("transformers")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    with _one_sentence(f"the device {device!r:.40} can't be used"):
        torch.empty(1, device=device).cpu()  # now, not after minutes of loading
    with _quiet(transformers), _one_sentence(f"{folder.path} can't be loaded as a causal language model"):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder.path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **({"experts_implementation": "eager"} if dtype == "float64" else {}),  # the grouped one knows no float64
        )
    for what, names in (("lacks", report["missing_keys"]), ("has another shape of", report["mismatched_keys"])):
        if names:
            first = sorted(map(str, names))[0]
            raise MoetraceError(f"{folder.path}: the checkpoint {what} {len(names)} of the weights, such as {first}.")
    with _one_sentence(f"the model does not fit the device {device!r:.40}"):
        return model.to(torch.device(device)).eval()


def extra(name: str) -> Any:
    """The module `name` of the extra [capture]; raise MoetraceError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MoetraceError(
            "a capture needs PyTorch and Transformers: pip install '.[capture]' in the clone of moetrace."
        ) from error


def _read_config(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of config.json, and what they say."""
    file = path / "config.json"
    if not file.is_file():
        raise MoetraceError(f"{path} has no config.json, so it is not the folder of a Hugging Face model.")
    if file.stat().st_size > CONFIG_BYTES:
        raise MoetraceError(f"{file} has {file.stat().st_size} bytes; at most {CONFIG_BYTES} are read.")
    data = file.read_bytes()
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MoetraceError(f"{file} is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise MoetraceError(f"{file} is not a JSON object.")
    return data, fields


def _check_weights(path: Path) -> None:
    if (path / "adapter_config.json").exists():
        raise MoetraceError(f"{path} holds an adapter (adapter_config.json): merge it into its model first.")
    if any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return
    if pickled := sorted(file.name for suffix in ("bin", "pt", "pth") for file in path.glob(f"*.{suffix}")):
        raise MoetraceError(
            f"{path} holds pickled weights ({pickled[0]}), which can run code and are never read: convert them to "
            f"safetensors."
        )
    raise MoetraceError(f"{path} has no model.safetensors, nor model.safetensors.index.json.")


def _check_attention(path: Path, fields: dict[str, Any]) -> None:
    """Raise if a config names attention of some repository, whose code Transformers would download and run."""
    held: list[dict[str, Any]] = [fields]
    while held:
        for key, value in held.pop().items():
            named = list(value.values()) if isinstance(value, dict) else [value]
            foreign = [name for name in named if isinstance(name, str) and "/" in name]
            if key.endswith("attn_implementation") and foreign:
                raise MoetraceError(
                    f"{path}: config.json asks for the attention {foreign[0][:100]!r}, code from elsewhere, which is "
                    f"never run: remove {key} from it."
                )
            held += [value] if isinstance(value, dict) else []


def _name(path: Path) -> str:
    """The model's name: the folder's, or that of the repository whose snapshot it is in Hugging Face's cache."""
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.name


@contextlib.contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn any error of another library in the block into one sentence: there is no list of its errors."""
    try:
        yield
    except MoetraceError:
        raise
    except Exception as error:
        raise MoetraceError(f"{what}: {in_short(error)}.") from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep Transformers from printing reports and bars of its own inside the block."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
