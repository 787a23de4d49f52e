"""Tables of counts, as `moetrace.importers.counts_table` describes them."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np

from support.writers import Sample


def eplb_json(path: Path, counts: np.ndarray) -> Path:
    path.write_text(json.dumps({"logical_count": counts.tolist()}))
    return path


def load_view(path: Path, counts: np.ndarray) -> Path:
    import torch

    torch.save(torch.from_numpy(counts), path)
    return path


def samples(folder: Path) -> list[Sample]:
    """JSON, and where torch is installed what it saves."""
    counts = np.random.default_rng(0).integers(0, 50, (3, 4, 8))
    files = [eplb_json(folder / "one.json", counts[0]), eplb_json(folder / "steps.json", counts)]
    with suppress(ImportError):
        files.append(load_view(folder / "expert_load_view.pt", counts[0]))
        files.append(load_view(folder / "floats.pt", counts[1].astype(np.float32)))
    return [Sample([file], {"top_k": 2}) for file in files]
