"""SGLang's routed experts of each request, as `moetrace.importers.sglang_request` describes them."""

import base64
import json
from pathlib import Path

import numpy as np

from support.writers import Sample, routing
from support.writers.vllm import payload


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


def with_payload(ids: np.ndarray, prompt: int, start: int = 0) -> dict:
    """An answer of /generate as a training stack keeps it: the ids with their own shape and dtype."""
    whole = generated(ids, prompt, start)
    whole["meta_info"]["routed_experts"] = payload(ids.astype(np.uint16), start)
    return whole


def events(path: Path, chunks: list[dict]) -> Path:
    """A log of server-sent events."""
    path.write_text("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")
    return path


def stream_of_generate(path: Path, ids: np.ndarray, prompt: int, name: str = "a") -> Path:
    """What /generate streams: each chunk repeats what it said before; the last one has the routing."""
    chunks = [generated(ids[:stop], prompt) for stop in range(prompt, len(ids) + 1)]
    for chunk in chunks:
        chunk["meta_info"]["id"] = name
        if chunk is not chunks[-1]:
            del chunk["meta_info"]["routed_experts"]
    return events(path, chunks)


def stream_of_chat(path: Path, ids: np.ndarray, prompt: int) -> Path:
    """What the OpenAI interface streams: text, then the routing, then the numbers of tokens."""
    head = {"id": "b", "object": "chat.completion.chunk", "model": "x/Some-Model"}
    usage = {"prompt_tokens": prompt, "completion_tokens": len(ids) + 1 - prompt}
    text_chunk = head | {"choices": [{"index": 0, "delta": {"content": "é"}}], "usage": None}
    return events(
        path,
        [
            *[text_chunk] * 2,
            head | {"choices": [], "sglext": {"routed_experts": text(ids)}},
            head | {"choices": [], "usage": usage},
        ],
    )


def samples(folder: Path) -> list[Sample]:
    first, second = request(6, 4, 2, 8, 0, dense=1), request(5, 4, 2, 8, 1, dense=1)
    lines = folder / "responses.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in (generated(first, 4), generated(second, 2, start_len=3))))
    one = folder / "one.json"
    one.write_text(json.dumps(completion(first, 4), indent=1))
    bare = folder / "bare.b64"
    bare.write_text(text(first))
    payloads = folder / "payloads.jsonl"
    payloads.write_text("".join(json.dumps(with_payload(ids, 4)) + "\n" for ids in (first, second)))
    hints = {"num_experts": 8, "top_k": 2}
    model = hints | {"layers": 3}
    streams = [stream_of_generate(folder / "generate.txt", first, 4), stream_of_chat(folder / "chat.txt", second, 2)]
    samples = [
        Sample([lines], model),
        Sample([one], hints),
        Sample([bare], model),
        Sample([payloads], {"num_experts": 8}),
    ]
    return [*samples, *(Sample([path], hints) for path in streams)]
