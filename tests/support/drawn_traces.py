"""Random traces that hold all that a trace can, and files of them, changed."""

from pathlib import Path

import h5py
import numpy as np

from moetrace.trace import Trace
from moetrace.trace.schema import absent_id, expert_dtype


def draw_trace(
    seed: int, num_experts: int, rows: int = 40, layers: int = 3, top_k: int = 2, mixed: bool = False
) -> Trace:
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((rows, layers, num_experts)), axis=-1)[..., :top_k]
    experts[rng.random(experts.shape) < 0.1] = absent_id(num_experts)
    cuts = np.unique(rng.integers(1, rows, rows // 3)) if rows > 1 else np.array([], int)
    steps = np.diff(np.r_[0, cuts, rows])
    phase = rng.integers(0, 3 if mixed else 2, steps.size)
    row_phase = np.repeat(phase, steps)
    row_phase[row_phase == 2] = rng.integers(0, 2, np.count_nonzero(row_phase == 2))
    recorded = np.where(experts == absent_id(num_experts), 255, rng.integers(0, 3, experts.shape))
    return Trace.from_arrays(
        experts.astype(expert_dtype(num_experts)),
        num_experts=num_experts,
        model="some-model",
        source={"engine": "none", "seed": seed},
        request=rng.integers(0, min(rows, 5), rows),
        steps=steps,
        phase=phase,
        layer_index=np.sort(rng.choice(100, layers, replace=False)),
        expert_bytes=rng.integers(1, 1 << 40, (layers, num_experts) if seed % 2 else layers),
        gates=rng.random(experts.shape).astype(np.float16),
        token=rng.integers(0, 50000, rows),
        recorded=recorded,
        **({"row_phase": row_phase} if mixed else {}),
    )


def change(path: Path, name: str, value) -> None:
    """Replace a dataset or an attribute of the file (None: delete it)."""
    with h5py.File(path, "r+") as raw:
        place = raw.attrs if not name.startswith("/") else raw
        del place[name]
        if value is not None:
            place[name] = value
