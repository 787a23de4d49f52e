"""The input of the checks: a trace in pieces of a few MiB of ids, each with the values that several checks need."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moetrace.analyze.sizes import own_experts
from moetrace.trace.format import Trace
from moetrace.trace.schema import BLOCK_BYTES, OPTIONAL, absent_id

Progress = Callable[[int], object]


class Shape(NamedTuple):
    """Sizes of a trace; `absent` is the id that says that no choice was made."""

    num_experts: int
    top_k: int
    rows: int
    layer_index: np.ndarray  # uint16 [layers], absolute
    absent: int
    experts: np.ndarray  # int64 [layers]: experts of each layer, num_experts at most

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.layer_index.size


class Piece(NamedTuple):
    """Successive rows of a trace.

    Unlike a Block it may end within a step, so that its size is bounded, and no value was checked. `slots` are the ids
    once more, slot by slot: NumPy is ten times faster along long axes than along top_k.
    """

    first_row: int
    experts: np.ndarray  # uint8 | uint16 [rows, layers, top_k]
    slots: np.ndarray  # the same [top_k, rows, layers]
    missing: np.ndarray | None  # uint16 [rows, layers]: absent ids of each cell; None if no id is absent
    request: np.ndarray  # int32 [rows]
    position: np.ndarray  # int32 [rows]
    phase: np.ndarray  # uint8 [rows]: the row's own where there is one, else its step's
    step: np.ndarray  # int64 [rows]: number of the step
    step_phase: np.ndarray  # uint8 [rows]: of the step
    gates: np.ndarray | None  # float16 [rows, layers, top_k]
    recorded: np.ndarray | None  # uint8 [rows, layers, top_k]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.experts)

    def empty(self) -> np.ndarray:
        """bool [rows]: rows that made no choice in any layer."""
        if self.missing is None:
            return np.zeros(self.rows, bool)
        return (self.missing == len(self.slots)).all(1)

    def only(self, kept: np.ndarray) -> "Piece":
        """The rows that are true in `kept` [rows], as if they had followed each other."""
        if kept.all():
            return self
        by_row = {name: array for name, array in self._asdict().items() if name not in ("first_row", "slots")}
        arrays = {name: array if array is None else array[kept] for name, array in by_row.items()}
        return self._replace(slots=self.slots[:, kept], **arrays)


def shape_of(trace: Trace) -> Shape:
    """The sizes of `trace`."""
    absent = absent_id(trace.num_experts)
    return Shape(trace.num_experts, trace.top_k, trace.rows, trace.layer_index, absent, own_experts(trace))


def pieces(trace: Trace, digests: dict[str, Any] | None = None, progress: Progress | None = None) -> Iterator[Piece]:
    """Cut `trace` into pieces, reading everything once and in order.

    `digests`, if given, gets a hash object for every dataset of rows, by name, which the data has gone through; without
    it, optional datasets are not read. `progress` gets the rows of each piece after its check.
    """
    names = ["experts", "request", "position"]
    if digests is not None:
        names += [name for name in OPTIONAL if name in trace.has]
    if digests is not None:
        digests |= {name: hashlib.sha256() for name in names}
    row_bytes = trace.layers * trace.top_k * (1 if trace.num_experts <= 255 else 2)
    rows = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, trace.rows, rows):
        stop = min(start + rows, trace.rows)
        data = {name: trace.read(name, start, stop) for name in names}
        if digests is not None:
            for name, array in data.items():
                digests[name].update(array.data)
        yield _piece(trace, start, stop, data)
        if progress:
            progress(stop - start)


def _piece(trace: Trace, start: int, stop: int, data: dict[str, np.ndarray]) -> Piece:
    experts, k = data["experts"], trace.top_k
    slots = np.empty((k, *experts.shape[:2]), experts.dtype)
    for slot in range(k):
        slots[slot] = experts[:, :, slot]
    absent = absent_id(trace.num_experts)
    missing = None
    if experts.max() == absent:
        missing = np.add.reduce(slots == absent, axis=0, dtype=np.uint16)
    first = int(np.searchsorted(trace.offset, start, side="right")) - 1
    last = int(np.searchsorted(trace.offset, stop, side="left"))
    lengths = np.diff(np.clip(trace.offset[first : last + 1], start, stop))
    step = np.repeat(np.arange(first, last), lengths)
    step_phase = trace.phase[step]
    return Piece(
        first_row=start,
        experts=experts,
        slots=slots,
        missing=missing,
        request=data["request"],
        position=data["position"],
        phase=data.get("row_phase", step_phase),
        step=step,
        step_phase=step_phase,
        gates=data.get("gates"),
        recorded=data.get("recorded"),
    )
