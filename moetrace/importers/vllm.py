"""vLLM's routed experts of each request: `.npy` files of `CompletionOutput.routed_experts`, or HTTP responses.

Layouts as vLLM documents them (0.21 to 0.33: `vllm/outputs.py`, `entrypoints/openai/completion/protocol.py`,
`docs/training/routed_experts`):
* since about 0.22 one array [tokens - 1, layers, top_k] a completion, prompt and output together; the last token is
  never routed. uint8 up to 256 experts, else uint16 or int32; over HTTP base64 of the npy file in
  `choices[i].routed_experts`. Layers are all hidden layers: those without experts are planes of zeros.
* 0.21 has `prompt_routed_experts` [prompt, layers, top_k] and `routed_experts` [output, layers, top_k], int16, as
  arrays of which HTTP makes lists or base64.

A `.npy` file does not say how long the prompt is, HTTP does (`usage.prompt_tokens`). Nothing says how requests were
batched, nor how many experts there are.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.importers.captured import Capture, Hints
from moetrace.importers.reading import npy
from moetrace.importers.reading.request_spool import RequestSpool
from moetrace.importers.reading.responses import Response, Routed, from_base64, responses
from moetrace.importers.reading.text import first_bytes, text_of
from moetrace.spec.errors import MoetraceError

_NPY_IN_BASE64 = b"k05VTVBZ"
_JSON_KEYS = (b'"prompt_routed_experts"', b'"routed_experts":[[', b'"routed_experts": [[')


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is an array of three axes, base64 of one, or such a response."""
    if first.startswith(npy.MAGIC):
        try:
            header = npy.read_header(name, io.BytesIO(first))
        except (MoetraceError, ValueError, EOFError):
            return True  # damaged or refused: `read` says why
        return len(header.shape) == 3 and header.dtype.kind in "iu"
    start = first.lstrip()
    if start.startswith(_NPY_IN_BASE64):
        return True
    if not start.startswith((b"{", b"[")):
        return False
    return (b'routed_experts"' in first and _NPY_IN_BASE64 in first) or any(key in first for key in _JSON_KEYS)


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """One capture of all requests, files in the order of their names, the numbers in these as numbers."""
    sources = sorted(sources, key=natural)
    requests = RequestSpool(hints, sources[0])
    model = ""
    for path in sources:
        first = first_bytes(path, 64).lstrip()
        if first.startswith(npy.MAGIC):
            requests.add(str(path), _mapped(path, hints))
        elif first.startswith(_NPY_IN_BASE64):
            text = text_of(path)
            hints.reading(len(text))
            requests.add(str(path), npy.from_bytes(str(path), from_base64(str(path), text.strip())))
        else:
            for where, response in responses(path, hints.reading):
                model = model or (response.model or "")
                _add(requests, where, response)
    facts: dict[str, Any] = {"format": "vllm", "engine": "vLLM", "batching": "not recorded"}
    return [requests.capture(model, facts, sources)]


def natural(path: Path) -> list[tuple[int, int, str]]:
    """A sort key by which 2.npy precedes 10.npy."""
    pieces = re.findall(r"\d{1,18}|\D+|\d", str(path))
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces]


def _mapped(path: Path, hints: Hints) -> np.ndarray:
    """The array of an npy file, from which a part is read when it is needed."""
    where = str(path)
    try:
        with path.open("rb") as file:
            header = npy.read_header(where, file)
    except (ValueError, EOFError) as error:
        raise MoetraceError(f"{where} is no NumPy array: {str(error)[:200]}.") from error
    if header.header_bytes + header.nbytes != path.stat().st_size:
        raise MoetraceError(f"{where} says it has shape {header.shape}, but its size differs.")
    if not header.nbytes:
        raise MoetraceError(f"{where} is empty: its shape is {header.shape}.")
    hints.reading(path.stat().st_size)
    return np.memmap(path, header.dtype, "r", header.header_bytes, header.shape)


def _add(requests: RequestSpool, where: str, response: Response) -> None:
    if not response.choices:
        raise MoetraceError(f"{where} has no choices: it is no response of a completion.")
    prompt_tokens = response.usage.prompt_tokens if response.usage else None
    for number, choice in enumerate(response.choices):
        place = f"{where}, choice {number}"
        output = _array(place, choice.routed_experts)
        if output is None:
            raise MoetraceError(f"{place} has no routed_experts: serve with --enable-return-routed-experts.")
        prompt = _array(place, choice.prompt_routed_experts or response.prompt_routed_experts)
        if prompt is None:
            requests.add(place, output, prompt=prompt_tokens)
            continue
        if prompt.ndim != 3 or prompt.shape[1:] != output.shape[1:]:
            raise MoetraceError(f"{place}: the prompt's routing is {prompt.shape}, the output's {output.shape}.")
        if not np.can_cast(prompt.dtype, output.dtype):
            prompt = prompt.astype(np.int64)
        requests.add(place, np.concatenate([prompt, output]), prompt=len(prompt))


def _array(where: str, routed: Routed) -> np.ndarray | None:
    if routed is None:
        return None
    if isinstance(routed, str):
        return npy.from_bytes(f"{where}: routed_experts", from_base64(where, routed))
    try:
        return np.array(routed, np.int64)
    except (ValueError, OverflowError) as error:
        raise MoetraceError(f"{where}: routed_experts is no array of one shape [tokens, layers, top_k].") from error
