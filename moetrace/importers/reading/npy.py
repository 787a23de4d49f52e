"""The header of a NumPy array in a file, in an archive or in a text, read before anything that it promises."""

import io
import math
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from moetrace.spec.errors import MoetraceError

MAGIC = b"\x93NUMPY"

_PARSING = threading.Lock()


class Header(NamedTuple):
    """The header of an array; its data begin after `header_bytes`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    header_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data that are announced, however many."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(where: str, file: IO[bytes]) -> Header:
    """Read the header at the beginning of `file`.

    Raises MoetraceError, beginning with `where`, if NumPy can't read it, or it announces Python objects, a negative
    size or Fortran order; ValueError and EOFError if the file is not an npy file or too short.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise MoetraceError(f"{where} is of the unknown npy version {version}.")
    size_bytes = file.read(2 if version == (1, 0) else 4)
    text = file.read(int.from_bytes(size_bytes, "little"))
    try:
        shape, fortran, dtype = (_parsed if len(text) < 1000 else _parsed.__wrapped__)(version, size_bytes + text)
    except Exception as error:  # a stranger's header can make the tokenizer, the parser or dtypes raise anything
        raise MoetraceError(f"{where} has a header that NumPy can't read.") from error
    if dtype.hasobject or min(shape, default=0) < 0:
        raise MoetraceError(f"{where} holds Python objects or a negative size, which is refused.")
    if fortran and len(shape) > 1:
        raise MoetraceError(f"{where} is in Fortran order: save numpy.ascontiguousarray of it.")
    return Header(shape, dtype, file.tell())


@lru_cache(maxsize=64)
def _parsed(version: tuple[int, int], header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype; answers of one server have the same headers, whose parsing takes long."""
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    # The header is Python source, and warned of as such. Filters of warnings are one for all threads; and in Python
    # up to 3.11.7 and 3.12.1, parsing in two threads at once may raise SystemError.
    with _PARSING, warnings.catch_warnings(action="ignore"):
        return read(io.BytesIO(header))


def from_bytes(where: str, data: bytes) -> np.ndarray:
    """The array in the bytes of an npy file, as a view of them; raise MoetraceError for other bytes."""
    try:
        header = read_header(where, io.BytesIO(data))
    except (ValueError, EOFError) as error:
        raise MoetraceError(f"{where} is no NumPy array: {str(error)[:200]}.") from error
    if header.header_bytes + header.nbytes != len(data):
        raise MoetraceError(f"{where} says it has shape {header.shape}, but its size differs.")
    return np.frombuffer(data, header.dtype, offset=header.header_bytes).reshape(header.shape)


def mapped(path: Path, reading: Callable[[int], object]) -> np.ndarray:
    """The array of an npy file, from which a part is read when it is needed; `reading` gets its bytes."""
    where = str(path)
    try:
        with path.open("rb") as file:
            header = read_header(where, file)
    except (ValueError, EOFError) as error:
        raise MoetraceError(f"{where} is no NumPy array: {str(error)[:200]}.") from error
    if header.header_bytes + header.nbytes != path.stat().st_size:
        raise MoetraceError(f"{where} says it has shape {header.shape}, but its size differs.")
    reading(path.stat().st_size)
    if not header.nbytes:
        return np.empty(header.shape, header.dtype)
    return np.memmap(path, header.dtype, "r", header.header_bytes, header.shape)
