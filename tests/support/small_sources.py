"""Small sources of two formats, NumPy archives and route traces, and what becomes of them."""

import json
from pathlib import Path

import numpy as np

from moetrace.importers.importing import import_traces
from moetrace.trace import Trace


def arrays(requests, phases, num_experts=8, layers=3, top_k=2, **changes) -> dict[str, np.ndarray]:
    """The arrays of an npz capture whose rows have these requests and phases."""
    rng = np.random.default_rng(len(requests))
    rows = len(requests)
    return {
        "expert_ids": np.argsort(rng.random((rows, layers, num_experts)), -1)[..., :top_k].astype(np.uint8),
        "request_id": np.array(requests),
        "position": np.arange(rows),
        "phase": np.array(phases),
        "layer_index": np.arange(1, layers + 1),
        "meta": np.array(json.dumps({"model": "x/Some-Model", "num_experts": num_experts, "licence": "MIT", "n": [1]})),
    } | changes


def save(path: Path, **changes) -> Path:
    np.savez_compressed(path, **arrays([5, 5, 5, 2, 2], [0, 0, 1, 0, 1], **changes))
    return path


def imported(tmp_path: Path, *sources: Path, **options) -> Trace:
    import_traces(sources, tmp_path / "out.h5", **options)
    trace = Trace.open(tmp_path / "out.h5")
    trace.verify()
    return trace


def steps(trace: Trace) -> list[tuple[int, int]]:
    """(rows, phase) of each step."""
    return list(zip(np.diff(trace.offset).tolist(), trace.phase.tolist(), strict=True))


HEADER = """\
# route_trace v1
# model=C:/models of mine/Some-MoE-3B-IQ4_XS.gguf arch=some n_layer=4 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=0 dense_bytes=7
# layer=1 expert_bytes=100 dense_bytes=7
# layer=3 expert_bytes=120 dense_bytes=7
"""
COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
# A prefill of two tokens whose last layer routes only the second, then two decode tokens; a second turn of one token.
LINES = """\
0,0,0,1,0,5,0.75,0,100
0,0,0,1,1,2,0.25,0,100
0,0,1,1,0,2,0.5,0,0
0,0,1,1,1,7,0.5,1,0
0,0,1,3,0,4,0.5,0,120
0,0,1,3,1,3,0.5,2,0
0,1,2,1,0,1,0.5,1,0
0,1,2,1,1,0,0.5,1,0
0,1,2,3,0,6,0.5,1,0
0,1,3,1,0,1,0.5,1,0
0,1,3,1,1,0,0.5,1,0
0,1,3,3,0,6,0.5,1,0
0,1,3,3,1,1,0.5,1,0
1,1,0,3,0,6,0.5,1,0
1,1,0,3,1,1,0.5,1,0
"""


def route_trace(tmp_path: Path, text: str = HEADER + COLUMNS + LINES) -> Path:
    path = tmp_path / "route.csv"
    path.write_text(text)
    return path
