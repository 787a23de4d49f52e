"""A routing profile for llama.cpp forks with `--moe-cache-profile FILE.csv --moe-cache-slots N`.

The fork thecodacus/llama.cpp (branch `perf`, `llama_model_base::init_moe_expert_cache`) reads lines
`pos,layer,id0,id1,...` of its `llama-moe-trace`, shorter than 4,096 characters, leaves out those of a negative pos
(prompts), counts how often each id stands in a layer, and keeps the N of the greatest counts on the GPU, in each layer.
Only the order within a layer matters. So a layer of n experts gets n lines here: the n first, the n - 1 first, ... only
the first one. An expert that was never chosen, or is not of the set, does not stand there.
"""

from collections.abc import Callable
from typing import IO

import numpy as np

from moetrace.exports.resident import Counted, KeptChoice, kept, ranks, tallied

_LINE_IDS = 512  # of a line: with five digits and a comma each, below 4,096 characters


def write(trace: Counted, file: IO[bytes], progress: Callable[[int], object], choice: KeptChoice) -> None:
    """Write the order of experts in each layer to `file`."""
    counts = tallied(trace, choice, progress).counts
    if choice.is_set:
        counts = ranks(kept(trace, choice, counts), counts.shape)
    for layer, own in zip(trace.layer_index.tolist(), counts, strict=True):
        order = np.argsort(-own, kind="stable")[: np.count_nonzero(own)].tolist()
        for position in range(len(order)):
            first = order[: len(order) - position]
            for start in range(0, len(first), _LINE_IDS):
                ids = ",".join(map(str, first[start : start + _LINE_IDS]))
                file.write(f"{position},{layer},{ids}\n".encode())
