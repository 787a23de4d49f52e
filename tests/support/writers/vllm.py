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


def samples(folder: Path) -> list[Sample]:
    first, second = request(6, 4, 2, 8, 0, dense=1), request(5, 4, 2, 8, 1, dense=1)
    arrays = [folder / "request-2.npy", folder / "request-10.npy"]
    for path, ids in zip(arrays, (first, second), strict=True):
        np.save(path, ids)
    line = folder / "responses.jsonl"
    line.write_text(json.dumps(response([first], 4)) + "\n" + json.dumps(response([second, first], 2)) + "\n")
    one = folder / "response.json"
    one.write_text(json.dumps(response_0_21(first[:4].astype(np.int16), [first[4:].astype(np.int16)]), indent=1))
    hints = {"num_experts": 8}
    return [Sample(arrays, hints | {"layers": 3}), Sample([line], hints), Sample([one], hints)]
