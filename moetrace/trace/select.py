"""Select: a copy of a trace without some of its rows and layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.trace.format import Trace
from moetrace.trace.schema import OPTIONAL, PER_CHOICE, check_ids
from moetrace.trace.writer import CountsWriter, Writer


def copy_without(
    trace: Trace,
    path: Path,
    *,
    rows: Sequence[tuple[int, int]],
    layers: np.ndarray,
    model: str,
    source: Mapping[str, Any],
    compress: str | None = None,
) -> None:
    """Copy a trace to a file without some rows and layers, block by block in constant memory.

    A step loses its rows, and goes if it loses all; requests and positions stay as they are.

    Args:
        trace: what is copied, of ids or of counts.
        path: the new file.
        rows: ranges [start, stop) of rows to leave out, in order and apart; none if the trace holds counts.
        layers: bool [layers], true for a layer to leave out; not all.
        model: the name of the model in the copy.
        source: where the copy is from.
        compress: as the Writer takes it.

    Raises:
        MoetraceError: an id in what is copied is impossible, or the file cannot be written.
    """
    facts: dict[str, Any] = {
        "model": model,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "layers": int(np.count_nonzero(~layers)),
        "layer_index": trace.layer_index[~layers],
        "source": source,
        "compress": compress,
    }
    if "counts" in trace.has:
        with CountsWriter(path, rows=trace.rows, steps=trace.steps, **facts) as counts:
            for block in trace.count_blocks():
                counts.append_counts(block.counts[:, ~layers], block.rows, block.phase)
        return
    step_rows = np.diff(_kept_before(trace.offset, rows))
    facts |= {
        "rows": int(step_rows.sum()),
        "steps": int(np.count_nonzero(step_rows)),
        "expert_bytes": None if trace.expert_bytes is None else trace.expert_bytes[~layers],
        "optional": [name for name in OPTIONAL if name in trace.has],
    }
    with Writer(path, **facts) as writer:
        _copy_rows(trace, writer, rows, ~layers, step_rows)


def _copy_rows(
    trace: Trace, writer: Writer, ranges: Sequence[tuple[int, int]], layers: np.ndarray, step_rows: np.ndarray
) -> None:
    """Append the rows outside `ranges` and the layers bool [layers]; step_rows int64 [steps] is what steps keep."""
    for block in trace.blocks():
        first, steps = int(trace.offset[block.first_step]), slice(block.first_step, block.first_step + block.steps)
        kept = np.ones(len(block.request), bool)
        for start, stop in ranges:
            kept[max(start - first, 0) : max(stop - first, 0)] = False
        lengths = step_rows[steps]
        if not kept.any():
            continue
        data = {name: trace.read(name, first, first + kept.size)[kept] for name in OPTIONAL if name in trace.has}
        data["experts"] = block.experts[kept]
        data |= {name: data[name][:, layers] for name in PER_CHOICE if name in data}
        check_ids(trace.shown, first, data["experts"], trace.num_experts)
        writer.append(
            data.pop("experts"),
            block.request[kept],
            block.position[kept],
            lengths[lengths > 0],
            trace.phase[steps][lengths > 0],
            **data,
        )


def _kept_before(rows: np.ndarray, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    """How many rows before each of `rows` [n] are outside of all `ranges`, which are in order and apart."""
    if not ranges:
        return rows
    starts, stops = np.array(ranges, np.int64).T
    gone = np.r_[0, np.cumsum(stops - starts)]
    number = np.searchsorted(starts, rows, side="left")  # ranges that begin before the row
    inside = np.where(number > 0, np.maximum(stops[number - 1] - rows, 0), 0)
    return rows - gone[number] + inside
