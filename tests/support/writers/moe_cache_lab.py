"""Traces of moe-cache-lab, as `moetrace.importers.moe_cache_lab` describes them."""

import json
from pathlib import Path

import numpy as np

from support.writers import Sample, routing

HEAD = {
    "record_type": "metadata",
    "format": "moe-cache-lab.routing-jsonl",
    "model_id": "org/model",
    "source_text": None,
}


def trace(ids: np.ndarray, prompt: int, layers: list[int], version: int = 1, **meta) -> str:
    """A trace of ids [tokens, layers, k]: the prompt layer by layer, then token by token; -1 is unassigned."""
    profile = {"routing_stage": "decoder", "num_experts": 8, "assigned_experts_per_token": ids.shape[2]}
    sizes = {"num_experts": 8, "experts_per_token": ids.shape[2]}
    stages = {"routing_stages": [profile | {"allows_unassigned": True}]}
    lines = [HEAD | {"format_version": version} | (sizes if version == 1 else stages) | meta]
    cells = [(t, entry) for entry in range(len(layers)) for t in range(prompt)]
    cells += [(t, entry) for t in range(prompt, len(ids)) for entry in range(len(layers))]
    for token, entry in cells:
        own = [] if ids[token, entry, 0] < 0 else ids[token, entry].tolist()
        phase = "prompt" if token < prompt else "generated"
        line = {"record_type": "routing_selection", "token_position": token, "layer": layers[entry], "token_id": None}
        line |= {"phase": phase, "selected_experts": own, "selected_probabilities": [0.25 for _ in own]}
        if version == 2:
            line |= {"routing_stage": "decoder", "phase": f"decoder_{phase}"}
            line |= {"assignment_state": "assigned" if own else "unassigned"}
        lines.append(line)
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)


def samples(folder: Path) -> list[Sample]:
    one, two = folder / "v1.jsonl", folder / "v2.jsonl"
    one.write_text(trace(routing(5, 2, 2, 8), 3, [0, 1]))
    ids = routing(4, 3, 1, 8)
    ids[1, 2] = -1
    two.write_text(trace(ids, 2, [1, 3, 5], 2))
    return [Sample([one]), Sample([two])]
