"""Trace: a file of schema ``moetrace/1`` (or arrays in memory), checked when opened, read in blocks of whole steps."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.trace import schema
from moetrace.trace.hdf5 import WHOLE_BYTES, Column, open_hdf5, read_attributes, read_columns
from moetrace.trace.schema import BLOCK_BYTES, OPTIONAL, ROW_PATHS, Block, CountBlock, Rows
from moetrace.trace.writer import CountsWriter, Writer
from moetrace.version import __version__

IN_MEMORY = "trace in memory"  # what messages call a trace without a file


class Trace:
    """What was routed: `top_k` expert ids for each token row and MoE layer. Rows stand in steps, steps in time order.

    `Trace.open` (a file) and `Trace.from_arrays` make one. It is a context manager. docs/trace-format.md says more.

    Attributes:
        path: The file; None for a trace in memory.
        shown: What messages call it: its path, or "trace in memory".
        model: Name of the model that was traced.
        source: Where the ids are from.
        created_by: Program and version that wrote the file.
        num_experts: Experts of a layer.
        top_k: The most experts that a row chooses in a layer.
        layers: Number of MoE layers.
        rows: Number of token rows.
        steps: Number of steps (forward passes).
        offset: int64 [steps + 1]; the rows of step s are `offset[s]:offset[s + 1]`.
        phase: uint8 [steps]; 0 prefill, 1 decode, 2 mixed.
        layer_index: uint16 [layers]; absolute index of each MoE layer in the model.
        expert_bytes: int64 [layers] or [layers, experts]; None if the trace does not hold it.
        has: The optional data that the trace holds: "gates", "token", "row_phase", "recorded"; or "counts" if it has no
            ids at all.
    """

    def __init__(self, path: Path | None, attributes: Mapping[str, Any], columns: Mapping[str, Column]) -> None:
        """Check the parts of a trace. Use `Trace.open` or `Trace.from_arrays` to make one."""
        self.path = path
        self.shown = str(path or IN_MEMORY)
        self._file = None
        self._columns = columns
        self.model = schema.plain_text(attributes["model"])
        self.source: dict[str, Any] = schema.plain_json(f"{self.shown}: source", attributes["source"])
        self.created_by = schema.plain_text(attributes["created_by"])
        self.num_experts: int = attributes["num_experts"]
        self.top_k: int = attributes["top_k"]
        self.has = frozenset(name for name in (*OPTIONAL, "counts") if name in columns)
        self.offset, self.phase, self.layer_index = (self._whole(name) for name in ("offset", "phase", "layer_index"))
        self.expert_bytes = self._whole("expert_bytes") if "expert_bytes" in columns else None
        self.layers, self.steps = self.layer_index.size, self.phase.size
        self.rows = int(self.offset[-1]) if "counts" in columns else columns["experts"].shape[0]
        schema.check_sizes(self.shown, self.num_experts, self.top_k, self.layers, self.rows, self.steps)
        schema.check_layers(self.shown, self.layer_index, self.expert_bytes, self.num_experts)
        schema.check_steps(self.shown, self.offset, self.phase, self.rows, bool(self.has & {"row_phase", "counts"}))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Trace":
        """Open the trace file at `path`; nothing but its steps is read now.

        Raises MoetraceError, naming file and dataset, if it is not a trace file or its parts do not fit together.
        Expert ids are not looked at: `verify` and the replay check them.
        """
        path = Path(path)
        file = open_hdf5(path)
        try:
            attributes = read_attributes(file, str(path))
            trace = cls(path, attributes, read_columns(file, str(path), attributes["num_experts"], attributes["top_k"]))
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            file.close()
            raise MoetraceError(f"{path} is damaged: {error.args[0] if error.args else error}.") from error
        except BaseException:
            file.close()
            raise
        trace._file = file
        return trace

    @classmethod
    def from_arrays(
        cls,
        experts: np.ndarray,
        *,
        num_experts: int,
        model: str = "",
        source: Mapping[str, Any] | None = None,
        request: np.ndarray | None = None,
        position: np.ndarray | None = None,
        steps: np.ndarray | None = None,
        phase: np.ndarray | None = None,
        layer_index: np.ndarray | None = None,
        expert_bytes: np.ndarray | None = None,
        **optional: np.ndarray,
    ) -> "Trace":
        """Make a trace in memory, with the checks and the interface of one in a file.

        Without `steps` and `phase` every row is a decode step of its own. Without `request` all rows are of request 0.

        Args:
            experts: Expert ids, integers [rows, layers, top_k]. A row that made no choice has the absent id: 255 up to
                255 experts, else 65535.
            num_experts: Experts of a layer.
            model: Name of the model.
            source: Where the ids are from, as JSON values. By default empty.
            request: Request of each row, integers [rows]. By default 0.
            position: Position of each row in its request, integers [rows]. By default it counts up within a request.
            steps: How many rows each step has, integers [steps]. By default 1 each.
            phase: Phase of each step, integers [steps]: 0 prefill, 1 decode, 2 mixed. By default 1.
            layer_index: Absolute index of each MoE layer in the model, integers [layers]. By default 0, 1, ...
            expert_bytes: Bytes of the experts, integers [layers] or [layers, experts]. By default not known.
            **optional: `gates` float16 and `recorded` uint8, both [rows, layers, top_k]; `token` int32 and `row_phase`
                uint8, both [rows]. Other dtypes are converted where every value fits.

        Returns:
            The trace. It has no file and need not be closed.

        Raises:
            MoetraceError: A shape or a value does not fit, or there is no such array.

        Examples:
            >>> import moetrace as mt
            >>> import numpy as np
            >>> ids = np.array([[[3, 1]], [[1, 2]], [[0, 1]]])  # 3 rows, 1 layer, top 2
            >>> trace = mt.Trace.from_arrays(ids, num_experts=4, steps=np.array([2, 1]), phase=np.array([0, 1]))
            >>> trace.rows, trace.steps, trace.layers, trace.top_k
            (3, 2, 1, 2)
        """
        if np.ndim(experts) != 3:
            raise MoetraceError(f"experts has shape {np.shape(experts)}, but must be [rows, layers, top_k].")
        rows, layers, top_k = np.shape(experts)
        schema.check_sizes(IN_MEMORY, num_experts, top_k, layers, rows, 1)
        request = np.zeros(rows, np.int32) if request is None else request
        steps = np.ones(rows, np.int64) if steps is None else schema.as_dtype("steps", steps, np.dtype("<i8"))
        given = {
            "experts": experts,
            "request": request,
            "position": _count_up(np.ravel(request)) if position is None else position,
            **optional,
        }
        columns = {}
        for name, array in given.items():
            if name not in ROW_PATHS:
                raise MoetraceError(f"a trace has no array {name!r}, only {', '.join(ROW_PATHS)}.")
            dtype, shape = schema.row_dtype(name, num_experts), schema.row_shape(name, rows, layers, top_k)
            columns[name] = _in_memory(ROW_PATHS[name], schema.as_dtype(name, array, dtype), shape)
        phase = np.full(steps.size, schema.DECODE, np.uint8) if phase is None else phase
        others = {
            "offset": np.concatenate(([0], np.cumsum(steps))),
            "phase": schema.as_dtype("phase", phase, np.dtype("u1")),
            "layer_index": np.arange(layers) if layer_index is None else layer_index,
        }
        if expert_bytes is not None:
            others["expert_bytes"] = expert_bytes
        for name, array in others.items():
            path, dtype = schema.OTHER_PATHS[name]
            shape = {"phase": steps.shape, "layer_index": (layers,)}.get(name, np.shape(array))
            columns[name] = _in_memory(path, schema.as_dtype(name, array, dtype), shape)
        attributes = {"model": model, "num_experts": int(num_experts), "top_k": top_k, "source": dict(source or {})}
        return cls(None, attributes | {"created_by": f"moetrace {__version__}"}, columns)

    def close(self) -> None:
        """Close the file; arrays that were read stay valid."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def storage(self) -> str:
        """How the ids are stored: "memory", "mapped" (contiguous in a file) or "compressed"."""
        storage = self._columns["counts" if "counts" in self.has else "experts"].storage
        return "compressed" if storage == "stored" else storage

    def blocks(self, rows: int | None = None, ahead: int = 0) -> Iterator[Block]:
        """Cut the trace into blocks of whole steps, in time order. Memory does not grow with the trace.

        A block has at most `rows` rows (by default, about 4 MiB of ids) but at least one step. It also carries up to
        `ahead` further steps. Ids are not checked here. Raises MoetraceError at once if the trace has counts but no
        ids, and on the way if the file is damaged or a request, position or phase is impossible.
        """
        self.check_has_rows()
        row_bytes = self.layers * self.top_k * self._columns["experts"].dtype.itemsize
        return self._blocks(max(1, BLOCK_BYTES // row_bytes) if rows is None else rows, ahead)

    def _blocks(self, rows: int, ahead: int) -> Iterator[Block]:
        for first, stop in self._step_ranges(rows):
            end = min(stop + ahead, self.steps)
            part = self._rows(first, end)
            experts = self._columns["experts"].read(int(self.offset[first]), int(self.offset[end]))
            yield Block(first, stop - first, part.offset, experts, part.request, part.position, part.phase)

    def row_blocks(self) -> Iterator[Rows]:
        """Every row's request, position and phase, in blocks of whole steps: a first pass that reads no ids.

        Raises MoetraceError as `blocks` does.
        """
        self.check_has_rows()
        return (self._rows(first, stop) for first, stop in self._step_ranges(BLOCK_BYTES // 16))

    def count_blocks(self) -> Iterator[CountBlock]:
        """The counts of a trace that holds them instead of ids, about 4 MiB at a time, in order.

        Raises MoetraceError at once if there are none, and on the way if the file turns out damaged; counts are not
        checked here.
        """
        if "counts" not in self.has:
            raise MoetraceError(f"{self.shown} has no counts.")
        steps = max(1, BLOCK_BYTES // (8 * self.layers * self.num_experts))
        return (self._counts(first, min(first + steps, self.steps)) for first in range(0, self.steps, steps))

    def _counts(self, first: int, stop: int) -> CountBlock:
        rows = np.diff(self.offset[first : stop + 1])
        return CountBlock(first, self._columns["counts"].read(first, stop), rows, self.phase[first:stop])

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read a range of one dataset.

        Args:
            name: "experts", "request", "position", or a name that `has` lists.
            start: First row (for "counts", first step); as in a slice, a negative number counts from the end.
            stop: The row (for "counts", the step) after the last.

        Returns:
            An array of n = stop - start entries. It is [n, layers, top_k] for "experts", "gates" and "recorded", [n,
            layers, experts] for "counts", [n] for the others.

        Raises:
            MoetraceError: The trace has no such dataset, or the file is damaged.

        Examples:
            >>> import moetrace as mt
            >>> with mt.Trace.open("traces/tiny-olmoe.h5") as trace:
            ...     print(trace.read("experts", 0, 2).shape, trace.read("position", 0, 4))
            (2, 6, 4) [0 1 2 3]
        """
        if name not in self._columns:
            raise MoetraceError(f"{self.shown} has no {name}.")
        column = self._columns[name]
        start, stop, _ = slice(start, stop).indices(column.shape[0])
        return column.read(start, max(start, stop))

    def verify(self) -> None:
        """Read everything: raise MoetraceError on a dataset that differs from its sha256, or an impossible value."""
        lacking = [column.path for column in self._columns.values() if column.sha256 is None]
        if self.path is not None and lacking:
            raise MoetraceError(f"{self.shown}: {lacking[0]} has no sha256 to compare with.")
        self.verify_hashes()
        if "counts" in self.has:
            return
        for block in self.blocks():
            first = int(self.offset[block.first_step])
            schema.check_ids(self.shown, first, block.experts, self.num_experts)
            if "recorded" in self.has:
                schema.check_recorded(
                    self.shown, first, self.read("recorded", first, first + len(block.request)), block.experts
                )

    def verify_hashes(self) -> None:
        """Raise MoetraceError on a dataset that differs from its sha256; one without is taken as it is.

        A copy's fresh hashes would hide the damage, so a function that copies a trace calls this first.
        """
        for column in self._columns.values():
            if column.sha256 is not None and _sha256(column) != column.sha256:
                raise MoetraceError(f"{self.shown}: {column.path} differs from its sha256, so the file was damaged.")

    @property
    def content_sha256(self) -> str | None:
        """SHA-256 of what was routed: shape, model name and every dataset's sha256; None if one of these is not stored.

        The same however the file is compressed, and whatever `source` says; `hash_content` also tells it of a trace
        in memory. Stored hashes are believed: `verify_hashes` compares them.
        """
        hashes = {name: column.sha256 for name, column in self._columns.items() if column.sha256 is not None}
        return self._content_sha256(hashes) if len(hashes) == len(self._columns) else None

    def hash_content(self) -> str:
        """Return `content_sha256` as it would be stored: read everything, block by block, and believe nothing."""
        return self._content_sha256({name: _sha256(column) for name, column in self._columns.items()})

    def _content_sha256(self, hashes: Mapping[str, str]) -> str:
        shape = [schema.SCHEMA, self.model, self.num_experts, self.top_k]
        datasets = sorted((self._columns[name].path, *self._columns[name].shape, hashes[name]) for name in hashes)
        return hashlib.sha256(json.dumps([shape, datasets]).encode()).hexdigest()

    def head(self, steps: int) -> "Trace":
        """The first `steps` steps as a trace of its own, read from the same place; all of them if there are no more.

        Its `content_sha256` is None. It can be read for as long as this one.
        """
        steps = min(max(steps, 1), self.steps)
        entries = dict.fromkeys(ROW_PATHS, int(self.offset[steps])) | {"phase": steps, "counts": steps}
        entries["offset"] = steps + 1
        columns = {
            name: column._replace(shape=(entries.get(name, column.shape[0]), *column.shape[1:]), sha256=None)
            for name, column in self._columns.items()
        }
        attributes = {name: getattr(self, name) for name in ("model", "source", "created_by", "num_experts", "top_k")}
        return Trace(self.path, attributes, columns)

    def write(self, path: str | os.PathLike[str], compress: str | None = None) -> None:
        """Write the trace to a file of its own, contiguous or compressed with "zstd" or "gzip".

        Raises MoetraceError if the trace's own file is damaged, or holds an impossible value.
        """
        self.verify_hashes()
        facts: dict[str, Any] = self._facts() | {"compress": compress}
        if "counts" in self.has:
            with CountsWriter(path, **facts) as writer:
                for block in self.count_blocks():
                    writer.append_counts(block.counts, block.rows, block.phase)
            return
        optional = [name for name in OPTIONAL if name in self.has]
        with Writer(path, expert_bytes=self.expert_bytes, optional=optional, **facts) as writer:
            for block in self.blocks():
                first = int(self.offset[block.first_step])
                steps = slice(block.first_step, block.first_step + block.steps)
                schema.check_ids(self.shown, first, block.experts, self.num_experts)
                more = {name: self.read(name, first, first + len(block.request)) for name in optional}
                writer.append(
                    block.experts, block.request, block.position, np.diff(block.offset), self.phase[steps], **more
                )

    def _facts(self) -> dict[str, Any]:
        """What a Writer is told of any trace."""
        return {
            name: getattr(self, name)
            for name in ("model", "num_experts", "top_k", "layers", "rows", "steps", "source", "layer_index")
        }

    def check_has_rows(self) -> None:
        """Raise a MoetraceError if the trace holds only counts."""
        if "counts" in self.has:
            raise MoetraceError(f"{self.shown} holds only counts of ids (/counts), but this needs the ids themselves.")

    def _step_ranges(self, rows: int) -> Iterator[tuple[int, int]]:
        first = 0
        while first < self.steps:
            stop = int(np.searchsorted(self.offset, self.offset[first] + rows, side="right")) - 1
            stop = max(stop, first + 1)
            yield first, stop
            first = stop

    def _rows(self, first: int, stop: int) -> Rows:
        offset = self.offset[first : stop + 1] - self.offset[first]
        start, end = int(self.offset[first]), int(self.offset[stop])
        phase = np.repeat(self.phase[first:stop], np.diff(offset))
        if "row_phase" in self.has:
            stated, phase = phase, self._columns["row_phase"].read(start, end)
            schema.check_row_phase(self.shown, start, phase, stated)
        request, position = (self._columns[name].read(start, end) for name in ("request", "position"))
        part = Rows(first, stop - first, offset, request, position, phase)
        schema.check_rows(self.shown, start, part)
        return part

    def _whole(self, name: str) -> np.ndarray:
        column = self._columns[name]
        if column.storage == "stored" and math.prod(column.shape) * column.dtype.itemsize > WHOLE_BYTES:
            raise MoetraceError(f"{self.shown}: {column.path} is too large to be compressed.")
        return column.read(0, column.shape[0])


def _in_memory(path: str, array: np.ndarray, shape: tuple[int, ...]) -> Column:
    if array.shape != shape:
        raise MoetraceError(f"{path} has shape {array.shape}, but {shape} is needed.")
    return Column(path, array.dtype, array.shape, "memory", None, lambda start, stop: array[start:stop])


def _count_up(request: np.ndarray) -> np.ndarray:
    """Each row's number among the rows of its request."""
    order = np.argsort(request, kind="stable")
    first = np.r_[True, request[order][1:] != request[order][:-1]]
    index = np.arange(request.size)
    position = np.empty(request.size, np.int32)
    position[order] = index - np.maximum.accumulate(np.where(first, index, 0))
    return position


def _sha256(column: Column) -> str:
    digest = hashlib.sha256()
    rows = max(1, BLOCK_BYTES // max(1, math.prod(column.shape[1:]) * column.dtype.itemsize))
    for start in range(0, column.shape[0], rows):
        digest.update(column.read(start, min(start + rows, column.shape[0])).data)
    return digest.hexdigest()
