"""Text sources, a bounded piece at a time: whole lines, and JSON lines decoded into typed records."""

import codecs
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from moetrace.spec.errors import MoetraceError

CHUNK_BYTES = 8 << 20
MAX_LINE_BYTES = 256 << 20
BOM = codecs.BOM_UTF8  # which some editors and shells put before a text

Record = TypeVar("Record")


def text_of(path: Path) -> bytes:
    """The whole text, without a byte order mark."""
    return path.read_bytes().removeprefix(BOM)


def first_bytes(path: Path, most: int) -> bytes:
    """At most so many bytes, without a byte order mark."""
    with path.open("rb") as file:
        return file.read(most).removeprefix(BOM)


def chunks(path: Path, reading: Callable[[int], object], chunk_bytes: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the number of the first line (from 1) and whole lines, about `chunk_bytes` or CHUNK_BYTES at a time.

    The last line may lack its newline; a byte order mark is left out. Raises MoetraceError if a line is longer than
    `MAX_LINE_BYTES`.
    """
    size, line, rest = min(chunk_bytes or CHUNK_BYTES, CHUNK_BYTES), 1, b""
    with path.open("rb") as file:
        if file.read(len(BOM)) != BOM:
            file.seek(0)
        while data := file.read(size):
            reading(len(data))
            end = data.rfind(b"\n") + 1
            if end == 0:
                rest += data
                if len(rest) > MAX_LINE_BYTES:
                    raise MoetraceError(f"{path}: line {line} is longer than {MAX_LINE_BYTES >> 20} MiB.")
                continue
            whole = rest + data[:end]
            yield line, whole
            line += whole.count(b"\n")
            rest = data[end:]
    if rest:
        yield line, rest


def json_lines(
    path: Path, record: type[Record], reading: Callable[[int], object], chunk_bytes: int | None = None
) -> Iterator[tuple[int, list[Record]]]:
    """Yield the number of the first line and the records of successive JSON lines; blank lines are allowed.

    `record` is a msgspec type, a Struct or a union of tagged ones. Raises MoetraceError with the line that does not
    fit it.
    """
    decoder = msgspec.json.Decoder(record)
    for line, data in chunks(path, reading, chunk_bytes):
        try:
            with _no_collection():
                records = decoder.decode_lines(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise _bad_line(path, decoder, line, data) from None
        yield line, records


@contextmanager
def _no_collection() -> Iterator[None]:
    """Hold the search for cycles, which plain records don't have: it takes up to half of the time of decoding."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _bad_line(path: Path, decoder: msgspec.json.Decoder, first: int, data: bytes) -> MoetraceError:
    """Find the line that the decoder refuses: it does not say so itself."""
    for number, line in enumerate(data.split(b"\n"), first):
        try:
            if line.strip():
                decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return MoetraceError(f"{path}: line {number} is not as expected: {str(error).rstrip('.')[:200]}.")
    return MoetraceError(f"{path}: lines from {first} on can't be read as JSON lines.")
