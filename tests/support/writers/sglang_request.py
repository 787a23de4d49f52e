"""SGLang's routed experts of each request, as `moetrace.importers.sglang_request` describes them."""

import base64
import json
from pathlib import Path

import numpy as np

from support.writers import Sample, routing


def text(ids: np.ndarray) -> str:
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def request(rows: int, layers: int, top_k: int, num_experts: int, seed: int = 0, dense: int = 0) -> np.ndarray:
    ids = routing(rows, layers, top_k, num_experts, seed)
    ids[:, :dense] = 0
    return ids


def generated(ids: np.ndarray, prompt: int, start_len: int = 0) -> dict:
    """A response of /generate to a request of which the rows from `start_len` on are `ids`."""
    output = start_len + len(ids) + 1 - prompt
    meta = {"id": "a", "finish_reason": {"type": "length"}, "prompt_tokens": prompt, "completion_tokens": output}
    return {"text": "é", "output_ids": [1] * output, "meta_info": meta | {"routed_experts": text(ids)}}


def completion(ids: np.ndarray, prompt: int) -> dict:
    """A response of the OpenAI interface, with the ids in its extension."""
    usage = {"prompt_tokens": prompt, "completion_tokens": len(ids) + 1 - prompt}
    choices = [{"index": 0, "message": {"role": "assistant", "content": "a"}}]
    return {"model": "x/Some-Model", "choices": choices, "usage": usage, "sglext": {"routed_experts": text(ids)}}


def samples(folder: Path) -> list[Sample]:
    first, second = request(6, 4, 2, 8, 0, dense=1), request(5, 4, 2, 8, 1, dense=1)
    lines = folder / "responses.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in (generated(first, 4), generated(second, 2, start_len=3))))
    one = folder / "one.json"
    one.write_text(json.dumps(completion(first, 4), indent=1))
    bare = folder / "bare.b64"
    bare.write_text(text(first))
    hints = {"num_experts": 8, "top_k": 2}
    model = hints | {"layers": 3}
    return [Sample([lines], model), Sample([one], hints), Sample([bare], model)]
