"""Importers, one file for each foreign format; which one a file needs is seen from its content."""

import importlib
from pathlib import Path

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.engines.capture import Capture

# Format -> what it is. The module moetrace.trace.engines.<format> has `recognize(first_bytes)` and `read(path)`.
FORMATS = {
    "npz": "NumPy archives with expert_ids, request_id, position, phase, layer_index and meta",
    "bigmoeonedge": "route traces (CSV) of BigMoeOnEdge, version 1",
}
_HDF5 = b"\x89HDF\r\n\x1a\n"


def detect(path: Path) -> str:
    """The name of the format of the file at `path`, by its content; raise MoetraceError if it is none of `FORMATS`."""
    with path.open("rb") as file:
        first = file.read(4096)
    for name in FORMATS:
        if _importer(name).recognize(first):
            return name
    if first.startswith(_HDF5):
        raise MoetraceError(f"{path} is an HDF5 file: if it is a trace already, it needs no import.")
    raise MoetraceError(f"{path} is in no format that can be imported ({', '.join(FORMATS)}).")


def read_capture(path: Path, format: str | None = None) -> Capture:
    """Read the source at `path` as `format`, or as what its content shows.

    Raises MoetraceError, naming file and place, if the content is not what the format promises.
    """
    if not path.is_file():
        raise MoetraceError(f"{path} is not a file." if path.exists() else f"there is no file {path}.")
    if format is not None and format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; known are {', '.join(FORMATS)}.")
    return _importer(format or detect(path)).read(path)


def _importer(name: str):
    return importlib.import_module(f"moetrace.trace.engines.{name}")
