"""Counts for KTransformers: `{"logical_count": int64 [1, layers, experts]}`, as torch.save writes it.

Its SGLang (`kt_ep_wrapper.py`: `_load_activation_frequency`, `--kt-expert-placement-strategy frequency`) loads the file
with `torch.load(weights_only=True)`, sums the first axis, wants a row for each layer of the model, dense ones included,
and keeps the `--kt-num-gpu-experts` experts with the greatest counts, of all layers together, on the GPU. SGLang's own
`--init-expert-location FILE.pt` takes the same file. A set is written as ranks: n for its first expert down to 1.

torch.save writes a zip archive, stored: a pickle (protocol 2) of the objects, in which a tensor is a call of
`torch._utils._rebuild_tensor_v2` on a storage that is named and lies beside it, aligned to 64 bytes.
"""

import struct
import zipfile
from collections.abc import Callable
from typing import IO

import numpy as np

from moetrace.exports.resident import Counted, KeptChoice, in_model, kept, ranks, tallied

_NAME = "counts"
_ALIGNED = 64
_PADDING = 0x4246  # the id of torch's own padding in a zip header


def write(trace: Counted, file: IO[bytes], progress: Callable[[int], object], choice: KeptChoice) -> None:
    """Write the counts, or the ranks of a set, to `file`."""
    counts = tallied(trace, choice, progress).counts
    if choice.is_set:
        counts = ranks(kept(trace, choice, counts), counts.shape)
    counts = in_model(trace, counts)[None]
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in (
            ("data.pkl", _pickled(counts.shape)),
            ("byteorder", b"little"),
            ("data/0", np.ascontiguousarray(counts, "<i8").tobytes()),
            ("version", b"3\n"),
        ):
            _add(archive, file, f"{_NAME}/{name}", data)


def _add(archive: zipfile.ZipFile, file: IO[bytes], name: str, data: bytes) -> None:
    member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    member.create_system = 3  # always Unix, so that the bytes do not depend on the system
    start = file.tell() + 30 + len(name) + 4  # of the data, after the header and that of the padding
    padding = bytes(-start % _ALIGNED)
    member.extra = struct.pack("<HH", _PADDING, len(padding)) + padding
    archive.writestr(member, data)


def _pickled(shape: tuple[int, ...]) -> bytes:
    """The pickle of `{"logical_count": tensor}`, a contiguous int64 tensor over the storage "0"."""
    size = int(np.prod(shape))
    stride = (shape[1] * shape[2], shape[2], 1)
    storage = b"(" + _text("storage") + b"ctorch\nLongStorage\n" + _text("0") + _text("cpu") + _number(size) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = b"(" + storage + _number(0) + _numbers(shape) + _numbers(stride) + b"\x89" + hooks + b"t"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
    return b"\x80\x02}" + _text("logical_count") + tensor + b"s."


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(number: int) -> bytes:
    """A whole number below 2^31."""
    return b"J" + struct.pack("<i", number)


def _numbers(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"
