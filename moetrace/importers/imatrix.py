"""Importance matrices of llama.cpp (`llama-imatrix`): how often each expert was chosen while a text was read.

The GGUF form (`general.type` = imatrix; tools/imatrix/imatrix.cpp, since pull request 9400) has for each weight matrix
`NAME.in_sum2` and `NAME.counts`, float32. For a matrix of stacked experts, such as `blk.3.ffn_up_exps.weight`, counts
are [1, experts] (fastest axis first): the tokens that each expert got. The matrices of a layer count alike.
`imatrix.chunk_count`, `imatrix.chunk_size`: how much was read, all of it as prompts.

The older binary form (.dat) has sums only, divided by the counts, and a number of calls that all experts share: it is
refused, and so is GGUF converted from it, whose stacked matrices have one count.
"""

import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.importers.captured import Counts, Hints, rows_of_counts
from moetrace.importers.reading.text import first_bytes
from moetrace.importers.sglang_counts import MAX_COUNT
from moetrace.importers.sglang_dumps import whole
from moetrace.spec.errors import MoetraceError
from moetrace.spec.model_files.gguf_header import Tensor, read_header
from moetrace.trace.schema import MAX_EXPERTS, MAX_LAYERS, PREFILL

_COUNTS = re.compile(r"blk\.(\d{1,5})\.ffn_(gate|up|gate_up|down)_exps\.weight\.counts", re.ASCII)
_MATRICES = ("gate_up", "gate", "up", "down")  # of which the first that a layer has is read
_AGAIN = "make it again with llama-imatrix --output-format gguf"


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is an importance matrix, of either form."""
    return (first.startswith(b"GGUF") and b"imatrix" in first) or _is_older(first)


def read(sources: Sequence[Path], hints: Hints) -> list[Counts]:
    """One step of counts a file."""
    return [_read(path, hints) for path in sources]


def _is_older(first: bytes) -> bool:
    """Whether these bytes are a number of entries, the length of a name, and the name of a matrix of a layer."""
    if len(first) < 12:
        return False
    entries, length = struct.unpack("<ii", first[:8])
    return 0 < entries < 1 << 20 and 5 <= length < 128 and first[8:].startswith(b"blk.")


def _read(path: Path, hints: Hints) -> Counts:
    if _is_older(first_bytes(path, 64)):
        raise MoetraceError(
            f"{path} is an importance matrix of the older form, which has no counts of experts: {_AGAIN}."
        )
    header = read_header(path)
    hints.reading(path.stat().st_size)
    by_layer: dict[int, dict[str, Tensor]] = {}
    for tensor in header.tensors:
        if found := _COUNTS.fullmatch(tensor.name):
            by_layer.setdefault(int(found[1]), {})[found[2]] = tensor
    if not by_layer:
        raise MoetraceError(f"{path} has no counts of stacked experts (blk.N.ffn_up_exps.weight.counts).")
    layers = sorted(by_layer)
    tables = {
        layer: [_counts(path, part[name]) for name in _MATRICES if name in part] for layer, part in by_layer.items()
    }
    experts = {table.size for part in tables.values() for table in part}
    if len(experts) > 1 or layers[-1] >= MAX_LAYERS:
        raise MoetraceError(f"{path}: layers up to {layers[-1]} count {min(experts)} to {max(experts)} experts.")
    if experts == {1}:
        raise MoetraceError(f"{path} counts the calls of all experts together, as converted older files do: {_AGAIN}.")
    counts = np.stack([tables[layer][0] for layer in layers])
    if not counts.any():
        raise MoetraceError(f"{path} counts nothing.")
    top_k = hints.need("top_k", path)
    odd = sum(not np.array_equal(part[0], other) for part in tables.values() for other in part[1:])
    said = {name: header.metadata.get(f"imatrix.{name}") for name in ("chunk_count", "chunk_size")}
    facts: dict[str, Any] = {"format": "imatrix", "engine": "llama.cpp"}
    facts |= {name: value for name, value in said.items() if type(value) is int}
    if odd:
        facts["matrices_that_count_otherwise"] = odd
    return Counts(
        model="",
        num_experts=counts.shape[1],
        top_k=top_k,
        layer_index=np.array(layers),
        rows=rows_of_counts(counts[None], top_k),
        phase=np.array([PREFILL], np.uint8),
        facts=facts | {"rows": "the least that explain the counts with this top_k"},
        parts=lambda: iter([counts[None]]),
        sources=(path,),
    )


def _counts(path: Path, tensor: Tensor) -> np.ndarray:
    """Counts int64 [experts] of a tensor [1, experts] of float32."""
    shape = (*tensor.shape, 1, 1)[:3]
    if tensor.kind.name != "F32" or shape[0] != 1 or shape[2] != 1 or not 1 <= shape[1] <= MAX_EXPERTS:
        raise MoetraceError(f"{path}: {tensor.name} is {tensor.kind.name} {tensor.shape}, not F32 (1, experts).")
    with path.open("rb") as file:
        if file.read(6)[4:] == b"\0\0":
            raise MoetraceError(f"{path} is of a big-endian machine, whose numbers are not read.")
        file.seek(tensor.start)
        data = file.read(4 * shape[1])
    if len(data) < 4 * shape[1]:
        raise MoetraceError(f"{path} is truncated.")
    counts = whole(f"{path}: {tensor.name}", np.frombuffer(data, "<f4"))
    if counts.min() < 0 or counts.max() > MAX_COUNT:
        raise MoetraceError(f"{path}: {tensor.name} holds an impossible count, {counts.min()} or {counts.max()}.")
    return counts
