"""Text sources, a bounded piece at a time: whole lines, and JSON lines decoded into typed records."""

import codecs
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from moetrace.importers.reading.events import is_event, payload
from moetrace.jit.no_collection import no_collection
from moetrace.spec.errors import MoetraceError

CHUNK_BYTES = 8 << 20
MAX_LINE_BYTES = 256 << 20
BOM = codecs.BOM_UTF8  # which some editors and shells put before a text

Record = TypeVar("Record")
_OF_TYPE = msgspec.ValidationError  # complete JSON of an unexpected form


def text_of(path: Path) -> bytes:
    """The whole text, without a byte order mark."""
    return path.read_bytes().removeprefix(BOM)


def first_bytes(path: Path, most: int) -> bytes:
    """At most this number of bytes, without a byte order mark."""
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


# Python writes what JSON does not have: as a value, after a bracket, comma or colon.
_NO_NUMBER = re.compile(rb"(?<=[\[,:\s])(?:NaN|-?Infinity)(?=\s*[,\]}])")


def mended(text: bytes) -> bytes:
    """JSON with null for NaN and infinities, which Python's `json` writes."""
    return _NO_NUMBER.sub(b"null", text) if b"NaN" in text or b"Infinity" in text else text


def json_lines(
    path: Path,
    record: type[Record] | tuple[type[Record], ...],
    reading: Callable[[int], object],
    chunk_bytes: int | None = None,
    bad: Callable[[str], object] | None = None,
    cut: Callable[[str], object] | None = None,
    broken: Callable[[str], object] | None = None,
    of_event: Callable[[Any], object] | None = None,
) -> Iterator[tuple[int, list[Record]]]:
    """Yield the number of the first line and the records of successive JSON lines; blank lines are allowed.

    `record` is a msgspec type, a Struct or a union of tagged ones, or several that are tried in turn. NaN is null. A
    line that does not fit it goes to `bad` as a sentence, and server-sent events are lines, if there is a `bad`, whose
    records go to `of_event` first. A last line without its newline, as a process that is killed leaves it, goes to
    `cut`, another that is no such record to `broken`. Else it raises MoetraceError.
    """
    decoders = [msgspec.json.Decoder(kind) for kind in (record if isinstance(record, tuple) else (record,))]
    decoder = decoders[0]
    for line, data in chunks(path, reading, chunk_bytes):
        try:
            # Plain records have no cycles; the search for some takes up to half of the time of decoding.
            with no_collection():
                try:
                    records = decoder.decode_lines(data)
                except msgspec.DecodeError:
                    records = decoder.decode_lines(mended(data))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            # The decoder does not say which line it is.
            records = list(_one_by_one(path, decoders, line, data, (bad, of_event), (broken, cut)))
        yield line, records


def _one_by_one(
    path: Path,
    decoders: list[msgspec.json.Decoder],
    first: int,
    data: bytes,
    streams: tuple[Callable[[str], object] | None, Callable[[Any], object] | None],
    no_json: tuple[Callable[[str], object] | None, Callable[[str], object] | None],
) -> Iterator[Any]:
    """The records of the lines that can be read; one that can't be, and nobody takes, is an error."""
    lines, (bad, of_event) = data.split(b"\n"), streams
    for number, line in enumerate(lines, first):
        text = payload(line) if bad else line
        if not text.strip():
            continue
        try:
            record = _decoded(decoders, mended(text))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            sentence = f"{path}: line {number} is not as expected: {str(error).rstrip('.')[:200]}."
            last = number == first + len(lines) - 1
            taken = bad or no_json[last and not isinstance(error, _OF_TYPE)]
            if taken is None:
                raise MoetraceError(sentence) from None
            taken(sentence)
        else:
            if of_event and is_event(line):
                of_event(record)
            yield record


def _decoded(decoders: list[msgspec.json.Decoder], text: bytes) -> Any:
    """`text` as the first decoder reads it that can."""
    for decoder in decoders[:-1]:
        with suppress(_OF_TYPE):
            return decoder.decode(text)
    return decoders[-1].decode(text)
