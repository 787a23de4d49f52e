"""Megatron-LM's inference server: `moe_topk_indices` of each choice, lists or base64, in HTTP responses.

It is [tokens - 1, layers, topk] of prompt and output together (`megatron/core/inference/.../endpoints`);
`prompt_moe_topk_indices` are its first rows again, which tell how long the prompt is where nothing else does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.importers.captured import Capture, Hints
from moetrace.importers.reading.request_spool import RequestSpool
from moetrace.importers.reading.responses import Choice, Payload, Response, array_of, responses
from moetrace.importers.vllm import add_response

KEY = b'"moe_topk_indices"'


def read_answers(sources: Sequence[Path], hints: Hints) -> Capture:
    """One capture of all requests, in the order of the sources."""
    requests, model = RequestSpool(hints, sources[0]), ""
    for path in sources:
        for where, response in responses(path, hints.reading, requests.unreadable):
            model = model or (response.model or "")
            add_response(requests, where, response, _arrays, "its routing being recorded")
    facts: dict[str, Any] = {"format": "megatron", "engine": "Megatron-LM", "batching": "not recorded"}
    return requests.capture("" if model == "EMPTY" else model, facts, sources)


def _arrays(where: str, response: Response, choice: Choice) -> tuple[np.ndarray | None, int | None, int | None]:
    routed = choice.moe_topk_indices
    start = routed.start if isinstance(routed, Payload) else None
    ids, part = array_of(where, routed), choice.prompt_moe_topk_indices
    told = choice.prompt_token_ids or (choice.message and choice.message.prompt_token_ids)
    usage = response.usage and response.usage.prompt_tokens
    prompt = None
    if not told and part is not None and (usage is None or len(response.choices or ()) > 1):
        rows = part if isinstance(part, list) else array_of(where, part)
        prompt = 0 if rows is None else len(rows)
    return ids, prompt, start
