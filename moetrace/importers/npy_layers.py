"""NumPy files that hold one layer each: ids [rows, top_k], or [rows] of a router that chooses one, side by side.

No engine's format: what a user's own hook saves. The name says the layer by the word `layer` (`layers`, `block`, `blk`)
and a number: `layer_0.npy`, `moe_layer_12.npy`, `model.layers.3.mlp.npy`. Files named otherwise are taken with `--from`
only, their last number being the layer: they could be anything. The files of a folder are one request, rows in order.
-1 is absent, and so are cells of zeros in all slots. Neither requests nor phases nor passes are recorded.
"""

import io
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.importers.captured import Capture, Hints, Part, without_zero_cells
from moetrace.importers.columns import layer_of_name, says_layer
from moetrace.importers.reading import npy
from moetrace.importers.reading.placeholders import Placeholders, advice, check_width
from moetrace.importers.reading.request_spool import UNKNOWN_PHASE
from moetrace.spec.errors import MoetraceError, UsageError, counted
from moetrace.trace.schema import BLOCK_BYTES, MAX_LAYERS, PREFILL, check_sizes


class _LayerFile(NamedTuple):
    """A file, and the layer that it holds."""

    layer: int
    path: Path
    ids: np.ndarray  # integers [rows, top_k], mapped


def holds_layer(shape: tuple[int, ...], name: str) -> bool:
    """Whether an array of this shape is one layer, by the name of its file: [rows, 1, top_k] would be a request too."""
    return (len(shape) in (1, 2) or (len(shape) == 3 and shape[1] == 1)) and says_layer(name) is not None


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is an array of integers of one layer, as its name says."""
    if not first.startswith(npy.MAGIC):
        return False
    try:
        header = npy.read_header(name, io.BytesIO(first))
    except (MoetraceError, ValueError, EOFError):
        return False
    return header.dtype.kind in "iu" and holds_layer(header.shape, name)


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture a folder, in the order in which these are named."""
    folders: dict[Path, list[Path]] = {}
    for path in sources:
        folders.setdefault(path.parent, []).append(path)
    return [_read(paths, hints) for paths in folders.values()]


def _read(paths: Sequence[Path], hints: Hints) -> Capture:
    files = sorted((_opened(path, hints) for path in paths), key=lambda file: file.layer)
    first, num_experts = files[0], hints.need("num_experts", paths[0])
    rows, top_k = first.ids.shape
    for one, other in pairwise(files):
        if one.layer == other.layer:
            raise MoetraceError(f"{one.path} and {other.path} are both of layer {one.layer}: name one of them.")
        if other.ids.shape != first.ids.shape:
            what, two = ("rows", (rows, len(other.ids))) if len(other.ids) != rows else ("experts a row", None)
            mine, others = two or (top_k, other.ids.shape[1])
            raise MoetraceError(
                f"{first.path} has {mine} {what}, but {other.path} {others}: files that hold a layer each need equally "
                f"many."
            )
    check_sizes(str(first.path), num_experts, top_k, len(files), rows, 1)
    placeholders = Placeholders(num_experts, hints)
    for file in files:
        _check(file, placeholders)
    layers = [file.layer for file in files]
    facts: dict[str, Any] = {"format": "npy-layers", "engine": "not recorded", "phase": UNKNOWN_PHASE}
    facts |= {"layers": "one a file, numbered by its name", "requests": "not recorded: the rows of a folder are one"}
    hints.note(
        f"{first.path}: took {counted(len(files), 'file')} as layers {layers[0]} to {layers[-1]}, side by side: row n "
        f"of each is token n of one request."
    )
    return Capture(
        model="",
        num_experts=num_experts,
        top_k=top_k,
        layer_index=np.array(layers),
        expert_bytes=None,
        request=np.zeros(rows, np.int32),
        position=np.arange(rows, dtype=np.int32),
        phase=np.full(rows, PREFILL, np.uint8),
        optional=(),
        facts=facts | placeholders.told(str(first.path)),
        parts=lambda: _parts(files, Placeholders(num_experts, hints)),
        sources=tuple(file.path for file in files),
    )


def _opened(path: Path, hints: Hints) -> _LayerFile:
    layer = says_layer(path.name)
    layer = layer_of_name(path.stem) if layer is None else layer
    if layer is None or layer >= MAX_LAYERS:
        raise UsageError(f"the name of {path} does not say its layer: name it as in layer_12.npy.")
    ids = npy.mapped(path, hints.reading)
    if ids.dtype.kind not in "iu" or not (ids.ndim in (1, 2) or (ids.ndim == 3 and ids.shape[1] == 1)):
        raise MoetraceError(f"{path} is {ids.dtype} {ids.shape}, not integers [rows, top_k] of one layer.")
    if not ids.size:
        raise MoetraceError(f"{path} is empty: its shape is {ids.shape}.")
    return _LayerFile(layer, path, ids.reshape(len(ids), -1))


def _check(file: _LayerFile, placeholders: Placeholders) -> None:
    """Raise MoetraceError for an id that is no expert."""
    check_width(str(file.path), file.ids.dtype, placeholders.num_experts)
    at_once = max(1, BLOCK_BYTES // file.ids[0].nbytes)
    for start in range(0, len(file.ids), at_once):
        ids, _, wrong = placeholders.checked(file.ids[start : start + at_once])
        if wrong is not None:
            expert, experts = int(ids[wrong]), placeholders.num_experts
            raise MoetraceError(
                f"{file.path}: row {start + wrong[0]} holds the expert {expert}, but the model has {experts} experts"
                f"{advice(expert, experts)}."
            )


def _parts(files: Sequence[_LayerFile], placeholders: Placeholders) -> Iterator[Part]:
    """All rows of all layers, some MiB at a time."""
    at_once = max(1, BLOCK_BYTES // sum(file.ids[0].nbytes for file in files))
    for start in range(0, len(files[0].ids), at_once):
        columns = [placeholders.narrow(file.ids[start : start + at_once]) for file in files]
        yield {"experts": without_zero_cells(np.stack(columns, axis=1), placeholders.absent)}
