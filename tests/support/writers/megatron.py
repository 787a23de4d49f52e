"""Routing traces of Megatron-LM, as `moetrace.importers.megatron` describes them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from support.writers import Sample, routing

# (step, micro-batch) -> ids [tokens, layers, top_k] of one rank.
Batches = Mapping[tuple[int, int], np.ndarray]


def records(rank: int, batches: Batches, layers: list[int], mtp: bool = False, sidecar: bool = False) -> str:
    """A record a step, micro-batch and layer, and if so, one of a block of multi-token prediction."""
    lines = []
    for (step, _), ids in batches.items():
        for entry, layer in enumerate(layers):
            lines.append(_record(step, "decoder", layer, rank, ids[:, entry]))
            if sidecar:
                lines[-1] |= {"hs_offset": 0, "hs_bytes": 8, "hs_shape": [len(ids), 2]}
        if mtp:
            lines.append(_record(step, "mtp", layers[0], rank, ids[:, 0]) | {"mtp_idx": 0})
    return "".join(json.dumps(line) + "\n" for line in lines)


def _record(step: int, block: str, layer: int, rank: int, ids: np.ndarray) -> dict:
    record = {"step": step, "stage": "pre_dispatch", "block": block, "layer": layer, "rank": rank}
    return record | {"num_tokens": len(ids), "topk": ids.shape[1], "top_indices": ids.tolist()}


def answer(ids: np.ndarray, prompt: int) -> dict:
    """What the inference server answers."""
    choice = {
        "index": 0,
        "text": "a",
        "moe_topk_indices": ids.tolist(),
        "prompt_moe_topk_indices": ids[:prompt].tolist(),
    }
    usage = {"prompt_tokens": prompt, "completion_tokens": len(ids) + 1 - prompt}
    return {"id": "x", "model": "EMPTY", "choices": [choice], "usage": usage}


def samples(folder: Path) -> list[Sample]:
    files = []
    for rank in range(2):
        batches = {key: routing(3, 2, 2, 8, 10 * rank + n) for n, key in enumerate([(0, 0), (0, 1), (1, 0)])}
        files.append(folder / f"router_trace_rank{rank}.jsonl")
        files[-1].write_text(records(rank, batches, [1, 2], mtp=True))
    alone = folder / "alone_rank0.jsonl"
    alone.write_text(records(0, {(0, 0): routing(4, 3, 2, 8), (1, 0): routing(1, 3, 2, 8)}, [0, 1, 3], sidecar=True))
    answers = folder / "answers.jsonl"
    answers.write_text("".join(json.dumps(answer(routing(6, 3, 2, 8, n), 4)) + "\n" for n in range(3)))
    return [Sample(paths, {"num_experts": 8}) for paths in (files, [alone], [answers])]
