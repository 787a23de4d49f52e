"""Route logs in JSON lines, as `moetrace.importers.jsonl` describes them."""

import json
from pathlib import Path

import numpy as np

from support.writers import Sample, routing

META = {
    "type": "meta",
    "model_id": "x/Some-Model",
    "vllm_version": "0.15.1",
    "torch_version": "2.9.1",
    "device": "NVIDIA GeForce RTX 5080",
    "seed": 1234,
    "layers_logged": [0],
    "top_k": 2,
}


def write(
    path: Path, ids: np.ndarray, calls: list[int], *, runs_on: bool = False, weights: bool = True, **meta
) -> Path:
    """Routes of ids [rows, layers, top_k], of forward passes of so many rows, layer by layer within each."""
    lines = [META | {"layers_logged": list(range(ids.shape[1])), "top_k": ids.shape[2]} | meta]
    start = count = 0
    for rows in calls:
        for layer in range(ids.shape[1]):
            for row in range(rows):
                chosen = ids[start + row, layer].tolist()
                route = {"type": "route", "req_id": "r1", "token_idx": count if runs_on else row, "layer": layer}
                route["topk_ids"] = chosen
                if weights:
                    route["topk_weights"] = [0.5 / (slot + 1) for slot in range(len(chosen))]
                lines.append(route)
                count += 1
        start += rows
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def samples(folder: Path) -> list[Sample]:
    ids = routing(9, 3, 2, 8)
    calls = write(folder / "calls.jsonl", ids, [4, 3, 1, 1])
    runs_on = write(folder / "runs.jsonl", ids[:, :1], [9], runs_on=True, weights=False, num_experts=8)
    return [Sample([calls], {"num_experts": 8}), Sample([runs_on])]
