"""How many bits the weights of a folder take as stored, from the headers of its safetensors files."""

import os
import re
import struct
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from moetrace.spec.errors import MoetraceError, printable
from moetrace.spec.model_files.anatomy import Anatomy
from moetrace.spec.ordinary_file import open_ordinary, read_ordinary

MAX_INDEX_BYTES = 64 << 20
MAX_HEADER_BYTES = 32 << 20  # safetensors allows 100 MB; 100,000 tensors take 12 MB
# A tensor has four in a header, and one in an index. So many without content take 140 MiB in memory.
MAX_COLONS = 1 << 20
MAX_FILES = 10_000
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,5})\.(.+)")
_ELSEWHERE = re.compile(r"(?:^|\.)(?:visual|vision\w*|audio\w*|mtp|multi_modal\w*|embed_\w+|mm_\w+)\.")
_EXPERT = re.compile(r"(?:^|\.)experts(?:\.|_)")
# Widths to which norms, biases and gates, which are stored but not counted, do not move the dense weights.
_WIDTHS = (4.0, 8.0, 16.0, 32.0)
_NEAR = 0.01


_Whole = Annotated[int, Meta(ge=0, le=2**62)]
_Form = TypeVar("_Form")


class _Tensor(msgspec.Struct):
    """A tensor as a header describes it; `__metadata__` has neither field."""

    shape: Annotated[list[_Whole], Meta(max_length=16)] | None = None
    data_offsets: tuple[_Whole, _Whole] | None = None


class _Index(msgspec.Struct):
    """Tensor -> the name of its file."""

    weight_map: dict[str, str]


class _Stored(NamedTuple):
    """Bytes of a folder's weights."""

    experts: dict[int, int]  # of the experts of a layer, scales included
    dense: int  # of the other matrices of the layers, and of the LM head


def stored_bits(folder: Path, anatomy: Anatomy) -> dict[str, Any]:
    """`weight_bits` and `dense_weight_bits` as the folder's safetensors files have them.

    Nothing if not all files are there: then what config.json says of its quantization holds.

    Raises:
        MoetraceError: A file is damaged, or does not hold the experts that config.json describes.
    """
    files = _files(folder)
    if not files or not all(file.exists() for file in files):
        return {}
    stored = _Stored({}, 0)
    for file in files:
        stored = _add(stored, file, len(anatomy.layers))
    moe = [index for index, layer in enumerate(anatomy.layers) if layer.experts]
    lacking = next((index for index in moe if not stored.experts.get(index)), None)
    if lacking is not None:
        raise MoetraceError(
            f"The safetensors files of {folder} hold no experts of layer {lacking}, though config.json describes some."
        )
    bits = [8 * stored.experts[index] / (anatomy.layers[index].experts * anatomy.expert_params) for index in moe]
    if not all(0.5 <= each <= 64 for each in bits):
        raise MoetraceError(
            f"The experts in the safetensors files of {folder} do not have the sizes that config.json describes."
        )
    rest = anatomy.params - sum(layer.experts for layer in anatomy.layers) * anatomy.expert_params
    dense = 8 * stored.dense / rest
    near = next((width for width in _WIDTHS if abs(dense / width - 1) <= _NEAR), dense)
    found = {"weight_bits": bits[0] if len(set(bits)) == 1 else bits}
    return found | ({"dense_weight_bits": near} if 0.5 <= near <= 64 else {})


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index, or its only one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [single] if (single := folder / "model.safetensors").exists() else []
    names = _decoded(index, read_ordinary(index, MAX_INDEX_BYTES), _Index).weight_map
    if not names:
        raise MoetraceError(f"Cannot read {index}: its weight_map is empty.")
    files = sorted(set(names.values()))
    if len(files) > MAX_FILES:
        raise MoetraceError(f"Cannot read {index}: it names {len(files):,} files.")
    for name in files:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise MoetraceError(f"Cannot read {index}: {name[:100]!r} is not the name of a file beside it.")
    return [folder / name for name in files]


def _add(stored: _Stored, file: Path, layers: int) -> _Stored:
    """The stored tensors with those of one more file."""
    experts, dense = dict(stored.experts), stored.dense
    for name, (axes, size) in _tensors(file).items():
        found = _LAYER.search(name)
        if _ELSEWHERE.search(name):
            continue
        if found is None:
            dense += size if name.endswith("lm_head.weight") else 0
        elif int(found[1]) < layers:
            if _EXPERT.search(found[2]) and "shared" not in found[2]:
                experts[int(found[1])] = experts.get(int(found[1]), 0) + size
            elif axes > 1:
                dense += size
    return _Stored(experts, dense)


def _tensors(path: Path) -> dict[str, tuple[int, int]]:
    """Axes and bytes of each tensor in the header of a safetensors file."""
    try:
        with open_ordinary(path) as file:
            size_bytes, start = os.fstat(file.fileno()).st_size, file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size_bytes - 8):
                raise MoetraceError(f"Cannot read {path}: it is not a whole safetensors file.")
            data = file.read(length)
    except OSError as error:
        raise MoetraceError(f"Cannot read {path}: {error.strerror or error}.") from None
    room, found = size_bytes - 8 - length, {}
    for name, tensor in _decoded(path, data, dict[str, _Tensor]).items():
        if name == "__metadata__":
            continue
        first, last = tensor.data_offsets or (1, 0)
        if tensor.shape is None or not first <= last <= room:
            raise MoetraceError(f"Cannot read {path}: the place of the tensor {name[:60]!r} makes no sense.")
        found[name] = len(tensor.shape), last - first
    return found


def _decoded(path: Path, data: bytes, form: type[_Form]) -> _Form:
    """JSON as `form`, or a MoetraceError that says why it cannot be read so."""
    if data.count(b":") > MAX_COLONS:
        raise MoetraceError(f"Cannot read {path}: its JSON has more than {MAX_COLONS:,} fields.")
    try:
        return msgspec.json.decode(data, type=form)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MoetraceError(f"Cannot read {path}: {printable(str(error)[:200])}.") from None
