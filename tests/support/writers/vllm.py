"""vLLM's routed experts of each request, as `moetrace.importers.vllm` describes them."""

import base64
import io
import json
from pathlib import Path

import numpy as np

from support.writers import Sample, routing


def request(rows: int, layers: int, top_k: int, num_experts: int, seed: int = 0, dense: int = 0) -> np.ndarray:
    """What vLLM returns: uint8 up to 256 experts, zeros in the first `dense` layers."""
    ids = routing(rows, layers, top_k, num_experts, seed).astype(np.uint8 if num_experts <= 256 else np.uint16)
    ids[:, :dense] = 0
    return ids


def npy_base64(ids: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, ids)
    return base64.b64encode(file.getvalue()).decode()


def response(choices: list[np.ndarray], prompt: int, model: str = "x/Some-Model") -> dict:
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "model": model,
        "choices": [
            {"index": n, "text": "é\n", "logprobs": None, "finish_reason": "length", "routed_experts": npy_base64(ids)}
            for n, ids in enumerate(choices)
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": sum(len(ids) + 1 - prompt for ids in choices)},
    }


def response_0_21(prompt: np.ndarray, outputs: list[np.ndarray], encode=np.ndarray.tolist) -> dict:
    """The two parts of 0.21, int16: the prompt's at the response, the output's at each choice."""
    choices = [{"index": n, "text": "a", "routed_experts": encode(ids)} for n, ids in enumerate(outputs)]
    return {"model": "x/Some-Model", "prompt_routed_experts": encode(prompt), "choices": choices}


def payload(ids: np.ndarray, start: int = 0) -> dict:
    """The array as training stacks send it."""
    data = base64.b64encode(ids.tobytes()).decode()
    return {"data": data, "shape": list(ids.shape), "dtype": str(ids.dtype), "start": start}


def events(path: Path, ids: np.ndarray, prompt: int) -> Path:
    """A stream of server-sent events, the prompt in the first and a token in each other."""
    cuts = [(0, prompt), *((row, row + 1) for row in range(prompt, len(ids)))]
    lines = []
    for start, stop in cuts:
        choice = {"index": 0, "routed_experts": payload(ids[start:stop], start)}
        usage = {"prompt_tokens": prompt, "completion_tokens": stop + 1 - prompt}
        chunk = {"id": "cmpl-3", "object": "text_completion.chunk", "choices": [choice], "usage": usage}
        lines.append(f"data: {json.dumps(chunk)}\n\n")
    path.write_text("".join(lines) + "data: [DONE]\n\n")
    return path


def samples(folder: Path) -> list[Sample]:
    first, second = request(6, 4, 2, 8, 0, dense=1), request(5, 4, 2, 8, 1, dense=1)
    arrays = [folder / "request-2.npy", folder / "request-10.npy"]
    for path, ids in zip(arrays, (first, second), strict=True):
        np.save(path, ids)
    line = folder / "responses.jsonl"
    line.write_text(json.dumps(response([first], 4)) + "\n" + json.dumps(response([second, first], 2)) + "\n")
    one = folder / "response.json"
    one.write_text(json.dumps(response_0_21(first[:4].astype(np.int16), [first[4:].astype(np.int16)]), indent=1))
    turns = folder / "turns.jsonl"
    turn = response([np.concatenate([first, second])], 8) | {"id": "cmpl-1"}
    turn["usage"]["prompt_tokens_details"] = {"cached_tokens": 4}
    aborted = {"id": "cmpl-2", "choices": [{"index": 0, "routed_experts": None}]}
    turns.write_text("".join(json.dumps(answer) + "\n" for answer in (response([first], 4), aborted, turn)))
    bare, bare_lines = folder / "payload.json", folder / "payloads.jsonl"
    bare.write_text(json.dumps(payload(first.astype(np.int16), 3), indent=1))
    bare_lines.write_text("".join(json.dumps(payload(ids)) + "\n" for ids in (first, second)))
    hints = {"num_experts": 8}
    return [
        Sample(arrays, hints | {"layers": 3}),
        Sample([line], hints),
        Sample([one], hints),
        Sample([turns], hints),
        Sample([events(folder / "stream.txt", first, 4)], hints),
        Sample([bare], hints),
        Sample([bare_lines], hints),
    ]
