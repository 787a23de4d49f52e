"""Labels of the values of a sweep's axes, and the paths of the files that they name."""

from pathlib import Path
from typing import Any

from moetrace.spec.errors import printable
from moetrace.spec.load import AUTO, FILE_FIELDS, FUNCTION_FIELDS
from moetrace.spec.model_files import is_model_file

SOURCES = ("trace", "model", "system", "policy")


def labels_of(field: str, values: list[Any]) -> list[Any]:
    """Return a short name for each value: of files the last part without its ending, unless that is ambiguous."""
    short = [_label(field, value) for value in values]
    meant: dict[Any, set[str]] = {}
    for label, value in zip(short, values, strict=True):
        meant.setdefault(label, set()).add(repr(value))
    return [
        label if len(meant[label]) == 1 else printable(str(value)).replace("/", "-")
        for label, value in zip(short, values, strict=True)
    ]


def _label(field: str, value: Any) -> Any:
    if isinstance(value, str):
        last = value.replace("\\", "/").rpartition("/")[2]
        if ".py:" in last:
            return printable(last.rpartition(":")[2])
        endings = (".h5", ".hdf5") if field == "trace" else (".toml", ".gguf")
        named = next((last.removesuffix(ending) for ending in endings if last.endswith(ending)), last)
        return printable(named.removesuffix(".csv"))
    return value if isinstance(value, int | float | bool) else str(value).replace("/", "-")


def shown_label(label: Any) -> str:
    """Return a label as names of cells and command lines write it."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def part_of_name(field: str, label: Any) -> str:
    """Return what a label adds to the name of a cell: the label of a source, FIELD=LABEL of all else."""
    return shown_label(label) if field in SOURCES else f"{field}={shown_label(label)}"


def placed(field: str, value: Any, folder: Path) -> Any:
    """Return the value, with a file that it names made absolute, as seen from `folder`."""
    if not isinstance(value, str):
        return value
    last = field.rpartition(".")[2]
    if field in SOURCES:
        is_file = field == "trace" or value.endswith(".toml") or "/" in value or "\\" in value or ".py:" in value
        is_file = is_file or (field == "model" and is_model_file(value))
    else:
        is_file = (last in FILE_FIELDS and value != AUTO) or (last in FUNCTION_FIELDS and ".py:" in value)
    return str(folder / value) if is_file else value
