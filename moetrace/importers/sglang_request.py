"""SGLang's routed experts of each request: base64 of int32 without a header, in responses or alone in a file.

Layout as SGLang writes it (`--enable-return-routed-experts`; 0.5.23: `state_capturer/routed_experts.py`,
`managers/detokenizer_manager.py`): int32 [tokens - 1 - routed_experts_start_len, num_hidden_layers, top_k], the last
token being never routed; layers without experts are planes of zeros. It is `meta_info.routed_experts` of a response of
`/generate`, of each choice (OpenAI interface, `return_meta_info`), or `sglext.routed_experts` (of the first choice).

The text does not say its shape: top_k and experts come from --model or --experts and --top-k; the layers from the
numbers of tokens that `meta_info` or `usage` tell, or from the model, whose dense layers must then be the only zeros.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from moetrace.importers.captured import FIRST_BYTES, Capture, Hints
from moetrace.importers.reading.request_spool import RequestSpool
from moetrace.importers.reading.responses import Meta, Response, from_base64, responses
from moetrace.importers.reading.text import MAX_LINE_BYTES, first_bytes, text_of
from moetrace.importers.vllm import recognize as recognize_vllm
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import MAX_EXPERTS, MAX_LAYERS

_KEYS = (b'"meta_info"', b'"sgl_ext"', b'"sglext"', b'"routed_experts"')
_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")


class _Request(NamedTuple):
    where: str
    ids: np.ndarray  # int32 [values]
    prompt: int | None  # tokens
    tokens: int | None  # of prompt and output


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is such a response, or base64 of small int32."""
    if recognize_vllm(first, name):
        return False
    start = first.lstrip()
    if start.startswith((b"{", b"[")):
        return b"routed_experts" in first and any(key in first for key in _KEYS)
    text = start.rstrip() if len(first) < FIRST_BYTES else start[: len(start) // 16 * 16]
    if len(text) < 8 or len(text) % 4 or not _BASE64.issuperset(text.rstrip(b"=")):
        return False
    try:
        data = from_base64(name, text)
    except MoetraceError:
        return False
    if not data or len(data) % 4:
        return False
    ids = np.frombuffer(data, "<i4")
    return bool(ids.any() and ids.min() >= -1 and ids.max() < MAX_EXPERTS)


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """One capture of all requests, in the order of the sources."""
    top_k = hints.need("top_k", sources[0])
    requests, planes, model, starts = RequestSpool(hints, sources[0]), 0, "", set()
    for path in sources:
        for request, said in _requests(path, hints):
            model = model or said
            values = request.ids.size
            planes = planes or _planes(request, top_k, hints)
            rows = values // (planes * top_k)
            if rows * planes * top_k != values:
                raise MoetraceError(
                    f"{request.where} holds {values} ids, which is no whole number of tokens of {planes} layers with "
                    f"{top_k} experts each."
                )
            first = 0 if request.tokens is None else request.tokens - 1 - rows
            if first < 0:
                raise MoetraceError(
                    f"{request.where} holds routing of {rows} tokens with {planes} layers, but says that there are "
                    f"{request.tokens} tokens."
                )
            starts.add(first)
            requests.add(request.where, request.ids.reshape(rows, planes, top_k), first, request.prompt)
    facts: dict[str, Any] = {"format": "sglang-request", "engine": "SGLang", "batching": "not recorded"}
    if starts - {0}:
        facts["routed_experts_start_len"] = f"{min(starts)} to {max(starts)}, from the numbers of tokens"
    return [requests.capture(model, facts, sources)]


def _requests(path: Path, hints: Hints):
    """Yield each request of a file and the name of its model."""
    if not first_bytes(path, 64).lstrip().startswith((b"{", b"[")):
        if path.stat().st_size > MAX_LINE_BYTES:
            raise MoetraceError(f"{path} is longer than {MAX_LINE_BYTES >> 20} MiB.")
        text = text_of(path)
        hints.reading(len(text))
        yield _Request(str(path), _ids(str(path), text.strip()), None, None), ""
        return
    for where, response in responses(path, hints.reading):
        for place, routed, counts in _routed(where, response):
            prompt, output = counts
            tokens = None if prompt is None or output is None else prompt + output
            yield _Request(place, _ids(place, routed), prompt, tokens), response.model or ""


def _routed(where: str, response: Response):
    """Yield the texts of a response: where, text, (tokens of the prompt, of the output)."""
    found = False
    for number, choice in enumerate(response.choices or []):
        for meta in (choice.meta_info, choice.sgl_ext, choice.sglext):
            if meta and meta.routed_experts is not None:
                found = True
                yield f"{where}, choice {number}", meta.routed_experts, _tokens(meta, choice.meta_info)
                break
    if found:
        return
    usage = msgspec.convert(msgspec.to_builtins(response.usage), Meta) if response.usage else None
    for meta in (response.meta_info, response.sgl_ext, response.sglext, Meta(response.routed_experts)):
        if meta and meta.routed_experts is not None:
            yield where, meta.routed_experts, _tokens(meta, response.meta_info, usage)
            return
    raise MoetraceError(f"{where} has no routed_experts: ask for return_routed_experts.")


def _tokens(*metas: Meta | None) -> tuple[int | None, int | None]:
    """Tokens of the prompt and of the output, from the first that knows them."""
    for meta in metas:
        if meta and meta.prompt_tokens is not None:
            return meta.prompt_tokens, meta.completion_tokens
    return None, None


def _ids(where: str, routed: str | bytes | list) -> np.ndarray:
    if isinstance(routed, list):
        raise MoetraceError(f"{where}: routed_experts is a list, not a base64 text.")
    data = from_base64(where, routed)
    if not data or len(data) % 4:
        raise MoetraceError(f"{where}: routed_experts is {len(data)} bytes, which are no int32.")
    return np.frombuffer(data, "<i4")


def _planes(request: _Request, top_k: int, hints: Hints) -> int:
    """How many layers the ids of a request are of: the model's, with its dense layers, or what the tokens leave."""
    values = request.ids.size
    rows = None if request.tokens is None else request.tokens - 1
    if hints.layers is not None:
        found = [n for n in range(hints.layers, 2 * hints.layers + 1) if _fits(request.ids, n, top_k, hints.layers)]
        if rows is not None:
            found = [n for n in found if values <= rows * n * top_k]
            found = [n for n in found if values == rows * n * top_k] or found
        if len(found) == 1:
            return found[0]
    if rows and values % (rows * top_k) == 0 and 0 < values // (rows * top_k) <= MAX_LAYERS:
        return values // (rows * top_k)
    raise MoetraceError(
        f"{request.where} holds {values} ids with {top_k} a layer, but does not say of how many layers: give --model "
        f"if the response tells no numbers of tokens; if it does, they do not fit."
    )


def _fits(ids: np.ndarray, planes: int, top_k: int, layers: int) -> bool:
    """Whether exactly `layers` of the planes have experts, and these for every token."""
    if ids.size % (planes * top_k):
        return False
    zero = (ids.reshape(-1, planes, top_k) == 0).all(axis=2)
    assert isinstance(zero, np.ndarray)
    dense = zero.all(axis=0)
    return int((~dense).sum()) == layers and (top_k == 1 or not zero[:, ~dense].any())
