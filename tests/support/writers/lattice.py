"""JSON lines of lattice, as `moetrace.importers.lattice` describes them."""

import json
from pathlib import Path

import numpy as np

from support.writers import Sample, routing


def records(ids: np.ndarray, gates: np.ndarray, positions: list[int], layers: list[int]) -> str:
    """A record a token and layer, of `ids` and `gates` [tokens, layers, top_k]; serde writes no blanks."""
    lines = []
    for token, position in enumerate(positions):
        for entry, layer in enumerate(layers):
            record = {"layer_idx": layer, "token_idx": position, "selected_ids": ids[token, entry].tolist()}
            record["gate_weights"] = [None if gate != gate else gate for gate in gates[token, entry].tolist()]
            lines.append(json.dumps(record, separators=(",", ":")))
    return "\n".join(lines) + "\n"


def samples(folder: Path) -> list[Sample]:
    path = folder / "a.jsonl"
    path.write_text(records(routing(6, 3, 2, 8), np.full((6, 3, 2), 0.5), [0, 1, 2, 3, 0, 1], [0, 1, 3]))
    return [Sample([path], {"num_experts": 8})]
