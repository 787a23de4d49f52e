"""The kind of a file that no importer knows, by its first bytes, with advice: for one sentence."""

import io
import re
from pathlib import Path

import msgspec

from moetrace.importers.columns import without_ids
from moetrace.importers.reading import npy
from moetrace.importers.reading.tensors import HEADER_BYTES, is_header
from moetrace.spec.errors import MoetraceError, printable

_KEY = re.compile(rb'"((?:[^"\\]|\\.){1,64})"\s*:')
_PICKLED = re.compile(rb"X([\1-\100])\0\0\0")  # before a short text in a pickle, its length
_TABLE = "name its columns with --columns layer=...,token=...,experts=..."
_ARRAYS = "save the chosen ids as integers [tokens, layers, top_k], or [tokens, top_k] a layer as layer_12.npy"
_COUNTS = '{"logical_count": [[...], ...]}'
_KNOWN_STARTS = {
    b"\x80": ("a bare pickle, which could run code", "save it with torch.save or numpy.save instead"),
    b"GGUF": ("a GGUF file", "a model is read with --model, an importance matrix holds counts"),
    b"\x1f\x8b": ("a gzip archive", "unpack it first"),
    b"\x28\xb5\x2f\xfd": ("a Zstandard archive", "unpack it first"),
    b"SQLite format 3\0": ("an SQLite database", "write its table as Parquet or CSV"),
}


def what_it_is(path: Path, first: bytes) -> tuple[str, str]:
    """Return what the file at `path` is, that begins with `first`, and what to do, both as parts of a sentence."""
    for start, said in _KNOWN_STARTS.items():
        if first.startswith(start):
            return said
    if first.startswith(npy.MAGIC):
        return _array(path, first)
    if first.startswith(b"PK\x03\x04"):
        return _archive(first)
    if is_header(first):
        names = _shown(_KEY.findall(first[HEADER_BYTES:]), skip=("dtype", "shape", "data_offsets", "__metadata__"))
        return f"a safetensors file with {names}", "save the chosen ids as a NumPy array or a table"
    text = first.lstrip()
    if text.startswith((b"{", b"[")):
        return _json(first)
    line = text.split(b"\n", 1)[0].strip()
    if not line.isascii() and b"\0" in first:
        return "binary data", "write the choices as a table (Parquet, CSV) or as a NumPy array"
    separators = [mark for mark in (b",", b";", b"\t") if mark in line]
    if separators and re.search(rb"[A-Za-z_]", line):
        names = [name.strip(b' "') for name in re.split(rb"[,;\t]", line)]
        return f"a table with {_shown(names, 'columns')}", _TABLE + without_ids(
            [name.decode("latin1") for name in names]
        )
    if separators:
        matrix = f"as a matrix, {_ARRAYS}, and counts [layers, experts] as JSON, {_COUNTS}"
        return "a table without names of its columns", f"put a line with names before it and {_TABLE}; or, {matrix}"
    return "a text", "write the choices as a table (Parquet, CSV, JSON lines) or as a NumPy array"


def _array(path: Path, first: bytes) -> tuple[str, str]:
    try:
        header = npy.read_header(str(path), io.BytesIO(first))
    except (MoetraceError, ValueError, EOFError):
        return "a damaged NumPy file", "save it again"
    what = f"a NumPy array, {header.dtype} {header.shape}"
    if header.dtype.kind == "f":
        return f"{what}, as of logits or gates", _ARRAYS
    if header.dtype.kind in "iu" and len(header.shape) in (1, 2):
        return f"{what}, whose name does not say its layer", (
            f"name ids [tokens, top_k] as in layer_12.npy, a file a layer, and save counts [layers, experts] as JSON, "
            f"{_COUNTS}"
        )
    return what, _ARRAYS


def _archive(first: bytes) -> tuple[str, str]:
    if b"/data.pkl" not in first:
        return "a zip archive", "unpack it first"
    texts = [first[found.end() : found.end() + found[1][0]] for found in _PICKLED.finditer(first)]
    names = [text for text in texts if text not in (b"storage", b"cpu") and not text.isdigit()]
    with_keys = f" with {_shown(names)}" if names else ""
    return f"a file of torch.save{with_keys}", f"{_ARRAYS}, with numpy.save"


def _json(first: bytes) -> tuple[str, str]:
    lines = first.lstrip().split(b"\n")
    alone = lines[0] if lines[0].rstrip().endswith((b"}", b"]")) else first
    try:
        value = msgspec.json.decode(alone)
        one = value[0] if isinstance(value, list) and value else value
        names = _shown([str(name).encode() for name in one]) if isinstance(one, dict) else ""
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        one = None
        names = _shown(_KEY.findall(first[:4096]))
    kind = "JSON lines" if alone is not first and len(lines) > 1 and lines[1].strip() else "JSON"
    if not names:
        return f"{kind} without keys", "write an object a line for each token and layer, or a NumPy array"
    what = _TABLE + without_ids(list(one)) if kind == "JSON lines" and isinstance(one, dict) else _TABLE
    what = what if kind == "JSON lines" else f"as JSON lines, an object a line, {_TABLE}"
    return f"{kind} with {names}", what


def _shown(names: list[bytes], what: str = "keys", skip: tuple[str, ...] = ()) -> str:
    """The first few names, fit for a sentence."""
    known = list(dict.fromkeys(name.decode(errors="replace") for name in names))
    known = [printable(name)[:40] for name in known if name and name not in skip]
    if not known:
        return ""
    return f"the {what} {', '.join(known[:8])}{' and others' if len(known) > 8 else ''}"
