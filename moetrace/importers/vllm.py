"""vLLM's routed experts of each request: `.npy` files of `CompletionOutput.routed_experts`, or HTTP responses.

Layouts as vLLM documents them (0.21 to 0.33: `vllm/outputs.py`, `entrypoints/openai/completion/protocol.py`,
`docs/training/routed_experts`):
* since about 0.22 one array [tokens - 1, layers, top_k] a completion, prompt and output together; the last token is
  never routed. uint8 up to 256 experts, else uint16 or int32; over HTTP base64 of the npy file in
  `choices[i].routed_experts`. Layers are all hidden layers: those without experts are planes of zeros.
* 0.21 has `prompt_routed_experts` [prompt, layers, top_k] and `routed_experts` [output, layers, top_k], int16, as
  arrays of which HTTP makes lists or base64.

Training stacks send a payload {"data": base64 of the bytes, "shape", "dtype", "start"} in the place of the npy file, or
write nothing but payloads, one a file or a line. In a place of SGLang's it is `sglang_request`'s.

A `.npy` file does not say how long the prompt is, HTTP does (`usage.prompt_tokens`). Nothing says how requests were
batched, nor how many experts there are.
"""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.importers.captured import Capture, Hints
from moetrace.importers.npy_layers import holds_layer
from moetrace.importers.reading import npy
from moetrace.importers.reading.events import first_value
from moetrace.importers.reading.request_spool import NO_ROUTING, UNREADABLE, RequestSpool
from moetrace.importers.reading.responses import Choice, Payload, Response, array_of, from_base64, responses, told_of
from moetrace.importers.reading.text import first_bytes, text_of
from moetrace.importers.reading.told import Told, of_parts, shared_out
from moetrace.spec.errors import MoetraceError

_NPY_IN_BASE64 = b"k05VTVBZ"
_JSON_KEYS = (b'"prompt_routed_experts"', b'"routed_experts":[[', b'"routed_experts": [[')
_PAYLOAD = re.compile(rb'"routed_experts"\s*:\s*\{')
_BARE_PAYLOAD = re.compile(rb'[\[\s]*\{(?=[^{}]{0,200}"data"\s*:\s*"[A-Za-z0-9+/=]*("|\Z))')
_SGLANGS = re.compile(rb'"(?:meta_info|sgl_?ext)"\s*:\s*\{')

# Finds the array [tokens, layers, top_k] of a choice, the tokens of its prompt, and its first position.
Arrays = Callable[[str, Response, Choice], tuple[np.ndarray | None, int | None, int | None]]


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is an array of three axes, base64 of one, or such a response."""
    if first.startswith(npy.MAGIC):
        try:
            header = npy.read_header(name, io.BytesIO(first))
        except (MoetraceError, ValueError, EOFError):
            return True  # damaged or refused: `read` says why
        return len(header.shape) == 3 and header.dtype.kind in "iu" and not holds_layer(header.shape, name)
    start = first.lstrip()
    if start.startswith(_NPY_IN_BASE64):
        return True
    if not first_value(first).startswith((b"{", b"[")):
        return False
    if b'routed_experts"' in first and _NPY_IN_BASE64 in first:
        return True
    if payload := _PAYLOAD.search(first):
        return not _SGLANGS.search(first, 0, payload.start())
    if is_bare_payload(first_value(first)):
        return True
    return any(key in first for key in _JSON_KEYS)


def is_bare_payload(first: bytes) -> bool:
    """Whether a JSON value that begins with these bytes is a payload in no answer; its data may hide the other keys."""
    found = _BARE_PAYLOAD.match(first)
    if not found:
        return False
    return not found[1] or all(key in first for key in (b'"shape"', b'"dtype"'))


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """One capture of all requests; files in the order of their names are in that of the numbers in these."""
    if list(sources) == sorted(sources):  # else the user has ordered them
        sources = sorted(sources, key=natural)
    requests = RequestSpool(hints, sources[0])
    model, engine, arrays = "", "not recorded", False
    for path in sources:
        first = first_bytes(path, 64).lstrip()
        if first.startswith((npy.MAGIC, _NPY_IN_BASE64)):
            engine, arrays = "vLLM", True
            try:
                array = _alone(path, first, hints)
            except MoetraceError as error:  # None, of a request that was aborted, is a Python object
                requests.unreadable(str(error))
            else:
                requests.add(str(path), array)
        else:
            for where, response in responses(path, hints.reading, requests.unreadable):
                model = model or (response.model or "")
                if not _add_payload(requests, where, response):
                    engine = "vLLM"
                    add_response(requests, where, response)
    facts: dict[str, Any] = {"format": "vllm", "engine": engine, "batching": "not recorded"}
    capture = requests.capture(model, facts, sources)
    if arrays and hints.layers is None and (rows := capture.request.size) < capture.layer_index.size:
        hints.note(
            f"{sources[0]}: there are more layers ({capture.layer_index.size}) than tokens ({rows}): if the layers are "
            f"the first axis, transpose the array to [tokens, layers, top_k]."
        )
    return [capture]


def _alone(path: Path, first: bytes, hints: Hints) -> np.ndarray:
    """The array that is all of a file, or base64 of one."""
    if first.startswith(npy.MAGIC):
        return npy.mapped(path, hints.reading)
    text = text_of(path)
    hints.reading(len(text))
    return npy.from_bytes(str(path), from_base64(str(path), text.strip()))


def natural(path: Path) -> list[tuple[int, int, str]]:
    """A sort key by which 2.npy precedes 10.npy."""
    pieces = re.findall(r"\d{1,18}|\D+|\d", str(path))
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces]


def _add_payload(requests: RequestSpool, where: str, response: Response) -> bool:
    """Add a payload that stands in no answer; return whether it is one."""
    try:
        payload = response.payload
        array = array_of(where, payload)
    except MoetraceError as error:
        requests.leave_out(UNREADABLE, str(error) if str(error).startswith(where) else f"{where}: {error}")
        return True
    if payload is None or array is None:
        return False
    requests.add(where, array, Told(start=payload.start))
    return True


def add_response(
    requests: RequestSpool,
    where: str,
    response: Response,
    arrays: Arrays | None = None,
    option: str = "--enable-return-routed-experts",
) -> None:
    """Add the choices of a response, each with the array and the tokens of its prompt that `arrays` finds, or vLLM's.

    One without routing, or with routing that can't be read, is left out.
    """
    if not response.choices:
        told = told_of(response)
        if response.usage and response.id is not None and (requests.finish(told) or told.chunk):
            return
        if response.routed_experts is None:
            requests.leave_out(NO_ROUTING, f"{where} has no choices: it is no response of a completion.")
            return
    found: list[tuple[str, np.ndarray, Told]] = []
    parts: list[tuple[int, int]] = []  # of 0.21
    for number, choice in enumerate(response.choices or [_of_response(response)]):
        place = f"{where}, choice {number}"
        try:
            array, prompt, start = (arrays or _arrays)(place, response, choice)
        except MoetraceError as error:
            requests.leave_out(UNREADABLE, str(error))
            continue
        told = told_of(response, choice, number, start)
        if array is not None:
            found.append((place, array, told))
            parts.extend([] if prompt is None else [(prompt, len(array) - prompt)])
        elif not told.chunk:
            what = f"{place} has no routed_experts: it was aborted, or the server must run with {option}."
            requests.leave_out(NO_ROUTING, what)
    told, shaped = [told for _, _, told in found], [np.atleast_3d(array) for _, array, _ in found]
    told = of_parts(where, parts, told) if found and len(parts) == len(found) else shared_out(where, shaped, told)
    for (place, array, _), one in zip(found, told, strict=True):
        requests.add(place, array, one)


def _of_response(response: Response) -> Choice:
    return Choice(
        routed_experts=response.routed_experts,
        routed_experts_prompt_start=response.routed_experts_prompt_start,
    )


def _arrays(where: str, response: Response, choice: Choice) -> tuple[np.ndarray | None, int | None, int | None]:
    """The array of a choice, the tokens of its prompt if the prompt's part tells them, and where it begins."""
    routed = choice.routed_experts
    output = array_of(where, routed)
    prompt = array_of(where, choice.prompt_routed_experts or response.prompt_routed_experts)
    start = routed.start if isinstance(routed, Payload) else None
    for said in (choice.routed_experts_prompt_start, response.routed_experts_prompt_start):
        start = said if start is None else start
    if output is None or prompt is None:
        return output, None, start
    if prompt.ndim != 3 or prompt.shape[1:] != output.shape[1:]:
        raise MoetraceError(f"{where}: the prompt's routing is {prompt.shape}, the output's {output.shape}.")
    if not np.can_cast(prompt.dtype, output.dtype):
        prompt = prompt.astype(np.int64)
    return np.concatenate([prompt, output]), len(prompt), start
