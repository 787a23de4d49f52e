"""HTTP responses of an engine that carry routed experts: one JSON value a file, a list of them, or one a line."""

import base64
import binascii
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from moetrace.importers.reading.text import BOM, MAX_LINE_BYTES, json_lines, text_of
from moetrace.spec.errors import MoetraceError

Tokens = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Routed = str | list[list[list[int]]] | None  # base64, or plain lists


class Meta(msgspec.Struct):
    """`meta_info` of SGLang, of a response or a choice; `sgl_ext` and `sglext` share its names."""

    routed_experts: Routed = None
    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None


class Usage(msgspec.Struct):
    """Tokens as the OpenAI interface tells them."""

    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None


class Choice(msgspec.Struct):
    """One of the completions of a response."""

    routed_experts: Routed = None
    prompt_routed_experts: Routed = None
    meta_info: Meta | None = None
    sgl_ext: Meta | None = None
    sglext: Meta | None = None


class Response(msgspec.Struct):
    """What either engine answers, of `/generate` or of an OpenAI interface; the rest of it is not looked at."""

    choices: list[Choice] | None = None
    routed_experts: Routed = None
    prompt_routed_experts: Routed = None
    meta_info: Meta | None = None
    sgl_ext: Meta | None = None
    sglext: Meta | None = None
    usage: Usage | None = None
    model: str | None = None


_LINE: Any = Response | list[Response]


def responses(path: Path, reading: Callable[[int], object]) -> Iterator[tuple[str, Response]]:
    """Yield every response of the file, each with where it stands.

    Raises MoetraceError if the file is neither JSON lines nor one JSON value, or longer than `MAX_LINE_BYTES` a value.
    """
    if _is_one_value(path):
        reading(path.stat().st_size)
        try:
            found = msgspec.json.decode(text_of(path), type=_LINE)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise MoetraceError(f"{path} is not as expected: {str(error).rstrip('.')[:200]}.") from None
        for number, response in enumerate(found if isinstance(found, list) else [found]):
            yield (f"{path}: response {number}" if isinstance(found, list) else str(path)), response
        return
    for first, records in json_lines(path, _LINE, reading):
        for number, record in enumerate(records, first):
            for response in record if isinstance(record, list) else [record]:
                yield f"{path}: response {number}", response


def _is_one_value(path: Path) -> bool:
    """Whether the first line is no JSON value of its own, as of an indented file."""
    with path.open("rb") as file:
        line = file.readline(MAX_LINE_BYTES + 1)
        if len(line) > MAX_LINE_BYTES:
            raise MoetraceError(f"{path}: line 1 is longer than {MAX_LINE_BYTES >> 20} MiB.")
        if not file.read(1):
            return True
    try:
        msgspec.json.decode(line.removeprefix(BOM), type=msgspec.Raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        if path.stat().st_size > MAX_LINE_BYTES:
            raise MoetraceError(
                f"{path} is one JSON value of more than {MAX_LINE_BYTES >> 20} MiB: write a line a response."
            ) from None
        return True
    return False


def from_base64(where: str, text: str | bytes) -> bytes:
    """The bytes that are meant; raise MoetraceError, beginning with `where`, if it is no base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MoetraceError(f"{where}: routed_experts is no base64 text: {str(error)[:200]}.") from error
