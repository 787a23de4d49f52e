"""Expert popularity of Fiddler, as `moetrace.importers.fiddler` describes it."""

import json
from pathlib import Path

import numpy as np

from support.writers import Sample, routing


def popularity(counts: np.ndarray, words: int) -> str:
    """The object, of counts [layers, experts]."""
    return json.dumps({"total_input_tokens": words, "expert_popularity": counts.tolist()})


def counted(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Counts int64 [layers, experts] of ids [tokens, layers, top_k]."""
    return np.stack([np.bincount(ids[:, layer].ravel(), minlength=num_experts) for layer in range(ids.shape[1])])


def samples(folder: Path) -> list[Sample]:
    path = folder / "expert_popularity_law.json"
    path.write_text(popularity(counted(routing(20, 3, 2, 8), 8), 13))
    return [Sample([path])]
