"""SGLang's routed experts of each request: base64 of int32 without a header, in responses or by itself in a file.

Layout as SGLang writes it (`--enable-return-routed-experts`; 0.5.23: `state_capturer/routed_experts.py`,
`managers/detokenizer_manager.py`): int32 [tokens - 1 - routed_experts_start_len, num_hidden_layers, top_k], the last
token being never routed; layers without experts are planes of zeros. It is `meta_info.routed_experts` of a response of
`/generate`, of each choice (OpenAI interface, `return_meta_info`), or `sglext.routed_experts` (of the first choice).

In its place may stand a payload {"data", "shape", "dtype", "start"}, as training stacks make it; and chunks of a stream
may come without `usage`, which a later one then tells.

The text does not say its shape: top_k and experts come from --model or --experts and --top-k; the layers from the
numbers of tokens that `meta_info` or `usage` tell, or from the model, whose dense layers must then be the only zeros.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from moetrace.importers.captured import FIRST_BYTES, Capture, Hints
from moetrace.importers.reading.events import first_value
from moetrace.importers.reading.request_spool import NO_ROUTING, OTHER_SHAPE, UNREADABLE, RequestSpool
from moetrace.importers.reading.responses import (
    Choice,
    Meta,
    Payload,
    Response,
    Routed,
    Usage,
    array_of,
    from_base64,
    responses,
    told_of,
)
from moetrace.importers.reading.text import MAX_LINE_BYTES, first_bytes, text_of
from moetrace.importers.reading.told import Told, shared_out
from moetrace.importers.vllm import recognize as recognize_vllm
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import MAX_EXPERTS, MAX_LAYERS

_KEYS = (b'"meta_info"', b'"sgl_ext"', b'"sglext"', b'"routed_experts"')
_MOST_WAITING = 1000  # chunks of a stream
_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")


class _Answer(NamedTuple):
    where: str
    ids: np.ndarray  # int32 [values], or of a payload integers [rows, planes, top_k]
    told: Told


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is such a response, or base64 of small int32."""
    if recognize_vllm(first, name):
        return False
    start = first_value(first)
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
    requests, planes, model = RequestSpool(hints, sources[0]), 0, ""
    stream = _Stream()
    for path in sources:
        if not first_value(first_bytes(path, 4096)).startswith((b"{", b"[")):
            planes = _add(requests, [_bare(path, hints)], hints, planes)
            continue
        for where, response in responses(path, hints.reading, requests.unreadable):
            model = model or (response.model or "")
            for place, whole in stream.ready(where, response, planes or hints.layers):
                planes = add_response(requests, place, whole, hints, planes)
    for where, response in stream.waiting:
        planes = add_response(requests, where, response, hints, planes)
    facts: dict[str, Any] = {"format": "sglang-request", "engine": "SGLang", "batching": "not recorded"}
    return [requests.capture(model, facts, sources)]


class _Stream:
    """Holds chunks back whose number of layers follows from the tokens that a later chunk tells."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, Response]] = []

    def ready(self, where: str, response: Response, layers: int | None) -> list[tuple[str, Response]]:
        """The answers that can be read now: this one, and those that waited for it."""
        told = told_of(response)
        if not told.chunk or layers:
            found, self.waiting = [*self.waiting, (where, response)], []
            return found
        flat = next((isinstance(routed, str) for _, routed, _ in _routed(where, response)), False)
        if flat and next(told.prompt is None for _, _, told in _routed(where, response)):
            self.waiting.append((where, response))
            if len(self.waiting) <= _MOST_WAITING:
                return []
            found, self.waiting = self.waiting, []
            return found
        if told.prompt is None:
            return [(where, response)]
        mine = [one for one in self.waiting if told_of(one[1]).id == told.id]
        self.waiting = [one for one in self.waiting if told_of(one[1]).id != told.id]
        for _, one in mine:
            one.usage = Usage(told.prompt, told.output)
        return [*mine, (where, response)]


def add_response(requests: RequestSpool, where: str, response: Response, hints: Hints, planes: int = 0) -> int:
    """Add the answers of a response, one or more; return how many layers, with dense ones, they are of.

    That is `planes` unless it is 0, not known. One without routing, or with routing that can't be read, is left out.
    """
    answers: list[_Answer] = []
    found = False
    for place, routed, told in _routed(where, response):
        found = True
        try:
            if isinstance(routed, Payload):
                ids, told = array_of(place, routed), told._replace(start=routed.start)
                assert ids is not None
            else:
                ids = _ids(place, routed)
        except MoetraceError as error:
            requests.leave_out(UNREADABLE, str(error))
            continue
        if ids.size:
            answers.append(_Answer(place, ids, told))
        else:
            requests.leave_out(NO_ROUTING, f"{place}: routed_experts is 0 bytes, so it has no tokens.")
    shaped = [answer for answer in answers if answer.ids.ndim == 3]
    if shaped:
        told = shared_out(where, [answer.ids for answer in shaped], [answer.told for answer in shaped])
        for answer, one in zip(shaped, told, strict=True):
            requests.add(answer.where, answer.ids, one)
    answers = [answer for answer in answers if answer.ids.ndim != 3]
    if answers:
        return _add(requests, answers, hints, planes)
    if shaped:
        return planes
    told = told_of(response)
    if not found and not told.chunk:
        what = (
            f"{where} has no routed_experts: it was aborted, or the server must run with "
            f"--enable-return-routed-experts and the request must say return_routed_experts."
        )
        requests.leave_out(NO_ROUTING, what)
    elif not found:
        requests.finish(told)
    return planes


def _add(requests: RequestSpool, answers: list[_Answer], hints: Hints, planes: int) -> int:
    """Add the answers of one response; return the number of their planes."""
    top_k = hints.need("top_k", Path(answers[0].where))
    planes = planes or _planes(answers[0], top_k, hints)
    fitting: list[_Answer] = []
    for answer in answers:
        if answer.ids.size % (planes * top_k):
            what = (
                f"{answer.where} holds {answer.ids.size} ids, which is no whole number of tokens of {planes} "
                f"layers with {top_k} experts each."
            )
            requests.leave_out(OTHER_SHAPE, what)
        else:
            fitting.append(answer)
    if fitting:
        arrays = [answer.ids.reshape(-1, planes, top_k) for answer in fitting]
        told = shared_out(fitting[0].where, arrays, [answer.told for answer in fitting])
        for answer, ids, one in zip(fitting, arrays, told, strict=True):
            requests.add(answer.where, ids, one)
    return planes


def _bare(path: Path, hints: Hints) -> _Answer:
    """The text of a file that is nothing but base64."""
    if path.stat().st_size > MAX_LINE_BYTES:
        raise MoetraceError(f"{path} is longer than {MAX_LINE_BYTES >> 20} MiB.")
    text = text_of(path)
    hints.reading(len(text))
    return _Answer(str(path), _ids(str(path), text.strip()), Told())


def _routed(where: str, response: Response) -> Iterator[tuple[str, Routed, Told]]:
    """Yield the texts of a response: where, text, what it says of its tokens."""
    found = False
    for number, choice in enumerate(response.choices or []):
        for meta in (choice.meta_info, choice.sgl_ext, choice.sglext, Meta(choice.routed_experts)):
            if meta and meta.routed_experts is not None:
                found = True
                told = told_of(response, msgspec.structs.replace(choice, meta_info=_with_tokens(meta, choice)), number)
                yield f"{where}, choice {number}", meta.routed_experts, told
                break
    if found:
        return
    for meta in (response.meta_info, response.sgl_ext, response.sglext, Meta(response.routed_experts)):
        if meta and meta.routed_experts is not None:
            counts = response if response.meta_info else msgspec.structs.replace(response, meta_info=meta)
            yield where, meta.routed_experts, told_of(counts)
            return


def _with_tokens(meta: Meta, choice: Choice) -> Meta | None:
    """The one of a choice's places that tells its tokens."""
    return meta if meta.prompt_tokens is not None else choice.meta_info


def _ids(where: str, routed: Routed | bytes) -> np.ndarray:
    if not isinstance(routed, str | bytes):
        raise MoetraceError(f"{where}: routed_experts is a list, not a base64 text.")
    data = from_base64(where, routed)
    if len(data) % 4:
        raise MoetraceError(f"{where}: routed_experts is {len(data)} bytes, which are no int32.")
    return np.frombuffer(data, "<i4")


def _planes(answer: _Answer, top_k: int, hints: Hints) -> int:
    """How many layers the ids of an answer are of: the model's, with its dense layers, or what the tokens leave."""
    values, told = answer.ids.size, answer.told
    rows = None
    if told.prompt is not None and told.output is not None:
        rows = told.prompt + told.output - told.choices  # the last token is not routed
    if hints.layers is not None:
        found = [n for n in range(hints.layers, 2 * hints.layers + 1) if _fits(answer.ids, n, top_k, hints.layers)]
        if rows is not None:
            most = rows + (told.output == 0)
            found = [n for n in found if values <= most * n * top_k] or found
            found = [n for n in found if values == rows * n * top_k] or found
        if len(found) == 1:
            return found[0]
    # Other numbers of rows occur where nothing was generated, and where the prompt's cached tokens are missing.
    likely = [] if rows is None or told.choices > 1 else [{rows, told.prompt} if told.output == 0 else {rows}]
    if likely and told.cached:
        likely.append({count - told.cached for count in likely[0]})
    for counts in likely:
        planes = {values // (n * top_k) for n in counts if n > 0 and values % (n * top_k) == 0}
        planes = {n for n in planes if 0 < n <= MAX_LAYERS}
        if len(planes) == 1:
            return planes.pop()
    raise MoetraceError(
        f"{answer.where} holds {values} ids with {top_k} a layer, but does not say of how many layers: give --model "
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
