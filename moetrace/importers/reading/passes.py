"""Forward passes out of lines that come layer after layer: which lines are one pass, and which row each is of."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from moetrace.importers.captured import MAX_WEIGHT, SPARSEST, Capture, Hints
from moetrace.importers.reading.placeholders import Placeholders, advice
from moetrace.importers.reading.spool import Spool
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import DECODE, MAX_LAYERS, PREFILL, absent_id, check_sizes

# One pass is held in memory: a prompt of 8,192 tokens through 94 layers at 8 lines a cell.
MAX_PASS_LINES = 1 << 23
MAX_PASS_NUMBERS = 1 << 26  # in all columns of these lines: 32,768 tokens through 94 layers at 19 columns

Lines = dict[str, np.ndarray]


def whole_passes(
    path: Path, tables: Iterable[tuple[int, Lines]], begins: Callable[[Lines], np.ndarray]
) -> Iterator[tuple[int, Lines, np.ndarray]]:
    """Cut lines where a pass begins: yield the number of the first line, lines of whole passes, and where they begin.

    `begins` tells of each line but the first whether a pass begins with it (bool [n - 1]).
    """
    held: Lines = {}
    first = 1
    for line, lines in tables:
        if held:
            lines = {name: np.concatenate([held[name], array]) for name, array in lines.items()}
        else:
            first = line
        starts = np.flatnonzero(begins(lines)) + 1
        cut = int(starts[-1]) if starts.size else 0
        if cut:
            yield first, {name: array[:cut] for name, array in lines.items()}, np.r_[0, starts[:-1]]
        held = {name: array[cut:].copy() for name, array in lines.items()}
        first += cut
        numbers = sum(array.size for array in held.values())
        if len(next(iter(held.values()))) > MAX_PASS_LINES or numbers > MAX_PASS_NUMBERS:
            raise MoetraceError(
                f"{path}: no pass through the layers ends in {len(next(iter(held.values())))} lines from {first} on."
            )
    if held and len(next(iter(held.values()))):
        yield first, held, np.zeros(1, np.int64)


def layers_of(path: Path, tables: Iterable[tuple[int, pl.DataFrame]]) -> np.ndarray:
    """The layers uint16 [layers] that a first reading, of nothing but the column "layer", finds."""
    seen = np.zeros(0, np.int64)
    for line, table in tables:
        layers = table["layer"].unique().to_numpy()
        if layers.size and (layers.min() < 0 or layers.max() >= MAX_LAYERS):
            layer = table["layer"].to_numpy()
            at = int(((layer < 0) | (layer >= MAX_LAYERS)).argmax())
            raise MoetraceError(f"{path}: line {line + at}: layer {layer[at]} is impossible.")
        seen = np.union1d(seen, layers)
    if not seen.size:
        raise MoetraceError(f"{path} has no lines of routing.")
    return seen.astype(np.uint16)


def half(hints: Hints) -> Callable[[int], object]:
    """`hints.reading` for each of two readings of the same bytes."""
    return lambda count: hints.reading(count // 2)


class PassBlock(NamedTuple):
    """Some whole passes: what they choose, cell by cell (one row in one layer)."""

    line_of: Callable[[int], int]  # the line of a cell, for errors
    step_rows: np.ndarray  # int64 [steps]
    row: np.ndarray  # [cells], from the first one here
    layer: np.ndarray  # [cells]
    experts: np.ndarray  # [cells, top_k]; -1 is absent
    phase: np.ndarray | None = None  # [steps]; else decode if a pass has one row
    begins: np.ndarray | None = None  # bool [steps]: whether a request begins with it besides
    gates: np.ndarray | None = None  # [cells, top_k]


class Passes:
    """Takes passes, some at a time, to a spool, and numbers their rows; `capture` gives them all.

    Rows of one pass are prefill if it has more than one, else decode, unless the block tells. A prefill after a decode
    begins a request if `prompts` is true; positions count from 0 in each request.
    """

    def __init__(
        self,
        path: Path,
        hints: Hints,
        sizes: tuple[int, int],
        layer_index: np.ndarray,
        optional: tuple[str, ...] = (),
        prompts: bool = True,
    ) -> None:
        self.num_experts, self.top_k = sizes
        check_sizes(str(path), self.num_experts, self.top_k, layer_index.size, 1, 1)
        self._path, self._layer_index, self._optional, self._prompts = path, layer_index, optional, prompts
        self._spool = Spool(hints, self.num_experts, layer_index.size, self.top_k, optional)
        self._placeholders = Placeholders(self.num_experts, hints)
        self._cells = 0
        self._step_rows: list[np.ndarray] = []
        self._phase: list[np.ndarray] = []
        self._begins: list[np.ndarray] = []  # whether a request begins with the step
        self._last = PREFILL

    def add(self, block: PassBlock) -> None:
        """Take whole passes; raise MoetraceError for an expert that is not in the model."""
        experts, _, wrong = self._placeholders.checked(block.experts)
        if wrong is not None:
            expert = int(experts[wrong])
            raise MoetraceError(
                f"{self._path}: line {block.line_of(wrong[0])} holds the expert {expert}, but the model has "
                f"{self.num_experts} experts{advice(expert, self.num_experts)}."
            )
        rows, layers = int(block.step_rows.sum()), self._layer_index.size
        self._cells += block.row.size
        if (self._spool.rows + rows) * layers > SPARSEST * self._cells + 2**16:
            raise MoetraceError(
                f"{self._path}: up to line {block.line_of(block.row.size - 1)} there are {self._cells} choices of "
                f"experts, too few for {self._spool.rows + rows} tokens in {layers} layers."
            )
        entry = np.searchsorted(self._layer_index, block.layer)
        before = self._spool.rows
        self._spool.grow(before + rows)
        values = {"experts": np.where(experts < 0, absent_id(self.num_experts), experts)}
        self._spool.put(before + block.row, entry, **values, **({} if block.gates is None else {"gates": block.gates}))
        self._number(block.step_rows, block.phase, block.begins)

    def _number(self, step_rows: np.ndarray, phase: np.ndarray | None, begins: np.ndarray | None) -> None:
        phase = np.where(step_rows > 1, PREFILL, DECODE) if phase is None else phase
        prompt = (phase == PREFILL) & (np.r_[self._last, phase[:-1]] == DECODE) & self._prompts
        self._step_rows.append(step_rows)
        self._phase.append(phase.astype(np.uint8))
        self._begins.append(prompt if begins is None else prompt | begins)
        self._last = int(phase[-1])

    def capture(self, engine: dict[str, Any], model: str = "") -> Capture:
        """All rows, with `engine` as facts."""
        step_rows, phase = np.concatenate(self._step_rows), np.concatenate(self._phase)
        starts = np.cumsum(step_rows) - step_rows
        request = np.cumsum(np.concatenate(self._begins), dtype=np.int32)
        first = starts[np.searchsorted(request, request)]  # row with which the step's request begins
        at = np.arange(self._spool.rows) - np.repeat(first, step_rows)
        return Capture(
            model=model,
            num_experts=self.num_experts,
            top_k=self.top_k,
            layer_index=self._layer_index,
            expert_bytes=None,
            request=np.repeat(request, step_rows),
            position=at.astype(np.int32),
            phase=np.repeat(phase, step_rows),
            optional=self._optional,
            facts=engine | self._placeholders.told(str(self._path)),
            parts=self._spool.parts,
            sources=(self._path,),
            step_rows=step_rows,
        )


def check_gates(path: Path, line_of: Callable[[int], int], gates: np.ndarray) -> None:
    """Raise unless all `gates` [n, top_k] are within what a trace can hold; NaN is unknown."""
    wrong = np.abs(gates) > MAX_WEIGHT
    if wrong.any():
        raise MoetraceError(f"{path}: line {line_of(int(np.argwhere(wrong)[0][0]))}: weight is beyond {MAX_WEIGHT:g}.")
