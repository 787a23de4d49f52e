"""Dumps of SGLang's recorder, saved with torch.save: unpickled without executing anything, and checked."""

import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import MAX_EXPERTS, MAX_LAYERS

if TYPE_CHECKING:
    import torch


_INTEGERS = ("torch.int32", "torch.int64", "torch.int16", "torch.uint8", "torch.int8")
_ROUNDED = ("torch.bfloat16", "torch.float16")


class Dump(NamedTuple):
    """A detailed dump of one rank."""

    path: Path
    records: list[dict[str, Any]]
    logical: np.ndarray  # int64 [layers, physical experts]
    lost: str = ""  # the first record that was left out, as a sentence
    left_out: int = 0


def load(path: Path) -> dict[str, Any]:
    """The dict of a dump, its tensors mapped; raise MoetraceError if it is anything but plain data."""
    content = load_plain(path)
    if not isinstance(content, dict):
        raise MoetraceError(f"{path} holds a {type(content).__name__}, not a dict of the recorder.")
    return content


def load_plain(path: Path) -> Any:
    """The content of a torch.save file, tensors mapped; raise MoetraceError if it is anything but plain data."""
    try:
        import torch
    except ImportError as error:
        raise MoetraceError(f"{path} needs PyTorch: pip install '.[engines]' in the clone of moetrace.") from error
    _check_stored(path)
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling a stranger's file raises anything
        reason = " ".join(str(error).split())[:160]
        raise MoetraceError(f"{path} is no dump of plain tensors, so it is not loaded ({reason}).") from error


def _check_stored(path: Path) -> None:
    """Raise unless the archive is stored, as torch.save leaves it: packed, a small one may unpack to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [info for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise MoetraceError(f"{path} is no dump of plain tensors, so it is not loaded ({str(error)[:160]}).") from error
    if packed:
        raise MoetraceError(f"{path}: {packed[0].filename[:100]} is compressed, which torch.save never does.")


def detailed(path: Path, content: dict[str, Any], strict: bool = False) -> Dump:
    """The non-empty records of a per_pass or per_token dump; raise MoetraceError for a dump without any."""
    records = content.get("records")
    if not isinstance(records, list) or "last_physical_to_logical_map" not in content:
        raise MoetraceError(f"{path} has neither logical_count nor records with last_physical_to_logical_map.")
    logical = integers(f"{path}: last_physical_to_logical_map", content["last_physical_to_logical_map"], 2)
    if not logical.size or logical.min() < 0 or logical.max() >= MAX_EXPERTS or len(logical) > MAX_LAYERS:
        raise MoetraceError(f"{path}: last_physical_to_logical_map {logical.shape} holds impossible experts.")
    empty = [number for number, record in enumerate(records) if _is_empty(record)]
    lost = f"{path}: record {empty[0]} is empty, or its choices are." if empty else ""
    if empty and (strict or len(empty) == len(records)):
        raise MoetraceError(lost)
    for number, record in enumerate(records):
        if _is_empty(record):
            continue
        if not isinstance(record, dict) or type(record.get("forward_pass_id")) is not int:
            raise MoetraceError(f"{path}: record {number} has no forward_pass_id.")
        if not 0 <= record["forward_pass_id"] < 2**62 or type(record.get("rank", 0)) is not int:
            raise MoetraceError(f"{path}: record {number} has an impossible forward_pass_id or rank.")
    records = [record for record in records if not _is_empty(record)]
    tensors = [record.get(name) for record in records for name in ("topk_ids_of_layer", "global_physical_count")]
    claimed = sum(tensor.nbytes for tensor in tensors if _is_plain(tensor))
    if claimed > path.stat().st_size:  # a pickle may name one tensor in any number of records
        raise MoetraceError(f"{path}: its records claim {claimed} bytes, but the file has {path.stat().st_size}.")
    return Dump(path, records, logical.astype(np.int64), lost, len(empty))


def _is_empty(record: Any) -> bool:
    """Whether a record is null, or what it counts or chooses is."""
    names = ("topk_ids_of_layer", "global_physical_count")
    return record is None or (isinstance(record, dict) and any(record.get(name, 0) is None for name in names))


def integers(where: str, value: object, axes: int) -> np.ndarray:
    """A tensor of plain integers as an array over the same memory; raise MoetraceError for anything else."""
    return _numbers(where, value, axes, _INTEGERS)


def _numbers(where: str, value: object, axes: int, kinds: tuple[str, ...]) -> np.ndarray:
    if not _is_plain(value):
        raise MoetraceError(f"{where} is no plain tensor but {type(value).__name__}.")
    if str(value.dtype) not in kinds or value.dim() != axes:
        what = "numbers" if kinds is not _INTEGERS else "integers"
        raise MoetraceError(f"{where} is {value.dtype} {tuple(value.shape)}, not {what} of {axes} axes.")
    if not value.is_contiguous() or value.requires_grad:  # strides of 0 would claim a size that is not there
        raise MoetraceError(f"{where} is no contiguous tensor.")
    return value.numpy()


def table(where: str, value: object, axes: int | None = None) -> np.ndarray:
    """Counts [steps, layers, experts] of a tensor of these axes, or the last one or two; floats must be whole."""
    if axes is None:
        axes = 2 if _is_plain(value) and value.dim() == 2 else 3
    if _is_plain(value) and str(value.dtype) in _ROUNDED:
        raise MoetraceError(f"{where} is {value.dtype}, which rounds counts: save its sum as int64.")
    counts = _numbers(where, value, axes, (*_INTEGERS, "torch.float32", "torch.float64"))
    if counts.dtype.kind == "f":
        counts = whole(where, counts)
    return counts.reshape((1,) * (3 - axes) + counts.shape)


def whole(where: str, counts: np.ndarray) -> np.ndarray:
    """Floats that are whole numbers as int64; raise MoetraceError if one is not, or impossibly large."""
    with np.errstate(invalid="ignore"):  # NaN is not whole
        is_whole = (counts == np.rint(counts)) & (np.abs(counts) <= 2**53)
    if not is_whole.all():
        raise MoetraceError(f"{where} holds numbers that are not whole: counts are, shares are not.")
    return counts.astype(np.int64)


def _is_plain(value: object) -> TypeGuard["torch.Tensor"]:
    import torch

    return type(value) is torch.Tensor and value.layout == torch.strided and value.device.type == "cpu"
