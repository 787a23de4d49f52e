"""Safetensors files, opened so that what is wrong with one is a sentence; the library checks sizes in the header."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.spec.errors import MoetraceError

_INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
# Before the tensors: the size of a header in 8 bytes, and the header, which is a JSON object.
HEADER_BYTES = 8


@contextmanager
def tensors(path: Path) -> Iterator[Any]:
    """Open a file for its `keys`, `get_slice` and `get_tensor`; raise MoetraceError for any error of the library."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MoetraceError(f"{path} needs safetensors: pip install '.[engines]' in the clone of moetrace.") from None
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise MoetraceError(f"{path} can't be read as safetensors: {str(error)[:200].rstrip('.')}.") from error


def is_header(first: bytes) -> bool:
    """Whether these first bytes of a file are the size of a safetensors header and a JSON object."""
    return first[HEADER_BYTES : HEADER_BYTES + 1] == b"{" and int.from_bytes(first[:HEADER_BYTES], "little") >= 2


def shape_of(path: Path, file: Any, key: str, kinds: Sequence[str] = _INTEGERS) -> tuple[int, ...]:
    """The shape of the tensor `key`; raise MoetraceError if it is missing or not of one of the dtypes `kinds`."""
    if key not in file.keys():  # noqa: SIM118 - it is no mapping
        raise MoetraceError(f"{path} has no tensor {key!r}.")
    return known_shape(path, file, key, kinds)


def known_shape(path: Path, file: Any, key: str, kinds: Sequence[str] = _INTEGERS) -> tuple[int, ...]:
    """The shape of a tensor that is there, as `shape_of` gives it."""
    found = file.get_slice(key)
    if found.get_dtype() not in kinds:
        raise MoetraceError(f"{path}: {key} holds {found.get_dtype()}, but must hold one of {', '.join(kinds)}.")
    return tuple(found.get_shape())


def integers(path: Path, key: str, array: np.ndarray, low: int, high: int) -> np.ndarray:
    """`array` as int32, or int64 for a `high` above 2**31; raise MoetraceError unless all are `low` to below `high`."""
    if array.size and (int(array.min()) < low or int(array.max()) >= high):
        raise MoetraceError(
            f"{path}: {key} holds numbers from {array.min()} to {array.max()}, but must hold {low} to {high - 1}."
        )
    return array.astype(np.int32 if high <= 2**31 else np.int64, copy=False)
