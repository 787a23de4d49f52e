"""Models from the user's own files: a Hugging Face `config.json`, a safetensors index beside it, or a GGUF file.

Only descriptions are read, never weights, and nothing that a file names is executed. The names that a family of models
gives its sizes are in `families.py`; `anatomy.py` turns any of them into the fields of a model.
"""

import stat
from pathlib import Path

from moetrace.spec.errors import MoetraceError
from moetrace.spec.load import Loaded

CONFIG = "config.json"
SUFFIXES = (".json", ".gguf", ".safetensors")


def is_model_file(source: object) -> bool:
    """Whether `source` is meant as the file or folder of a model, and not as a preset or a TOML file.

    That is a path that ends in .json, .gguf or .safetensors, or an existing folder that a `Path` or a text with a slash
    names; `.` and `..` are folders, too.
    """
    if not isinstance(source, str | Path):
        return False
    text = str(source)
    if text.lower().endswith(SUFFIXES):
        return True
    named = isinstance(source, Path) or "/" in text or "\\" in text or text in (".", "..")
    try:
        return named and not text.endswith(".toml") and Path(text).is_dir()
    except (OSError, ValueError):
        return False


def read_model_file(source: str | Path) -> Loaded:
    """Read the fields of a model from its own files; which, the name says.

    Args:
        source: A folder with a `config.json` or a GGUF file, or one of these files, or a safetensors file or index with
            a `config.json` beside it.

    Returns:
        The fields of a `Model` as plain values, and the path. `weight_bits` is missing where no file says it.

    Raises:
        MoetraceError: A file cannot be read, or does not describe a MoE model that is known.
    """
    path = _file_of(Path(source))
    if path.suffix.lower() == ".gguf":
        from moetrace.spec.model_files.gguf_file import read_gguf

        return Loaded(read_gguf(path), str(source))
    from moetrace.spec.model_files.hugging_face import read_folder

    return Loaded(read_folder(path), str(source))


def _file_of(path: Path) -> Path:
    """The config.json or GGUF file that `path` means."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISDIR(mode):
            weights = path.suffix.lower() == ".safetensors" or path.name.endswith(".safetensors.index.json")
            return path.parent / CONFIG if weights else path
        if (path / CONFIG).exists():
            return path / CONFIG
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    except OSError as error:
        raise MoetraceError(f"Cannot read {path}: {error.strerror or error}.") from None
    except ValueError as error:
        raise MoetraceError(f"Cannot read {path}: {error}.") from None
    whole = [file for file in files if "-of-" not in file.name or "-00001-of-" in file.name]
    if len(whole) != 1:
        have = "no config.json and no GGUF file" if not files else f"{len(whole)} GGUF models: name one of the files"
        raise MoetraceError(f"Cannot read a model from the folder {path}: it has {have}.")
    return whole[0]
