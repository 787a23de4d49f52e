"""Parquet: a row for each choice that was made, in the order of the trace: row, layer, slot.

Columns: step, row, request, position, phase (prefill or decode), layer (its absolute index in the model), slot, expert,
and if the trace has them gate, token and resident (0 miss, 1 hit, 2 prefetched). Absent choices are left out.
The footer holds the rest of the trace (`moetrace.importers.reading.own_parquet`), so that an import gives it again.
"""

from collections.abc import Callable, Iterator
from typing import IO, Any

import msgspec
import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from moetrace.exports.blocks import kept_facts, parts
from moetrace.importers.reading.own_parquet import KEY, MOST_SIZES, ToldByFooter
from moetrace.spec.errors import MoetraceError
from moetrace.trace.format import Trace
from moetrace.trace.schema import PHASE_NAMES, Part, absent_id

GROUP_ROWS = 1 << 18
_PHASES = pl.Enum(PHASE_NAMES[:2])
_COLUMNS = {
    "step": pl.Int64(),
    "row": pl.Int64(),
    "request": pl.Int32(),
    "position": pl.Int32(),
    "phase": _PHASES,
    "layer": pl.UInt16(),
    "slot": pl.UInt16(),
    "expert": pl.UInt16(),
}
# In the trace -> column. Float16 is not what every reader of Parquet knows.
_OPTIONAL = {"gates": ("gate", pl.Float32()), "token": ("token", pl.Int32()), "recorded": ("resident", pl.UInt8())}


def write(trace: Trace, file: IO[bytes], progress: Callable[[int], object]) -> None:
    """Write `trace` to `file`, a row group of 262,144 choices at a time."""
    failed: list[BaseException] = []

    def frames(*_: Any) -> Iterator[pl.DataFrame]:
        try:
            for part in parts(trace):
                yield _frame(trace, part)
                progress(len(part.experts))
        except BaseException as error:
            failed.append(error)  # Polars would make it an error of its own
            raise

    schema = _COLUMNS | dict(column for name, column in _OPTIONAL.items() if name in trace.has)
    try:
        register_io_source(frames, schema=schema).sink_parquet(
            file,
            compression="zstd",
            compression_level=3,
            statistics=True,
            row_group_size=GROUP_ROWS,
            maintain_order=True,
            metadata={KEY: _footer(trace)},
        )
    except pl.exceptions.PolarsError as error:
        raise (failed[0] if failed else MoetraceError(f"Parquet could not be written: {error}.")) from None


def _footer(trace: Trace) -> str:
    sizes = trace.expert_bytes
    told = ToldByFooter(
        trace.num_experts,
        trace.top_k,
        trace.layer_index.tolist(),
        trace.model,
        {key: str(value) for key, value in kept_facts(trace).items()},
        None if trace.layer_experts is None else trace.layer_experts.tolist(),
        None if sizes is None or sizes.size > MOST_SIZES else sizes.ravel().tolist(),
    )
    return msgspec.json.encode(told).decode()


def _frame(trace: Trace, part: Part) -> pl.DataFrame:
    made = part.experts != absent_id(trace.num_experts)
    row, layer, slot = np.nonzero(made)
    columns: dict[str, Any] = {
        "step": part.step[row],
        "row": part.first + row,
        "request": part.request[row],
        "position": part.position[row],
        "phase": pl.Series(PHASE_NAMES[:2], dtype=_PHASES).gather(part.phase[row]),
        "layer": trace.layer_index[layer],
        "slot": slot.astype(np.uint16),
        "expert": part.experts[made].astype(np.uint16),
    }
    for name, (column, dtype) in _OPTIONAL.items():
        if name in trace.has:
            values = trace.read(name, part.first, part.first + len(part.experts))
            values = values[row] if name == "token" else values[made]
            columns[column] = values.astype(np.float32) if dtype == pl.Float32 else values
    return pl.DataFrame(columns)
