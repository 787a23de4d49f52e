"""Importers, one file for each foreign format; which one a source needs is seen from its content.

The module of a format has `recognize(first, name) -> bool`, which gets the first bytes of a file and its name, and
`read(sources, hints) -> list[Capture | Counts]`, which gets all sources at once, since some formats write a file a rank
or a request.
"""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from moetrace.importers.captured import FIRST_BYTES, Capture, Counts, Hints
from moetrace.importers.reading.text import first_bytes
from moetrace.importers.reading.unknown import what_it_is
from moetrace.spec.errors import MoetraceError, UsageError

# Format -> what it is, in the order in which content is tried. The module has the
# same name, with _ for -.
FORMATS = {
    "sglang": "SGLang's expert distribution dumps: stat, per_pass and per_token (.pt), or counts (CSV)",
    "router-logits": "raw logits of routers (.npy, .npz, .pt, .safetensors), with a rule to choose by",
    "npz": "NumPy archives with expert_ids, request_id, position, phase, layer_index and meta",
    "bigmoeonedge": "route traces (CSV) of BigMoeOnEdge, version 1",
    "colibri": "routing traces (ROUTE_TRACE) and expert histories (.coli_usage) of colibri",
    "fiddler": "expert popularity (JSON) of Fiddler",
    "counts-table": "tables of counts: EPLB's JSON (logical_count), [layers, experts] as JSON or of torch.save (.pt)",
    "imatrix": "importance matrices (GGUF) of llama.cpp, which count the tokens of each expert",
    "jsonl": 'route logs in JSON lines with {"type": "route"}, as patches of vLLM write them',
    "lattice": "routing traces (JSON lines) of lattice",
    "llamacpp": "CSV of llama.cpp's moe-trace tools",
    "mbolt": "routing logs (binary) of mbolt's patch of llama.cpp",
    "megatron": "routing traces (JSON lines) of Megatron-LM, a file a rank, or answers of its inference server",
    "moe-cache-eval": "event traces (safetensors) of moe-cache-eval",
    "moe-policylang": "expert activation traces (JSON lines) of MoE-PolicyLang",
    "moe-cache-lab": "routing traces (JSON lines) of moe-cache-lab, versions 1 and 2",
    "trtllm": "expert statistics (safetensors) of TensorRT-LLM, a file a rank",
    "vllm": "vLLM's routed experts of each request: .npy files, or HTTP responses (JSON or JSON lines)",
    "npy-layers": "a NumPy file (.npy) a layer, [rows, top_k], whose name says which: layer_0.npy, moe_layer_12.npy",
    "sglang-request": "SGLang's routed experts of each request: HTTP responses, or their base64 texts",
    "oracle-general": "accesses to experts in libCacheSim's binary format, as `moetrace export` writes them",
    "any-table": "any table (Parquet, CSV, JSON lines) whose columns are named or well known",
}
_HDF5 = b"\x89HDF\r\n\x1a\n"
MAX_FILES = 100_000
_NAME_BYTES = 256  # in which an archive names its first member


def detect(path: Path) -> str:
    """The name of the format of the file at `path`, by its content; raise MoetraceError if it is none of `FORMATS`."""
    first = _first_bytes(path)
    if known := _format_of(first, path.name):
        return known
    if not first:
        raise MoetraceError(f"{path} is empty.")
    if first.startswith(_HDF5):
        raise MoetraceError(f"{path} is an HDF5 file: if it is a trace already, it needs no import.")
    what, way = what_it_is(path, first)
    raise MoetraceError(
        f"{path} is in no format that can be imported, being {what}: {way}; --from names a format that was not seen "
        f"({', '.join(FORMATS)}; docs/importing.md describes them)."
    )


def read_captures(
    sources: Sequence[Path], format: str | None = None, hints: Hints | None = None
) -> list[Capture | Counts]:
    """Read the sources as `format`, or as what their content shows; a folder stands for its files of that format.

    Raises MoetraceError, naming file and place, if the content is not what the format promises.
    """
    if format is not None and format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; known are {', '.join(FORMATS)}.")
    if hints is not None and hints.columns:
        if format not in (None, "any-table"):
            raise UsageError(f"--columns names the columns of a table, and --from says {format}.")
        format = "any-table"
    if hints is not None and hints.router is not None:
        if format not in (None, "router-logits"):
            raise UsageError(f"--router says how to choose from logits, and --from or --columns says {format}.")
        format = "router-logits"
    for source in sources:
        if not source.is_file() and not source.is_dir():
            raise MoetraceError(f"{source} is not a file." if source.exists() else f"there is no file {source}.")
    files: list[Path] = []
    told = format is not None
    told_only = ("any-table", "npy-layers") if told else ("any-table",)  # their content does not identify these
    for source in sources:
        if source.is_dir():
            format, found = _files_in(source, format, told)
            files += found
            continue
        format = format or detect(source)
        files.append(source)
        if len(sources) > 1 and format not in told_only and not _is(format, source):
            raise MoetraceError(f"{source} is not of the format {format}: import sources of one format at a time.")
    return _importer(format or "").read(files, hints or Hints())


def _files_in(folder: Path, format: str | None, told: bool) -> tuple[str, list[Path]]:
    """The files of a folder that are of one format, by name, and that format; not those of folders inside.

    Others beside them are passed over, unless they are of a known format and nobody has `told` which one is meant.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if len(files) > MAX_FILES:
        raise MoetraceError(f"{folder} holds more than {MAX_FILES} files: import them in parts.")
    found: list[Path] = []
    for path in files:
        first = _first_bytes(path)
        if format is None or not _importer(format).recognize(first, path.name):
            other = None if told else _format_of(first, path.name)
            if other is None:
                continue
            if format is not None:
                raise UsageError(f"{folder} holds files of {format} and {other} ({path.name}): give --from.")
            format = other
        found.append(path)
    if format is None or not found:
        names = FORMATS if format is None else (format,)
        raise MoetraceError(f"{folder} holds no file in a format that can be imported ({', '.join(names)}).")
    return format, found


def _is(format: str, path: Path) -> bool:
    return _importer(format).recognize(_first_bytes(path), path.name)


def _format_of(first: bytes, name: str) -> str | None:
    return next((known for known in FORMATS if _importer(known).recognize(first, name)), None)


def _first_bytes(path: Path) -> bytes:
    first = first_bytes(path, FIRST_BYTES)
    if first.startswith(b"PK\x03\x04") and b".npy" in first[:_NAME_BYTES] and path.stat().st_size > FIRST_BYTES:
        with path.open("rb") as file:  # the names of all arrays stand at the end
            file.seek(-FIRST_BYTES, os.SEEK_END)
            first += file.read(FIRST_BYTES)
    return first


def _importer(name: str):
    return importlib.import_module(f"moetrace.importers.{name.replace('-', '_')}")
