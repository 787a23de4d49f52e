"""Traces of MoE-PolicyLang, as `moetrace.importers.moe_policylang` describes them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support.writers import Sample, routing

LAYERS, TOP_K, EXPERTS = 3, 2, 8
NUMBERS = [1, 2, 4]  # of the layers


def trace(path: Path, ids: np.ndarray, passes: Sequence[int], scores: np.ndarray | None = None) -> Path:
    """Passes of so many rows, layer by layer; `t` counts the rows of a pass."""
    sizes = {"num_layers": 5, "num_experts": EXPERTS, "top_k": TOP_K, "num_entries": ids[..., 0].size}
    lines: list[dict] = [{"model_name": "x/Model"} | sizes]
    first = 0
    for rows in passes:
        for place, layer in enumerate(NUMBERS[: ids.shape[1]]):
            for row in range(rows):
                record = {"t": row, "l": layer, "e": ids[first + row, place].tolist()}
                if scores is not None:
                    record["s"] = scores[first + row, place].tolist()
                lines.append(record)
        first += rows
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def samples(folder: Path) -> list[Sample]:
    ids = routing(8, LAYERS, TOP_K, EXPERTS)
    scores = np.random.default_rng(0).random(ids.shape).round(4)
    scored = trace(folder / "scored.jsonl", ids, [4, 1, 1, 2], scores)
    return [Sample([scored]), Sample([trace(folder / "plain.jsonl", ids[:, :1], [1] * 8)])]
