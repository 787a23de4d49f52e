"""HTTP responses of an engine that carry routed experts: one JSON value a file, a list of them, or one a line."""

import base64
import binascii
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from moetrace.importers.reading import npy
from moetrace.importers.reading.events import is_event
from moetrace.importers.reading.text import BOM, MAX_LINE_BYTES, json_lines, mended, text_of
from moetrace.importers.reading.told import Told
from moetrace.spec.errors import MoetraceError

Tokens = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
TokenIds = list[Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]] | None


class Payload(msgspec.Struct):
    """An array as training stacks send it: base64 of its bytes, and what they are."""

    data: str
    shape: list[Annotated[int, msgspec.Meta(ge=0, lt=2**62)]]
    dtype: str
    start: Tokens | None = None  # position of the first row


Routed = str | list[list[list[int]]] | Payload | None  # base64, or plain lists


class CachedPlaces(msgspec.Struct):
    """Cached tokens by the place of the cache, as SGLang tells them on demand (`return_cached_tokens_details`)."""

    device: Tokens = 0
    host: Tokens = 0
    storage: Tokens | None = None


class Meta(msgspec.Struct):
    """`meta_info` of SGLang, of a response or a choice; `sgl_ext` and `sglext` share its names."""

    routed_experts: Routed = None
    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None
    cached_tokens: Tokens | None = None
    cached_tokens_details: CachedPlaces | None = None
    id: str | int | None = None
    finish_reason: Any = None  # {"type": "abort", ...}

    @property
    def cached(self) -> int | None:
        """The tokens of the prompt that came from a cache, if it says so in one way or the other."""
        places = self.cached_tokens_details
        if self.cached_tokens is not None or places is None:
            return self.cached_tokens
        return places.device + places.host + (places.storage or 0)


class Details(msgspec.Struct):
    """Details of the prompt's tokens, as in the OpenAI interface."""

    cached_tokens: Tokens | None = None


class Usage(msgspec.Struct):
    """Tokens as the OpenAI interface tells them: the output's of all choices together."""

    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None
    prompt_tokens_details: Details | None = None


class Message(msgspec.Struct):
    """Token ids beside the text of a chat, as Megatron tells them."""

    prompt_token_ids: TokenIds = None
    generation_token_ids: TokenIds = None


class Choice(msgspec.Struct):
    """One of the completions of a response."""

    index: Tokens | None = None
    routed_experts: Routed = None
    prompt_routed_experts: Routed = None
    routed_experts_prompt_start: Tokens | None = None
    moe_topk_indices: Routed = None  # Megatron's, of prompt and output; the prompt's rows stand there again
    prompt_moe_topk_indices: Routed = None
    meta_info: Meta | None = None
    sgl_ext: Meta | None = None
    sglext: Meta | None = None
    prompt_token_ids: TokenIds = None
    token_ids: TokenIds = None
    generation_token_ids: TokenIds = None
    message: Message | None = None
    finish_reason: Any = None  # "abort"


class Response(msgspec.Struct):
    """The answer of an engine, from `/generate` or from an OpenAI interface; its other fields are not read."""

    id: str | int | None = None
    object: str | None = None
    choices: list[Choice] | None = None
    routed_experts: Routed = None
    prompt_routed_experts: Routed = None
    routed_experts_prompt_start: Tokens | None = None
    meta_info: Meta | None = None
    sgl_ext: Meta | None = None
    sglext: Meta | None = None
    usage: Usage | None = None
    model: str | None = None
    prompt_token_ids: TokenIds = None
    output_ids: TokenIds = None
    data: Any = None  # of a payload that is a whole file; other answers may use these names otherwise
    shape: Any = None
    dtype: Any = None
    start: Any = None
    response: Any = None  # of a line that a batch of requests writes; the answer is its body

    @property
    def payload(self) -> Payload | None:
        """The payload that this is instead of an answer. Raises MoetraceError if it is one that can't be read."""
        if not isinstance(self.data, str) or self.shape is None or self.dtype is None:
            return None
        fields = {"data": self.data, "shape": self.shape, "dtype": self.dtype, "start": self.start}
        try:
            return msgspec.convert(fields, Payload)
        except msgspec.ValidationError as error:
            raise MoetraceError(f"the payload is not as expected: {str(error).rstrip('.')[:200]}.") from None


_LINE: Any = Response | list[Response]
_NO_RECORD = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_INTEGERS = re.compile(r"(?:torch\.)?u?int(?:8|16|32|64)|[<>=|]?[iu][1248]")


def responses(
    path: Path, reading: Callable[[int], object], bad: Callable[[str], object] | None = None
) -> Iterator[tuple[str, Response]]:
    """Yield every response of the file, each with where it stands; server-sent events (`data: ...`) are lines as well.

    An answer of a stream is a chunk, even if it does not say so, as SGLang's `/generate` sends them. One of several
    lines or of a list that can't be read goes to `bad` as a sentence. In the lines that batches of requests write
    (`{"custom_id": ..., "response": {"body": {...}}}`), the bodies are the responses. Raises MoetraceError if the file
    is neither JSON lines nor one JSON value, or longer than `MAX_LINE_BYTES` a value.
    """
    for where, response in _found(path, reading, bad):
        body = response.response.get("body") if isinstance(response.response, dict) else None
        if response.choices is not None or not isinstance(body, dict):
            yield where, response
            continue
        try:
            yield where, msgspec.convert(body, Response)
        except msgspec.ValidationError as error:
            sentence = f"{where} is not as expected: {str(error).rstrip('.')[:200]}."
            if bad is None:
                raise MoetraceError(sentence) from None
            bad(sentence)


def _found(
    path: Path, reading: Callable[[int], object], bad: Callable[[str], object] | None
) -> Iterator[tuple[str, Response]]:
    """The responses, and the lines of batches around others."""
    if _is_one_value(path):
        reading(path.stat().st_size)
        text = text_of(path)
        try:
            found = _decoded(text, _LINE)
        except _NO_RECORD as error:
            elements = _elements(text) if bad else None
            if elements is None or bad is None:
                raise MoetraceError(f"{path} is not as expected: {str(error).rstrip('.')[:200]}.") from None
            for number, element in enumerate(elements):
                try:
                    yield f"{path}: response {number}", _decoded(element, Response)
                except _NO_RECORD as one:
                    bad(f"{path}: response {number} is not as expected: {str(one).rstrip('.')[:200]}.")
            return
        for number, response in enumerate(found if isinstance(found, list) else [found]):
            yield (f"{path}: response {number}" if isinstance(found, list) else str(path)), response
        return
    for first, records in json_lines(path, _LINE, reading, bad=bad, of_event=_take_chunk):
        for number, record in enumerate(records, first):
            for response in record if isinstance(record, list) else [record]:
                yield f"{path}: response {number}", response


def _take_chunk(record: Response | list[Response]) -> None:
    """Mark what an event holds as a chunk of a stream, even if it does not say so."""
    for response in record if isinstance(record, list) else [record]:
        if not (response.object or "").endswith("chunk"):
            response.object = "chunk"


def _decoded(text: bytes, kind: Any) -> Any:
    """The value of a JSON text; Python's NaN is null. Raises one of `_NO_RECORD`."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError:
        return msgspec.json.decode(mended(text), type=kind)


def _elements(text: bytes) -> list[bytes] | None:
    """The texts of the elements of a JSON list; None for anything else."""
    try:
        return [bytes(element) for element in _decoded(text, list[msgspec.Raw])]
    except _NO_RECORD:
        return None


def _is_one_value(path: Path) -> bool:
    """Whether neither of the first lines is a JSON value of its own, as of an indented file."""
    with path.open("rb") as file:
        lines = []
        for number in (1, 2):
            lines.append(file.readline(MAX_LINE_BYTES + 1))
            if len(lines[-1]) > MAX_LINE_BYTES:
                raise MoetraceError(f"{path}: line {number} is longer than {MAX_LINE_BYTES >> 20} MiB.")
            if number == 1 and not file.read(1):
                return True
            file.seek(-1, 1)
            if _is_value(lines[-1].removeprefix(BOM)):
                return False
    if path.stat().st_size > MAX_LINE_BYTES:
        raise MoetraceError(
            f"{path} is one JSON value of more than {MAX_LINE_BYTES >> 20} MiB: write a line a response."
        )
    return True


def _is_value(line: bytes) -> bool:
    if is_event(line):
        return True
    if not line.lstrip().startswith((b"{", b"[")):  # of an indented file, the second line may be a number
        return False
    try:
        msgspec.json.decode(mended(line), type=msgspec.Raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return True


def from_base64(where: str, text: str | bytes) -> bytes:
    """The bytes that are meant; raise MoetraceError, beginning with `where`, if it is no base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MoetraceError(f"{where}: routed_experts is no base64 text: {str(error)[:200]}.") from error


def array_of(where: str, routed: Routed) -> np.ndarray | None:
    """The array [tokens, layers, top_k] of lists, of base64 of an npy file, or of a payload that says its shape.

    Raises MoetraceError, beginning with `where`, for anything else.
    """
    if routed is None:
        return None
    if isinstance(routed, str):
        return npy.from_bytes(f"{where}: routed_experts", from_base64(where, routed))
    if isinstance(routed, Payload):
        return _of_payload(where, routed)
    try:
        return np.array(routed, np.int64)
    except (ValueError, OverflowError) as error:
        raise MoetraceError(f"{where}: routed_experts is no array of one shape [tokens, layers, top_k].") from error


def _of_payload(where: str, payload: Payload) -> np.ndarray:
    data = from_base64(where, payload.data)
    if not _INTEGERS.fullmatch(payload.dtype) or len(payload.shape) != 3:
        raise MoetraceError(
            f"{where}: routed_experts is {payload.dtype[:50]!r} {payload.shape[:8]}, not integers [tokens, layers, "
            f"top_k]."
        )
    dtype = np.dtype(payload.dtype.removeprefix("torch."))
    if math.prod(payload.shape) * dtype.itemsize != len(data):
        raise MoetraceError(f"{where}: routed_experts says it has shape {tuple(payload.shape)}, but its size differs.")
    return np.frombuffer(data, dtype).reshape(payload.shape)


def _aborted(finish_reason: Any) -> bool:
    """Whether an engine says that it stopped before the end: vLLM by a word, SGLang by an object with it."""
    return (finish_reason.get("type") if isinstance(finish_reason, dict) else finish_reason) == "abort"


def told_of(response: Response, choice: Choice | None = None, number: int = 0, start: int | None = None) -> Told:
    """The token counts of a choice (or of a response): a choice's own numbers, then the usage of all."""
    message = (choice and choice.message) or Message()
    metas = [meta for meta in (choice and choice.meta_info, response.meta_info) if meta]
    usage = response.usage or Usage()
    chunk = (response.object or "").endswith("chunk")
    own_prompt = (choice and choice.prompt_token_ids) or message.prompt_token_ids or ()
    own_output = (choice and (choice.token_ids or choice.generation_token_ids)) or message.generation_token_ids or ()
    prompt_ids, output_ids = own_prompt or response.prompt_token_ids or (), own_output or response.output_ids or ()
    prompt, output, choices = usage.prompt_tokens, usage.completion_tokens, max(len(response.choices or ()), 1)
    if prompt_ids and own_output and not chunk:
        prompt, output, choices = len(prompt_ids), len(own_output), 1
    elif meta := next((meta for meta in metas if meta.prompt_tokens is not None), None):
        prompt, output, choices = meta.prompt_tokens, meta.completion_tokens, 1
    elif own_prompt and not chunk and (choices > 1 or prompt is None):
        prompt = len(own_prompt)
    details = usage.prompt_tokens_details or Details()
    cached = next((meta.cached for meta in metas if meta.cached is not None), details.cached_tokens)
    name = next((meta.id for meta in metas if meta.id is not None), response.id)
    return Told(
        prompt=prompt,
        output=output,
        choices=choices,
        cached=cached,
        start=start,
        id="" if name is None else str(name),
        choice=number if choice is None or choice.index is None else choice.index,
        chunk=chunk,
        aborted=any(_aborted(said.finish_reason) for said in (choice, *metas) if said),
        prompt_ids=prompt_ids,
        output_ids=output_ids,
    )
