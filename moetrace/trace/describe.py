"""Figures that describe a trace."""

from collections import Counter
from typing import Any

import numpy as np

from moetrace.trace.format import Trace
from moetrace.trace.schema import DECODE, PHASE_NAMES, PREFILL, SCHEMA, absent_id, check_requests

_SLICE = 1 << 20  # steps, or requests, at a time


def describe(trace: Trace) -> dict[str, Any]:
    """Figures of a trace by name, ready for JSON; reads every id once, in parts that do not grow with its steps.

    `prompt_rows` and `output_rows` are min, median and max over the requests that have such rows, `decode_batch` median
    and max rows over decode steps, `absent_share` the share of choices (row, layer, slot) that were not made. Figures
    that a trace does not give (counts only, or no such rows) are None.
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
        "experts_min": trace.num_experts if trace.layer_experts is None else int(trace.layer_experts.min()),
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
    rows = _RequestRows(trace.shown), _RequestRows(trace.shown)  # by phase
    for part in trace.parts():
        absent_choices += int(np.count_nonzero(part.experts == absent))
        for phase in (PREFILL, DECODE):
            rows[phase].add(part.request[part.phase == phase])
    (prefill, prompt_rows), (decode, output_rows) = (of_phase.merged() for of_phase in rows)
    return {
        "prefill_rows": int(prompt_rows.sum()),
        "decode_rows": int(output_rows.sum()),
        "requests": np.union1d(prefill, decode).size,
        "prompt_rows": _spread(prompt_rows),
        "output_rows": _spread(output_rows),
        "decode_batch": _batch(_decode_batches(trace)),
        "absent_share": absent_choices / (trace.rows * trace.layers * trace.top_k),
    }


class _RequestRows:
    """How many rows each request has, in arrays: 12 bytes a request, and at most twice that before they are merged."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.held: list[tuple[np.ndarray, np.ndarray]] = []  # request int32, rows int64
        self.size = self.known = 0

    def add(self, request: np.ndarray) -> None:
        """Count rows by their requests."""
        self.held.append(np.unique(request, return_counts=True))
        self.size += self.held[-1][0].size
        if self.size > 2 * max(self.known, _SLICE):
            self.merged()

    def merged(self) -> tuple[np.ndarray, np.ndarray]:
        """The requests int32 [n], in order, and the rows int64 [n] of each."""
        if self.held:
            request, of_part = np.unique(np.concatenate([one for one, _ in self.held]), return_inverse=True)
            rows = np.zeros(request.size, np.int64)
            np.add.at(rows, of_part, np.concatenate([counts for _, counts in self.held]))
            self.held = [(request, rows)]
            self.size = self.known = request.size
            check_requests(self.where, self.known)
        return self.held[0] if self.held else (np.zeros(0, np.int32), np.zeros(0, np.int64))


def _decode_batches(trace: Trace) -> Counter[int]:
    """How many decode steps have how many rows."""
    batches: Counter[int] = Counter()
    for first in range(0, trace.steps, _SLICE):
        stop = min(first + _SLICE, trace.steps)
        rows = np.diff(trace.offset[first : stop + 1])[trace.phase[first:stop] == DECODE]
        found, counts = np.unique(rows, return_counts=True)
        batches.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
    return batches


def _spread(counts: np.ndarray) -> dict[str, float] | None:
    if not counts.size:
        return None
    return {"min": int(counts.min()), "median": float(np.median(counts)), "max": int(counts.max())}


def _batch(batches: Counter[int]) -> dict[str, int] | None:
    if not batches:
        return None
    sizes = np.array(sorted(batches))
    reached = np.cumsum([batches[size] for size in sizes.tolist()])
    median = sizes[np.searchsorted(reached, (reached[-1] + 1) // 2)]  # the lower one of an even number
    return {"median": int(median), "max": int(sizes[-1])}
