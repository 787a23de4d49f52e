"""Presets by their names, and what to say to a name that none has."""

import difflib
from functools import cache
from importlib import resources
from pathlib import Path

from moetrace.spec.errors import UsageError

# The end of a message about an unknown model.
_OWN_FILES = ", as are a config.json, a GGUF file and the folder of a Hugging Face model (./NAME)"


def noun_of(kind: str) -> str:
    """One of a kind, as in `model` of `models`."""
    return {"models": "model", "systems": "system", "policies": "policy"}[kind]


def list_presets(kind: str) -> list[str]:
    """Names of the presets of a kind (`models`, `systems` or `policies`), sorted."""
    return list(_names(kind))


@cache
def _names(kind: str) -> list[str]:
    return sorted(entry.name[: -len(".toml")] for entry in _folder(kind).iterdir() if entry.name.endswith(".toml"))


def preset_text(kind: str, name: str) -> str:
    """Text of a preset's TOML, or a UsageError that names the nearest, or the user's file of that name.

    `kind` is as in `list_presets`.
    """
    names = list_presets(kind)
    if name not in names:
        unknown = f"No {noun_of(kind)} preset is called {name!r}"
        if found := _own_file(kind, name):
            raise UsageError(f"{unknown}, but {found}; `moetrace list {kind}` lists the presets.")
        raise UsageError(
            f"{unknown}{nearest(name, names)}; `moetrace list {kind}` lists them, "
            f"and a path that ends in .toml is read as a file{_OWN_FILES if kind == 'models' else ''}."
        )
    return _folder(kind).joinpath(f"{name}.toml").read_text(encoding="utf-8")


def preset_with(kind: str, header: str) -> str | None:
    """Name of the first preset of a kind that has a line ``header``, as `[ndp]`; None if none has."""
    return next((name for name in _names(kind) if header in preset_text(kind, name).splitlines()), None)


def nearest(name: str, names: list[str]) -> str:
    """` (the nearest is 'x')`, or nothing when no name is near."""
    found = difflib.get_close_matches(name, names, 1, 0.5)
    return f" (the nearest is {found[0]!r})" if found else ""


def _own_file(kind: str, name: str) -> str:
    """Say how to write a file of the current folder (of a model also a folder) that a name may mean; "" if none."""
    try:
        is_file, is_folder, is_toml = Path(name).is_file(), Path(name).is_dir(), Path(f"{name}.toml").is_file()
    except (OSError, ValueError):  # no name of a file
        return ""
    if name and is_toml:
        return f"there is a file {name}.toml: write that to read it"
    if kind == "models" and is_folder and name:
        return f"there is a folder {name}: write ./{name} to read it"
    return f"there is a file {name}: write ./{name} to read it" if is_file else ""


def _folder(kind: str):
    return resources.files("moetrace.spec").joinpath("presets", kind)
