"""What a trace holds, in figures."""

from collections import Counter
from typing import Any

import numpy as np

from moetrace.trace.format import Trace
from moetrace.trace.schema import DECODE, PHASE_NAMES, PREFILL, SCHEMA, absent_id


def describe(trace: Trace) -> dict[str, Any]:
    """Figures of a trace by name, ready for JSON; reads every id once, block by block.

    `prompt_rows` and `output_rows` are min, median and max over the requests that have such rows, `decode_batch` median
    and max rows over decode steps, `absent_share` the share of choices (row, layer, slot) that were not made. What a
    trace can't tell (counts only, or no such rows) is None.
    """
    steps = np.bincount(trace.phase, minlength=3)
    expert_bytes = trace.expert_bytes
    facts: dict[str, Any] = {
        "model": trace.model,
        "layers": trace.layers,
        "layer_first": int(trace.layer_index[0]),
        "layer_last": int(trace.layer_index[-1]),
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "steps": trace.steps,
        **{f"{name}_steps": int(count) for name, count in zip(PHASE_NAMES, steps, strict=True)},
        "rows": trace.rows,
        **(_row_figures(trace) if "counts" not in trace.has else {}),
        "expert_bytes_min": None if expert_bytes is None else int(expert_bytes.min()),
        "expert_bytes_max": None if expert_bytes is None else int(expert_bytes.max()),
        "also_holds": sorted(trace.has),
        "storage": trace.storage,
        "file_bytes": trace.path.stat().st_size if trace.path else None,
        "schema": SCHEMA,
        "content_sha256": trace.content_sha256,
        "created_by": trace.created_by,
        "source": trace.source,
    }
    return facts


def _row_figures(trace: Trace) -> dict[str, Any]:
    absent, absent_choices = absent_id(trace.num_experts), 0
    rows: tuple[Counter[int], Counter[int]] = (Counter(), Counter())  # of each request, by phase
    batches: Counter[int] = Counter()
    for block in trace.blocks():
        absent_choices += int(np.count_nonzero(block.experts == absent))
        for phase in (PREFILL, DECODE):
            _count(rows[phase], block.request[block.phase == phase])
        decode = trace.phase[block.first_step : block.first_step + block.steps] == DECODE
        _count(batches, np.diff(block.offset)[decode])
    return {
        "prefill_rows": rows[PREFILL].total(),
        "decode_rows": rows[DECODE].total(),
        "requests": len(rows[PREFILL].keys() | rows[DECODE].keys()),
        "prompt_rows": _spread(rows[PREFILL]),
        "output_rows": _spread(rows[DECODE]),
        "decode_batch": _batch(batches),
        "absent_share": absent_choices / (trace.rows * trace.layers * trace.top_k),
    }


def _count(counter: Counter[int], values: np.ndarray) -> None:
    found, counts = np.unique(values, return_counts=True)
    counter.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def _spread(rows: Counter[int]) -> dict[str, float] | None:
    if not rows:
        return None
    counts = np.array(list(rows.values()))
    return {"min": int(counts.min()), "median": float(np.median(counts)), "max": int(counts.max())}


def _batch(batches: Counter[int]) -> dict[str, int] | None:
    if not batches:
        return None
    sizes = np.array(sorted(batches))
    reached = np.cumsum([batches[size] for size in sizes.tolist()])
    median = sizes[np.searchsorted(reached, (reached[-1] + 1) // 2)]  # the lower one of an even number
    return {"median": int(median), "max": int(sizes[-1])}
