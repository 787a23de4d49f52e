"""Raw logits of routers, as `output_router_logits` of Transformers gives them: choices are made by a stated rule.

* `.npy`: floats [rows, layers, experts], or [rows, experts] of one layer, whose number is the last in the file's name.
* `.npz`: one array [rows, layers, experts], or arrays [rows, experts], the last number in a name being the layer.
* `.pt` of torch.save: a tensor [rows, layers, experts], or a tuple or list of tensors [rows, experts] in the order of
  the MoE layers, which is what `outputs.router_logits` is.
* `.safetensors`: the tensor `router_logits` [rows, layers, experts], or tensors [rows, experts] whose names have
  `router_logits` in them and end in the number of the layer.

Logits do not say how the model chooses; `--router` does (`reading.router_rule`). Rows of a padded batch are there as
well. A file with all layers is a request; of files of one layer each, all are one.
"""

import contextlib
import io
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.importers.captured import Capture, Hints, Part
from moetrace.importers.columns import layer_of_name
from moetrace.importers.reading import npy
from moetrace.importers.reading.router_rule import RouterRule, ScoresAsLogits, bias_of, check_rule, choose, said_router
from moetrace.importers.reading.tensors import HEADER_BYTES, is_header, known_shape, tensors
from moetrace.importers.sglang_dumps import load_plain
from moetrace.spec.errors import MoetraceError, UsageError, printable
from moetrace.trace.schema import MAX_LAYERS, PREFILL, check_sizes, expert_dtype

_FLOATS = ("F16", "F32", "F64")
_BLOCK_BYTES = 8 << 20  # of float64
_PICKLE = re.compile(rb"\A.{0,128}?/data\.pkl.{0,128}?(?=\x80[\x02-\x05])", re.DOTALL)
_STORAGES = ("torch FloatStorage", "torch HalfStorage", "torch BFloat16Storage", "torch DoubleStorage")
_TENSOR = re.compile(rb'"[^"]*router_logits[^"]*"\s*:\s*\{')
_OWN_ARRAYS = {"expert_ids", "request_id", "position", "phase", "layer_index", "meta", "step_rows", "gate_weights"}
_IDS = re.compile(rb"(?<!\w)expert_ids\.npy")  # the name of a member of an archive
_LIMIT = float(np.finfo(np.float16).max)


class Logits(NamedTuple):
    """The logits of one file or of several; `pieces` yields float [n, layers, experts] of about that number of rows."""

    paths: tuple[Path, ...]
    layers: np.ndarray  # int64 [layers], numbers
    rows: int
    experts: int
    pieces: Callable[[int], Iterator[np.ndarray]]


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is an array, archive or pickle of floats of two or three axes."""
    if first.startswith(npy.MAGIC):
        return _is_floats(first)
    if first.startswith(b"PK\x03\x04"):
        return is_pickle(first) or _is_archive(first)
    return is_header(first) and bool(_TENSOR.search(first[HEADER_BYTES:]))


def _is_floats(first: bytes) -> bool:
    try:
        header = npy.read_header("", io.BytesIO(first))
    except (MoetraceError, ValueError, EOFError):
        return False
    return len(header.shape) in (2, 3) and header.dtype.kind == "f"


def _is_archive(first: bytes) -> bool:
    """Whether the first member of an archive of NumPy is such an array, and none is `expert_ids`, which `npz` reads."""
    method, name_bytes, extra_bytes = struct.unpack("<8xH16xHH", first[:30]) if len(first) >= 30 else (99, 0, 0)
    name, data = first[30 : 30 + name_bytes], first[30 + name_bytes + extra_bytes :]
    if not name.endswith(b".npy") or name[:-4].decode(errors="replace") in _OWN_ARRAYS or _IDS.search(first):
        return False
    if method == zipfile.ZIP_DEFLATED:
        with contextlib.suppress(zlib.error):
            return _is_floats(zlib.decompressobj(-15).decompress(data, 4096))
    return method == zipfile.ZIP_STORED and _is_floats(data)


def is_pickle(first: bytes) -> bool:
    """Whether an archive of torch.save holds a tuple or list of float tensors, or a float tensor of three axes.

    The operations of the pickle are looked at, and none is carried out.
    """
    found = _PICKLE.match(first)
    if not found:
        return False
    names: list[str] = []
    axes = last = ""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in a stranger's texts
            for operation, value, _ in pickletools.genops(io.BytesIO(first[found.end() :])):
                if operation.name == "GLOBAL":
                    names.append(str(value))
                elif operation.name.startswith("TUPLE") and "BINPERSID" in names and not axes:
                    axes = operation.name
                elif operation.name == "BINPERSID":
                    names.append(operation.name)
                if operation.name == "STOP":
                    break
                if operation.name not in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                    last = operation.name
    except (ValueError, LookupError, ArithmeticError, EOFError, struct.error):  # it is cut, or no pickle
        return False
    if not any(storage in names for storage in _STORAGES):
        return False
    return axes == "TUPLE3" if last == "REDUCE" else last.startswith(("TUPLE", "APPEND"))


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture a file; one of all files if each is a layer."""
    if hints.router is None:
        raise UsageError(
            f"{sources[0]} holds logits of routers, which do not say how experts are chosen: give --router softmax or "
            f"--router sigmoid, and what else the model's rule has."
        )
    rule = said_router(hints.router)
    found = [_open(path) for path in sources]
    if all(one.layers.size == 1 and one.layers[0] >= 0 for one in found) and len(found) > 1:
        found = [_beside(found)]
    return [_capture(one, rule, hints) for one in found]


def _beside(files: list[Logits]) -> Logits:
    """Files of one layer each as the layers of one."""
    files = sorted(files, key=lambda one: int(one.layers[0]))
    for one, other in pairwise(files):
        if one.layers[0] == other.layers[0]:
            raise MoetraceError(f"{one.paths[0]} and {other.paths[0]} are of the same layer, {one.layers[0]}.")
        if (one.rows, one.experts) != (other.rows, other.experts):
            shapes = f"({one.rows}, {one.experts}) and ({other.rows}, {other.experts})"
            raise MoetraceError(f"{one.paths[0]} and {other.paths[0]} have the shapes {shapes}, not the same.")

    def pieces(rows: int) -> Iterator[np.ndarray]:
        for parts in zip(*(one.pieces(rows) for one in files), strict=True):
            yield np.concatenate(parts, axis=1)

    paths = tuple(path for one in files for path in one.paths)
    return Logits(paths, np.concatenate([one.layers for one in files]), files[0].rows, files[0].experts, pieces)


def _open(path: Path) -> Logits:
    with path.open("rb") as file:
        first = file.read(1 << 16)
    if first.startswith(npy.MAGIC):
        return _of_array(path)
    if first.startswith(b"PK\x03\x04"):
        return _of_pickle(path) if b"/data.pkl" in first[:256] else _of_archive(path)
    if is_header(first):
        return _of_safetensors(path)
    raise MoetraceError(f"{path} is neither of NumPy, of torch.save nor of safetensors.")


def _of_array(path: Path) -> Logits:
    try:
        with path.open("rb") as file:
            header = npy.read_header(str(path), file)
    except (ValueError, EOFError) as error:
        raise MoetraceError(f"{path} is no NumPy array: {str(error)[:200]}.") from error
    if header.header_bytes + header.nbytes != path.stat().st_size:
        raise MoetraceError(f"{path} says it has shape {header.shape}, but its size differs.")
    layers = _layers(str(path), header.shape, header.dtype.kind == "f", path.name)

    def pieces(rows: int) -> Iterator[np.ndarray]:
        array = np.memmap(path, header.dtype, "r", header.header_bytes, header.shape)
        for start in range(0, header.shape[0], rows):
            yield _of_rows(np.asarray(array[start : start + rows]))

    return Logits((path,), layers, header.shape[0], header.shape[-1], pieces)


def _layers(where: str, shape: Sequence[int], floats: bool, name: str) -> np.ndarray:
    """Numbers of the layers of an array of floats of this shape, of which each size is 1 or more."""
    if not floats or len(shape) not in (2, 3) or min(shape) < 1:
        raise MoetraceError(f"{where} has the shape {tuple(shape)}, not floats [rows, layers, experts].")
    if len(shape) == 3:
        return np.arange(_some_layers(where, shape[1]))
    layer = layer_of_name(Path(name).stem)
    if layer is None or layer >= MAX_LAYERS:
        raise MoetraceError(f"{where} is of one layer, but its name does not say of which: end it in the number.")
    return np.array([layer])


def _some_layers(where: str, layers: int) -> int:
    if layers > MAX_LAYERS:
        raise MoetraceError(f"{where} has {layers} layers, but at most {MAX_LAYERS} are read.")
    return layers


def _of_rows(array: np.ndarray) -> np.ndarray:
    return array if array.ndim == 3 else array[:, None]


def _joined(where: str, named: list[tuple[int, str, tuple[int, ...]]]) -> np.ndarray:
    """Check arrays [rows, experts] (layer, name, shape), sorted by layer; return the numbers of the layers."""
    for one, other in pairwise(named):
        if one[0] == other[0]:
            raise MoetraceError(f"{where}: {printable(one[1])} and {printable(other[1])} are of layer {one[0]}.")
        if one[2] != other[2]:
            raise MoetraceError(f"{where}: {printable(other[1])} has shape {other[2]}, but the layer before {one[2]}.")
    return np.array([layer for layer, _, _ in named])


def _number_in(where: str, name: str) -> int:
    numbers = re.findall(r"\d+", name)
    if not numbers or len(numbers[-1]) > 5 or int(numbers[-1]) >= MAX_LAYERS:
        raise MoetraceError(f"{where}: the name {printable(name[:80])} does not say its layer: end it in the number.")
    return int(numbers[-1])


def _of_archive(path: Path) -> Logits:
    from moetrace.importers.npz import UNREADABLE, header_of, read_rows

    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name[:-4]: header_of(path, archive, name) for name in archive.namelist() if name.endswith(".npy")}
    except UNREADABLE as error:
        raise MoetraceError(f"{path} can't be read as an npz archive: {str(error)[:200]}.") from error
    if len(arrays) == 1:
        name, array = next(iter(arrays.items()))
        layers = _layers(f"{path}: {printable(name)}", array.shape, array.dtype.kind == "f", name)
        order = [array]
    else:
        for name, array in arrays.items():
            if len(array.shape) != 2 or array.dtype.kind != "f" or min(array.shape) < 1:
                raise MoetraceError(
                    f"{path}: {printable(name)} is {array.dtype} {array.shape}, but of several arrays each must be "
                    f"floats [rows, experts] of a layer."
                )
        named = sorted((_number_in(str(path), name), name, array.shape) for name, array in arrays.items())
        if not named:
            raise MoetraceError(f"{path} holds no arrays.")
        layers, order = _joined(str(path), named), [arrays[name] for _, name, _ in named]

    def pieces(rows: int) -> Iterator[np.ndarray]:
        try:
            with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
                files = [stack.enter_context(archive.open(array.member)) for array in order]
                for file, array in zip(files, order, strict=True):
                    file.read(array.header_bytes)
                for start in range(0, order[0].shape[0], rows):
                    count = min(rows, order[0].shape[0] - start)
                    found = [_of_rows(read_rows(file, array, count)) for file, array in zip(files, order, strict=True)]
                    yield np.concatenate(found, axis=1) if len(found) > 1 else found[0]
        except UNREADABLE as error:
            raise MoetraceError(f"{path} can't be read as an npz archive: {str(error)[:200]}.") from error

    return Logits((path,), layers, order[0].shape[0], order[0].shape[-1], pieces)


def _of_pickle(path: Path) -> Logits:
    value = load_plain(path)
    import torch  # load_plain says if it is not there

    parts = list(value) if isinstance(value, tuple | list) else [value]
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for number, one in enumerate(parts):
        if type(one) is not torch.Tensor or one.dtype not in floats or one.layout != torch.strided:
            raise MoetraceError(f"{path}: entry {number} is a {type(one).__name__}, not a tensor of floats.")
        if not one.is_contiguous() or one.requires_grad or one.device.type != "cpu":
            raise MoetraceError(f"{path}: entry {number} is no contiguous tensor: save tensor.detach().contiguous().")
    shapes = [tuple(one.shape) for one in parts]
    if not parts or sum(one.nbytes for one in parts) > path.stat().st_size:
        raise MoetraceError(f"{path} holds no tensors, or they claim more than its size.")
    if isinstance(value, tuple | list):
        if len(set(shapes)) > 1 or len(shapes[0]) != 2 or min(shapes[0]) < 1:
            raise MoetraceError(f"{path} holds tensors of the shapes {shapes[:3]}, not of one [rows, experts].")
        layers = np.arange(_some_layers(str(path), len(parts)))
    else:
        layers = _layers(str(path), shapes[0], True, path.name)

    def pieces(rows: int) -> Iterator[np.ndarray]:
        for start in range(0, shapes[0][0], rows):
            found = [_of_rows(one[start : start + rows].to(torch.float32).numpy()) for one in parts]
            yield np.concatenate(found, axis=1) if len(found) > 1 else found[0]

    return Logits((path,), layers, shapes[0][0], shapes[0][-1], pieces)


def _of_safetensors(path: Path) -> Logits:
    with tensors(path) as file:
        keys = [key for key in file.keys() if "router_logits" in key]  # noqa: SIM118 - it is no mapping
        shapes = {key: known_shape(path, file, key, _FLOATS) for key in keys}
    if not keys:
        raise MoetraceError(f"{path} has no tensor with router_logits in its name.")
    if len(keys) == 1 and len(shapes[keys[0]]) == 3:
        layers, order = _layers(str(path), shapes[keys[0]], True, ""), keys
    else:
        odd = next((key for key in keys if len(shapes[key]) != 2 or min(shapes[key]) < 1), None)
        if odd is not None:
            raise MoetraceError(f"{path}: {printable(odd)} has shape {shapes[odd]}, not [rows, experts].")
        named = sorted((_number_in(str(path), key), key, shapes[key]) for key in keys)
        layers, order = _joined(str(path), named), [key for _, key, _ in named]

    def pieces(rows: int) -> Iterator[np.ndarray]:
        total = shapes[order[0]][0]
        with tensors(path) as file:
            for start in range(0, total, rows):
                found = [_of_rows(file.get_slice(key)[start : min(start + rows, total)]) for key in order]
                yield np.concatenate(found, axis=1) if len(found) > 1 else found[0]

    return Logits((path,), layers, shapes[order[0]][0], shapes[order[0]][-1], pieces)


def _capture(logits: Logits, rule: RouterRule, hints: Hints) -> Capture:
    where, top_k = logits.paths[0], hints.need("top_k", logits.paths[0])
    layers, experts = logits.layers.size, logits.experts
    check_sizes(str(where), experts, top_k, layers, logits.rows, 1)
    check_rule(str(where), rule, experts, top_k)
    bias = bias_of(rule, layers, experts)
    hints.reading(sum(path.stat().st_size for path in logits.paths))
    facts: dict[str, Any] = {
        "format": "router-logits",
        "router": hints.router,
        "choices": "made from logits by that rule, the lower id first among equals",
        "phase": "unknown: every row is taken as prefill unless --as decode --prompt P says otherwise",
    }
    return Capture(
        model="",
        num_experts=experts,
        top_k=top_k,
        layer_index=logits.layers,
        expert_bytes=None,
        request=np.zeros(logits.rows, np.int32),
        position=np.arange(logits.rows),
        phase=np.full(logits.rows, PREFILL, np.uint8),
        optional=("gates",),
        facts=facts,
        parts=lambda: _parts(logits, rule, bias, top_k, hints),
        sources=logits.paths,
    )


def _parts(logits: Logits, rule: RouterRule, bias: np.ndarray, top_k: int, hints: Hints) -> Iterator[Part]:
    where, (layers, experts) = logits.paths[0], bias.shape
    first = ties = 0
    scores = ScoresAsLogits()
    for piece in logits.pieces(max(1, _BLOCK_BYTES // (8 * layers * experts))):
        rows = len(piece)
        _check_finite(where, first, piece, logits.layers)
        scores.look(piece)
        cells = piece.reshape(rows * layers, experts)
        chosen = choose(cells, np.tile(bias, (rows, 1)) if rule.bias else np.zeros(1), rule, top_k)
        if (chosen.gates > _LIMIT).any():
            raise MoetraceError(f"{where}: near row {first}, a gate is beyond {_LIMIT:g}: check scale in --router.")
        shape = (rows, layers, top_k)
        ids = chosen.experts.astype(expert_dtype(experts)).reshape(shape)
        yield {"experts": ids, "gates": chosen.gates.astype(np.float16).reshape(shape)}
        first += rows
        ties += chosen.ties
    if ties:
        cells = first * layers
        hints.note(
            f"{where}: in {ties:,} of {cells:,} cells ({ties / cells:.2%}) the last choice ties with an expert that "
            "was not chosen: the engine may have chosen that one."
        )
    if what := scores.found():
        hints.note(f"{where}: {what}")


def _check_finite(where: Path, first: int, piece: np.ndarray, layers: np.ndarray) -> None:
    finite = np.isfinite(piece)
    if not finite.all():
        row, layer, expert = np.argwhere(~finite)[0].tolist()
        raise MoetraceError(
            f"{where}: row {first + row}, layer {layers[layer]}, expert {expert} has the logit "
            f"{piece[row, layer, expert]}: logits must be finite."
        )
