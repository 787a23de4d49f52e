"""NumPy archives, as `moetrace.importers.npz` describes them."""

import json
from pathlib import Path

import numpy as np

from support.writers import Sample, routing


def samples(folder: Path) -> list[Sample]:
    arrays = {
        "expert_ids": routing(5, 3, 2, 8).astype(np.uint8),
        "request_id": np.array([5, 5, 5, 2, 2]),
        "position": np.array([0, 1, 2, 0, 1]),
        "phase": np.array([0, 0, 1, 0, 1], np.uint8),
        "layer_index": np.array([1, 2, 3]),
        "meta": np.array(json.dumps({"model": "x/Some-Model", "num_experts": 8, "licence": "MIT"})),
    }
    np.savez(folder / "a.npz", **arrays)
    gates = np.full((5, 3, 2), 0.5, np.float32)
    np.savez_compressed(folder / "b.npz", **arrays, gate_weights=gates, token_id=np.arange(5))
    return [Sample([folder / "a.npz"]), Sample([folder / "b.npz"])]
