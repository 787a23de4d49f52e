"""Read the header of a GGUF file: metadata and the list of tensors, and nothing of their data.

The package `gguf` maps the whole file and makes a Python object of each of the 150,000 words of a vocabulary, which
takes seconds, and it believes the counts of a file. Here every count is compared with the bytes that are left before it
is used, words are skipped, and a file of any size costs its header only.
"""

import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from moetrace.spec.errors import MoetraceError
from moetrace.spec.model_files.bits import GGML_TYPES, BlockType
from moetrace.spec.ordinary_file import open_ordinary

MAX_HEADER_BYTES = 256 << 20
MAX_METADATA = 1 << 16
MAX_TENSORS = 1 << 18  # Kimi-K2, with one tensor for each matrix of each expert, would have 70,000
MAX_WORDS = 1 << 24  # strings in arrays; the largest vocabularies have 300,000
MAX_LISTED = 1 << 20  # numbers in lists that are kept; a model has a few lists of a number for each layer
MAX_NAME = 1 << 16
MAX_FILES = 1000
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


class Tensor(NamedTuple):
    """One tensor: its name, its shape with the fastest axis first, its type, and the bytes that it takes."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    size: int
    start: int = 0  # place of its data in its file

    @property
    def params(self) -> int:
        """Weights in it."""
        params = 1
        for length in self.shape:
            params *= length
        return params


class GgufHeader(NamedTuple):
    """The content of the files of one model: metadata (no long arrays) and all tensors."""

    metadata: Mapping[str, Any]
    tensors: list[Tensor]


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF model; of a split one, of all its files, which must be beside each other.

    Raises:
        MoetraceError: A file is missing, is not GGUF, is truncated, or its counts make no sense.
    """
    found = _read_file(path)
    parts = found.metadata.get("split.count", 1)
    if parts == 1:
        return found
    split = _SPLIT.fullmatch(path.name)
    if not isinstance(parts, int) or not 1 <= parts <= MAX_FILES or split is None or int(split[3]) != parts:
        raise MoetraceError(
            f"Cannot read {path}: it is one of {parts} files, but is not named as NAME-00001-of-0000N.gguf."
        )
    metadata, tensors = dict(found.metadata), []
    for number in range(1, parts + 1):
        file = path.with_name(f"{split[1]}-{number:05d}-of-{split[3]}.gguf")
        part = found if file.name == path.name else _read_file(file)
        metadata = dict(part.metadata) | metadata if number > 1 else metadata | dict(part.metadata)
        tensors += part.tensors
    _check_names(path, tensors)
    return GgufHeader(metadata, tensors)


def _read_file(path: Path) -> GgufHeader:
    try:
        with open_ordinary(path) as file:
            return _Reader(path, file, os.fstat(file.fileno()).st_size).header()
    except OSError as error:
        raise MoetraceError(f"Cannot read {path}: {error.strerror or error}.") from None
    except ValueError as error:
        raise MoetraceError(f"Cannot read {path}: {error}.") from None


def _check_names(path: Path, tensors: list[Tensor]) -> None:
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise MoetraceError(f"Cannot read {path}: two tensors have the same name.")


class _Reader:
    """A place in the header of a file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._size = size
        self._limit = min(size, MAX_HEADER_BYTES)
        self._place = 0
        self._order = "<"
        self._words = 0
        self._listed = 0

    def header(self) -> GgufHeader:
        magic, version = self._take(4), self._take(4)
        if magic != b"GGUF":
            self._refuse("it is not a GGUF file")
        if version[:2] == b"\0\0":
            self._order = ">"
        number = struct.unpack(f"{self._order}I", version)[0]
        if number not in (2, 3):
            self._refuse(f"it is GGUF of version {number}, and versions 2 and 3 can be read")
        count, pairs = self._number("Q"), self._number("Q")
        # A tensor takes at least 24 bytes of the header, a pair 13.
        if count > min(MAX_TENSORS, self._size // 24) or pairs > min(MAX_METADATA, self._size // 13):
            self._refuse(f"it says {count:,} tensors and {pairs:,} metadata fields, more than its size allows")
        metadata = {}
        for _ in range(pairs):
            key = self._text()
            metadata[key] = self._value(self._number("I"))
        infos = [self._tensor() for _ in range(count)]
        start = self._start(infos, metadata.get("general.alignment", 32))
        tensors = [tensor._replace(start=start + offset) for tensor, offset in infos]
        _check_names(self._path, tensors)
        return GgufHeader(metadata, tensors)

    def _tensor(self) -> tuple[Tensor, int]:
        name, axes = self._text(), self._number("I")
        if not 1 <= axes <= 4:
            self._refuse(f"the tensor {name[:60]!r} has {axes} axes")
        shape = tuple(self._number("Q") for _ in range(axes))
        kind = GGML_TYPES.get(number := self._number("I"))
        if kind is None:
            self._refuse(f"the tensor {name[:60]!r} has the type {number}, which is unknown")
        tensor = Tensor(name, shape, kind, 0)
        if not all(1 <= length < 2**48 for length in shape) or tensor.params >= 2**56:
            self._refuse(f"the shape of the tensor {name[:60]!r} makes no sense")
        if shape[0] % kind.block:
            self._refuse(f"the rows of the tensor {name[:60]!r} are not whole blocks of {kind.block} weights")
        return tensor._replace(size=tensor.params // kind.block * kind.block_bytes), self._number("Q")

    def _start(self, infos: list[tuple[Tensor, int]], alignment: object) -> int:
        """Where the data begin; refuse a file that is too short for them."""
        if isinstance(alignment, bool) or not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            self._refuse("its alignment makes no sense")
        start = -(-self._place // alignment) * alignment
        end = max((offset + tensor.size for tensor, offset in infos), default=0)
        if start + end > self._size:
            self._refuse(f"it is truncated: its tensors need {start + end:,} bytes, and it has {self._size:,}")
        return start

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            self._refuse(f"a metadata field has the type {kind}, which is unknown")
        inner, count = self._number("I"), self._number("Q")
        if inner == _STRING:
            self._words += count
            if self._words > MAX_WORDS:
                self._refuse(f"its metadata have more than {MAX_WORDS:,} words")
            for _ in range(count):
                self._skip(self._number("Q"))
            return None
        if inner not in _NUMBERS:
            self._refuse(f"a metadata field is a list of the type {inner}, which cannot be read")
        form = _NUMBERS[inner]
        size = struct.calcsize(f"<{form}")
        if count > 1 << 14:  # scores of words; numbers for each layer are fewer
            self._skip(count * size)
            return None
        self._listed += count
        if self._listed > MAX_LISTED:
            self._refuse(f"its metadata have more than {MAX_LISTED:,} numbers in short lists")
        return list(struct.unpack(f"{self._order}{count}{form}", self._take(count * size)))

    def _number(self, form: str) -> Any:
        return struct.unpack(f"{self._order}{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _text(self) -> str:
        length = self._number("Q")
        if length > MAX_NAME:
            # The template of a chat is longer than a name, and not of interest.
            self._skip(length)
            return ""
        return self._take(length).decode("utf-8", "replace")

    def _take(self, size: int) -> bytes:
        self._claim(size)
        data = self._file.read(size)
        if len(data) != size:
            self._refuse("it is truncated")
        return data

    def _skip(self, size: int) -> None:
        self._claim(size)
        self._file.seek(size, 1)

    def _claim(self, size: int) -> None:
        self._place += size
        if self._place > self._limit:
            short = self._limit == self._size
            self._refuse("it is truncated" if short else f"its header has more than {MAX_HEADER_BYTES >> 20} MiB")

    def _refuse(self, why: str) -> NoReturn:
        raise MoetraceError(f"Cannot read {self._path}: {why}.")
