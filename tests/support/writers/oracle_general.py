"""libCacheSim's oracleGeneral of small traces, as `moetrace export` writes it."""

from pathlib import Path

import numpy as np

import moetrace as mt
from support.writers import Sample, routing

EXPERTS, TOP_K = 8, 2


def trace(sizes: np.ndarray | None = None) -> mt.Trace:
    """Steps of 5, 1, 3 and 1 rows."""
    ids = routing(10, 3, TOP_K, EXPERTS)
    return mt.Trace.from_arrays(
        ids, num_experts=EXPERTS, steps=np.array([5, 1, 3, 1]), phase=np.array([0, 1, 1, 1]), expert_bytes=sizes
    )


def samples(folder: Path) -> list[Sample]:
    hints = {"num_experts": EXPERTS, "top_k": TOP_K}
    for name, sizes in (("plain", None), ("layers", np.array([5, 6, 7])), ("experts", np.arange(24).reshape(3, 8) + 1)):
        mt.export(trace(sizes), folder / f"{name}.oracleGeneral")
    return [Sample([path], hints) for path in sorted(folder.glob("*.oracleGeneral"))]
