"""Trace: a file of schema ``moetrace/1`` (or arrays in memory), checked when opened, read in blocks of whole steps."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.trace import arrays, schema
from moetrace.trace.arrays import IN_MEMORY
from moetrace.trace.digests import PassingHashes, content_sha256_of, refuse_changed, sha256_of
from moetrace.trace.hdf5 import WHOLE_BYTES, Column, Source, read_attributes, read_columns
from moetrace.trace.notebook import trace_html, trace_text
from moetrace.trace.schema import BLOCK_BYTES, OPTIONAL, ROW_PATHS, Block, CountBlock, Part, Rows
from moetrace.trace.writer import CountsWriter, Writer
from moetrace.version import __version__


class Trace:
    """The routing: `top_k` expert ids for each token row and MoE layer. Rows stand in steps, steps in time order.

    `Trace.open` (a file) and `Trace.from_arrays` make one. It is a context manager. docs/trace-format.md says more.

    Attributes:
        path (Path | None): The file; None for a trace in memory.
        shown (str): Its name in messages: its path, or "trace in memory".
        model (str): Name of the model that was traced.
        source: Where the ids are from.
        created_by (str): Program and version that wrote the file.
        num_experts: Experts of a layer.
        top_k: The most experts that a row chooses in a layer.
        layers: Number of MoE layers.
        rows (int): Number of token rows.
        steps (int): Number of steps (forward passes).
        offset (np.ndarray): int64 [steps + 1]; the rows of step s are `offset[s]:offset[s + 1]`.
        phase (np.ndarray): uint8 [steps]; 0 prefill, 1 decode, 2 mixed.
        layer_index (np.ndarray): uint16 [layers]; absolute index of each MoE layer in the model.
        expert_bytes (np.ndarray | None): int64 [layers] or [layers, experts]; None if the trace does not hold it.
        layer_experts (np.ndarray | None): uint16 [layers]; experts of each layer if they differ, else None.
        has (frozenset[str]): The optional data that the trace holds: "gates", "token", "row_phase", "recorded"; or
            "counts" if it has no ids at all.
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
        self.layer_experts = self._whole("layer_experts") if "layer_experts" in columns else None
        self.layers, self.steps = self.layer_index.size, self.phase.size
        self.rows = int(self.offset[-1]) if "counts" in columns else columns["experts"].shape[0]
        schema.check_sizes(self.shown, self.num_experts, self.top_k, self.layers, self.rows, self.steps)
        schema.check_layers(self.shown, self.layer_index, self.expert_bytes, self.num_experts, self.layer_experts)
        schema.check_steps(self.shown, self.offset, self.phase, self.rows, bool(self.has & {"row_phase", "counts"}))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Trace":
        """Open the trace file at `path`; nothing but its steps is read now.

        Raises MoetraceError, naming file and dataset, if it is not a trace file or its parts do not fit together.
        Expert ids are not looked at: `verify` and the replay check them.
        """
        path = Path(path)
        source = Source(path)
        try:
            attributes = read_attributes(source)
            trace = cls(path, attributes, read_columns(source, attributes["num_experts"], attributes["top_k"]))
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            source.file.close()
            raise MoetraceError(f"{path} is damaged: {error.args[0] if error.args else error}.") from error
        except BaseException:
            source.file.close()
            raise
        trace._file = source.file
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
        layer_experts: np.ndarray | None = None,
        **optional: np.ndarray,
    ) -> "Trace":
        """Make a trace in memory, with the checks and the interface of one in a file.

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
            layer_experts: Experts of each layer where they differ, integers [layers]. By default num_experts.
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
        columns, facts = arrays.columns_of(experts, num_experts, request, position, optional)
        columns |= arrays.other_columns(facts, steps, phase, layer_index, expert_bytes, layer_experts)
        attributes = {"model": model, "num_experts": int(num_experts), "top_k": facts[2], "source": dict(source or {})}
        return cls(None, attributes | {"created_by": f"moetrace {__version__}"}, columns)

    __repr__, _repr_html_ = trace_text, trace_html

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

        Args:
            rows: Most rows of a block, which has at least one step. By default about 4 MiB of ids.
            ahead: Further steps that a block also carries.

        Returns:
            The blocks. Ids are not checked here.

        Raises:
            MoetraceError: The trace has counts but no ids; on the way, the file is damaged, a request, position or
                phase is impossible, or a step is too large.

        Examples:
            >>> import moetrace as mt
            >>> with mt.Trace.open("traces/tiny-olmoe.h5") as trace:
            ...     print(sum(block.steps for block in trace.blocks(rows=1000)))
            6981
        """
        self.check_has_rows()
        return self._blocks(max(1, BLOCK_BYTES // self.id_bytes) if rows is None else rows, ahead, False)

    def compared_blocks(self, ahead: int = 0, rows: int | None = None) -> Iterator[Block]:
        """The same blocks, with `ahead` and `rows`; then raises MoetraceError if the ids differ from their sha256."""
        self.check_has_rows()
        return self._blocks(max(1, BLOCK_BYTES // self.id_bytes) if rows is None else rows, ahead, True)

    def _blocks(self, rows: int, ahead: int, compare: bool) -> Iterator[Block]:
        ids = self._columns["experts"]
        with PassingHashes(self.shown, {"experts": ids} if compare else {}) as hashes:
            for first, stop in schema.step_ranges(self.offset, rows):
                end = min(stop + ahead, self.steps)
                schema.check_step_bytes(self.shown, self.offset, first, end, self.id_bytes)
                part = self._rows(first, end)
                experts = ids.read(int(self.offset[first]), int(self.offset[end]))
                hashes.add(experts=experts[: part.offset[stop - first]])
                yield Block(first, stop - first, part.offset, experts, part.request, part.position, part.phase)
            hashes.compare()

    def row_blocks(self, *, compare: bool = False) -> Iterator[Rows]:
        """Every row's request, position and phase, in blocks of whole steps: a first pass that reads no ids.

        With `compare`, all datasets except the ids and the optional ones are compared with their sha256. Raises
        MoetraceError as `blocks` does.
        """
        self.check_has_rows()
        return self._row_blocks(compare)

    def _row_blocks(self, compare: bool) -> Iterator[Rows]:
        names = "request", "position", "row_phase", "offset", "phase", "layer_index", "expert_bytes", "layer_experts"
        known = {name: self._columns[name] for name in names if compare and name in self._columns}
        with PassingHashes(self.shown, known) as hashes:
            hashes.add(**{name: getattr(self, name) for name in known if name not in ROW_PATHS})
            for first, stop in schema.step_ranges(self.offset, BLOCK_BYTES // 16):
                schema.check_step_bytes(self.shown, self.offset, first, stop, 0)
                part = self._rows(first, stop)
                hashes.add(request=part.request, position=part.position, row_phase=part.phase)
                yield part
            hashes.compare()

    def parts(self, rows: int | None = None, *, ids: bool = True) -> Iterator[Part]:
        """Cut the trace into parts of at most `rows` rows, in order: memory does not grow with its steps either.

        Without `ids` these are not read. Raises MoetraceError as `blocks` does, but no step is too large.
        """
        self.check_has_rows()
        return self._parts(min(max(1, BLOCK_BYTES // self.id_bytes), schema.PART_ROWS) if rows is None else rows, ids)

    def _parts(self, rows: int, ids: bool) -> Iterator[Part]:
        for first, stop in schema.step_ranges(self.offset, rows):
            begin, end = int(self.offset[first]), int(self.offset[stop])
            for start in range(begin, end, rows):
                up_to = min(start + rows, end)
                lengths = np.diff(np.clip(self.offset[first : stop + 1], start, up_to))
                step = np.repeat(np.arange(first, stop), lengths)
                request, position, phase = self._row_data(start, up_to, self.phase[step])
                experts = self._columns["experts"].read(start, up_to if ids else start)
                part = Part(start, experts, step, request, position, phase)
                schema.check_rows(self.shown, start, part)
                yield part

    @property
    def id_bytes(self) -> int:
        """Size of the ids of a row."""
        return self.layers * self.top_k * self._columns["experts"].dtype.itemsize

    def count_blocks(self, *, check: bool = True) -> Iterator[CountBlock]:
        """The counts of a trace that holds them instead of ids, about 4 MiB at a time, in order.

        Raises MoetraceError at once if the trace has no counts, and while reading if the file turns out damaged or,
        unless `check` is false, a count is negative or too large to be summed.
        """
        if "counts" not in self.has:
            raise MoetraceError(f"{self.shown} has no counts.")
        return self._count_blocks(check)

    def _count_blocks(self, check: bool) -> Iterator[CountBlock]:
        at_once, counted = max(1, BLOCK_BYTES // (8 * self.layers * self.num_experts)), 0
        for first in range(0, self.steps, at_once):
            stop = min(first + at_once, self.steps)
            counts = self._columns["counts"].read(first, stop)
            if check:
                counted = schema.check_counts(self.shown, first, counts, counted=counted)
            yield CountBlock(first, counts, np.diff(self.offset[first : stop + 1]), self.phase[first:stop])

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
            for counts in self.count_blocks():
                schema.check_counts(self.shown, counts.first_step, counts.counts, counts.rows)
            return
        for part in self.parts():
            schema.check_ids(self.shown, part.first, part.experts, self.num_experts, self.layer_experts)
            if "recorded" in self.has:
                recorded = self.read("recorded", part.first, part.first + len(part.experts))
                schema.check_recorded(self.shown, part.first, recorded, part.experts)

    def verify_hashes(self) -> None:
        """Raise MoetraceError on a dataset that differs from its sha256; one without is taken as it is.

        A copy's fresh hashes would hide the damage, so a function that copies a trace calls this first.
        """
        for column in self._columns.values():
            if column.sha256 is not None and sha256_of(column) != column.sha256:
                raise refuse_changed(self.shown, column.path)

    @property
    def content_sha256(self) -> str | None:
        """SHA-256 of the routing: shape, model name and every dataset's sha256; None if one of these is not stored.

        Independent of the file's compression and of `source`; `hash_content` also computes it for a trace in memory.
        Stored hashes are believed: `verify_hashes` compares them.
        """
        hashes = {name: column.sha256 for name, column in self._columns.items() if column.sha256 is not None}
        return content_sha256_of(self, self._columns, hashes) if len(hashes) == len(self._columns) else None

    def hash_content(self) -> str:
        """Return `content_sha256` as it would be stored: read everything, block by block, and believe nothing."""
        return content_sha256_of(self, self._columns, {name: sha256_of(one) for name, one in self._columns.items()})

    def head(self, steps: int) -> "Trace":
        """The first `steps` steps as a trace of its own, read from the same place; all steps if the trace has fewer.

        Its `content_sha256` is None. It can be read for as long as this one.
        """
        steps = min(max(steps, 1), self.steps)
        entries = dict.fromkeys(ROW_PATHS, int(self.offset[steps]))
        entries |= {"phase": steps, "counts": steps, "offset": steps + 1}
        columns = {
            name: column._replace(shape=(entries.get(name, column.shape[0]), *column.shape[1:]), sha256=None)
            for name, column in self._columns.items()
        }
        attributes = {name: getattr(self, name) for name in ("model", "source", "created_by", "num_experts", "top_k")}
        return Trace(self.path, attributes, columns)

    def write(self, path: str | os.PathLike[str], compress: str | None = None) -> None:
        """Write the trace to a file at `path`, contiguous or with `compress` "zstd" or "gzip".

        Raises MoetraceError if the trace's own file is damaged, or holds an impossible value.
        """
        self.verify_hashes()
        names = ("model", "num_experts", "top_k", "layers", "rows", "steps", "source", "layer_index", "layer_experts")
        facts: dict[str, Any] = {name: getattr(self, name) for name in names} | {"compress": compress}
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
                schema.check_ids(self.shown, first, block.experts, self.num_experts, self.layer_experts)
                more = {name: self.read(name, first, first + len(block.request)) for name in optional}
                writer.append(
                    block.experts, block.request, block.position, np.diff(block.offset), self.phase[steps], **more
                )

    def check_has_rows(self) -> None:
        """Raise a MoetraceError if the trace holds only counts."""
        if "counts" in self.has:
            raise MoetraceError(f"{self.shown} holds only counts of ids (/counts), but this needs the ids themselves.")

    def _rows(self, first: int, stop: int) -> Rows:
        offset = self.offset[first : stop + 1] - self.offset[first]
        start, end = int(self.offset[first]), int(self.offset[stop])
        stated = np.repeat(self.phase[first:stop], np.diff(offset))
        request, position, phase = self._row_data(start, end, stated)
        part = Rows(first, stop - first, offset, request, position, phase)
        schema.check_rows(self.shown, start, part)
        return part

    def _row_data(self, start: int, end: int, stated: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Request, position and phase of rows; `stated` is the phase of the step of each."""
        phase = stated
        if "row_phase" in self.has:
            phase = self._columns["row_phase"].read(start, end)
            schema.check_row_phase(self.shown, start, phase, stated)
        request, position = (self._columns[name].read(start, end) for name in ("request", "position"))
        return request, position, phase

    def _whole(self, name: str) -> np.ndarray:
        column = self._columns[name]
        if column.storage == "stored" and math.prod(column.shape) * column.dtype.itemsize > WHOLE_BYTES:
            raise MoetraceError(f"{self.shown}: {column.path} is too large to be compressed.")
        return column.read(0, column.shape[0])
