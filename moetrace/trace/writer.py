"""Write a trace file: block by block, all or nothing, and the same bytes for the same data."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import hdf5plugin
import numpy as np

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.atomic import AtomicFile, uninterrupted
from moetrace.trace.schema import (
    ATTRIBUTE_BYTES,
    CHUNK_BYTES,
    MIXED,
    OPTIONAL,
    ROW_PATHS,
    SCHEMA,
    as_dtype,
    check_layers,
    check_sizes,
    plain_json,
    plain_text,
    row_dtype,
    row_shape,
)
from moetrace.version import __version__

CHUNK_ROWS = 4096
ALIGNMENT_BYTES = 4096
COMPRESSIONS = ("zstd", "gzip")


class Writer:
    """Write a trace file block by block: the whole file or nothing. A context manager.

    Data goes to a temporary file beside `path`. When the `with` block ends well, that file is synced and takes the
    name. On any error, Ctrl-C included, it is removed, and a file at `path` stays unchanged. The same data gives the
    same bytes. docs/trace-format.md describes schema `moetrace/1`.

    Args:
        path: The new file.
        model: Name of the model.
        num_experts: Experts of a layer.
        top_k: The most experts that a row chooses in a layer.
        layers: Number of MoE layers.
        rows: Token rows that `append` gets in total.
        steps: Steps that `append` gets in total.
        source: Where the ids are from, as JSON values.
        layer_index: Absolute index of each MoE layer in the model, uint16 [layers]. By default 0, 1, ...
        expert_bytes: Bytes of the experts, int64 [layers] or [layers, experts]. By default not known.
        layer_experts: Experts of each layer where they differ, uint16 [layers]. By default `num_experts`.
        optional: The datasets beyond experts, request and position: "gates", "token", "row_phase", "recorded".
        compress: "zstd" or "gzip". By default data is contiguous, so that it can be memory-mapped.

    Raises:
        UsageError: There is no such compression or optional dataset.
        MoetraceError: The data does not fit the announced shape, or the system refuses (a full disk).

    Examples:
        >>> import moetrace as mt
        >>> import numpy as np
        >>> facts = {"model": "mine", "num_experts": 4, "top_k": 2, "layers": 1, "source": {"engine": "my engine"}}
        >>> with mt.Writer("mine.h5", rows=3, steps=2, **facts) as writer:
        ...     writer.append(
        ...         experts=np.array([[[3, 1]], [[1, 2]], [[0, 1]]]),
        ...         request=np.array([0, 0, 0]),
        ...         position=np.array([0, 1, 2]),
        ...         steps=np.array([2, 1]),
        ...         phase=np.array([0, 1]),
        ...     )
        >>> with mt.Trace.open("mine.h5") as trace:
        ...     print(trace.rows, trace.model)
        3 mine
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        model: str,
        num_experts: int,
        top_k: int,
        layers: int,
        rows: int,
        steps: int,
        source: Mapping[str, Any],
        layer_index: np.ndarray | None = None,
        expert_bytes: np.ndarray | None = None,
        layer_experts: np.ndarray | None = None,
        optional: Sequence[str] = (),
        compress: str | None = None,
    ) -> None:
        self._shown = str(path)
        self._path = Path(path)
        self._file: h5py.File | None = None
        check_sizes(self._shown, num_experts, top_k, layers, rows, steps)
        if compress is not None and compress not in COMPRESSIONS:
            raise UsageError(f"compress is {compress!r}, but must be zstd or gzip.")
        if unknown := set(optional) - set(OPTIONAL):
            raise UsageError(f"A trace has no optional dataset {sorted(unknown)[0]!r}, only {', '.join(OPTIONAL)}.")
        source = plain_json(f"{self._shown}: source", dict(source))
        self._attributes = {
            "schema": SCHEMA,
            "model": plain_text(model),
            "num_experts": num_experts,
            "top_k": top_k,
            "source": json.dumps(source, sort_keys=True, ensure_ascii=False, allow_nan=False),
            "created_by": f"moetrace {__version__}",
        }
        self._layers, self._rows, self._steps = layers, rows, steps
        self._chunk_rows = min(CHUNK_ROWS, max(1, CHUNK_BYTES // (2 * layers * top_k)))
        self._names = [name for name in ROW_PATHS if name not in OPTIONAL or name in optional]
        self._layer_index = np.arange(layers, dtype=np.uint16) if layer_index is None else layer_index
        if np.shape(self._layer_index) != (layers,):
            raise MoetraceError(f"{self._shown}: layer_index has {np.size(self._layer_index)} entries, not {layers}.")
        self._layer_index = as_dtype(f"{self._shown}: layer_index", self._layer_index, np.dtype("<u2"))
        if expert_bytes is not None:
            expert_bytes = as_dtype(f"{self._shown}: expert_bytes", expert_bytes, np.dtype("<i8"))
        self._expert_bytes = expert_bytes
        if layer_experts is not None:
            layer_experts = as_dtype(f"{self._shown}: layer_experts", layer_experts, np.dtype("<u2"))
        self._layer_experts = layer_experts
        check_layers(self._shown, self._layer_index, self._expert_bytes, num_experts, layer_experts)
        self._compress = compress
        self._row = self._step = 0
        self._held: list[dict[str, np.ndarray]] = []  # rows that wait until a chunk is full
        self._hashes = {path: hashlib.sha256() for path in (*ROW_PATHS.values(), "/steps/offset", "/steps/phase")}

    def __enter__(self) -> Self:
        try:
            self._output = AtomicFile(self._path)
        except OSError as error:
            raise self._refused(error) from error
        try:
            with uninterrupted():
                self._create()
            self._output.raise_error()
        except BaseException as error:
            self._abandon()
            if isinstance(error, OSError):
                raise self._refused(error) from error
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._abandon()
            return
        try:
            with uninterrupted():
                self._finish()
            self._output.commit()
        except OSError as failure:
            self._abandon()
            raise self._refused(failure) from failure
        except BaseException:
            self._abandon()
            raise

    def append(
        self,
        experts: np.ndarray,
        request: np.ndarray,
        position: np.ndarray,
        steps: np.ndarray,
        phase: np.ndarray,
        **optional: np.ndarray | None,
    ) -> None:
        """Write the next whole steps.

        Args:
            experts: Expert ids, integers [n, layers, top_k].
            request: Request of each row, integers [n].
            position: Position of each row in its request, integers [n].
            steps: How many rows each step has, integers [steps], at least 1 each; they sum to n.
            phase: Phase of each step, integers [steps]: 0 prefill, 1 decode, 2 mixed.
            **optional: The arrays that were announced: `gates` and `recorded` [n, layers, top_k], `token` and
                `row_phase` [n]. None counts as not given.

        Raises:
            MoetraceError: A shape or a value does not fit, an announced array is missing, there are more rows or steps
                than announced, or the system refuses.

        Examples:
            >>> import moetrace as mt
            >>> with mt.Trace.open("traces/tiny-olmoe.h5") as trace:
            ...     names = ("model", "num_experts", "top_k", "layers", "rows", "steps", "source")
            ...     with mt.Writer("copy.h5", **{name: getattr(trace, name) for name in names}) as writer:
            ...         for block in trace.blocks():
            ...             steps = block.offset[1:] - block.offset[:-1]
            ...             phase = trace.phase[block.first_step : block.first_step + block.steps]
            ...             writer.append(block.experts, block.request, block.position, steps, phase)
            >>> with mt.Trace.open("copy.h5") as copy:
            ...     print(copy.rows)
            16414
        """
        given = {"experts": experts, "request": request, "position": position, **optional}
        self._add([{name: array for name, array in given.items() if array is not None}], steps, phase)

    def _add(self, parts: Sequence[Mapping[str, np.ndarray]], steps: np.ndarray, phase: np.ndarray) -> None:
        checked = [self._checked(part) for part in parts]
        steps = as_dtype(f"{self._shown}: steps", steps, np.dtype("<i8"))
        phase = as_dtype(f"{self._shown}: phase", phase, np.dtype("u1"))
        self._check_steps(steps, phase, sum(len(part["experts"]) for part in checked))
        with uninterrupted():
            self._put_steps(steps, phase)
            self._held += checked
            self._flush(whole_chunks=self._compress is not None)
        if self._output.error is not None:
            raise self._refused(self._output.error)

    def _checked(self, part: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays of some rows in the dtypes of the file."""
        if set(part) != set(self._names):
            raise MoetraceError(f"{self._shown}: expected the arrays {self._names}, got {sorted(part)}.")
        count, num_experts, checked = len(part["experts"]), int(self._attributes["num_experts"]), {}
        for name, array in part.items():
            want = row_shape(name, count, self._layers, int(self._attributes["top_k"]))
            if np.shape(array) != want:
                raise MoetraceError(f"{self._shown}: {name} has shape {np.shape(array)}, but {want} is needed.")
            checked[name] = as_dtype(f"{self._shown}: {name}", array, row_dtype(name, num_experts))
        return checked

    def _create(self) -> None:
        # Low bound v108: attributes and groups in the compact form; timestamps are switched off below.
        file = self._file = h5py.File(
            self._output,
            "w",
            libver=("v108", "v110"),
            alignment_threshold=1,
            alignment_interval=ALIGNMENT_BYTES,
        )
        attributes, data = self._attributes, self._data()
        for name in ("rows", "steps", "layers", "recorded"):
            if name in ("steps", "layers") or any(path.startswith(f"/{name}/") for path in data):
                properties = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
                properties.set_obj_track_times(False)
                h5py.h5g.create(file.id, name.encode(), gcpl=properties)
        for path, (shape, dtype) in data.items():
            self._dataset(path, shape, dtype, self._compress)
        self._dataset("/steps/offset", (self._steps + 1,), np.dtype("<i8"))
        self._dataset("/steps/phase", (self._steps,), np.dtype("u1"))
        self._put("/steps/offset", 0, np.zeros(1, "<i8"))
        for path, array in (
            ("/layers/index", self._layer_index),
            ("/layers/expert_bytes", self._expert_bytes),
            ("/layers/experts", self._layer_experts),
        ):
            if array is not None:
                self._hashes[path] = hashlib.sha256()
                self._dataset(path, array.shape, array.dtype)
                self._put(path, 0, array)
        for name, value in attributes.items():
            if isinstance(value, str):
                _write_text(file, name, value, self._shown)
            else:
                file.attrs.create(name, value, dtype="<i8")

    def _data(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Path, shape and dtype of what `append` fills row by row."""
        num_experts, top_k = int(self._attributes["num_experts"]), int(self._attributes["top_k"])
        return {
            ROW_PATHS[name]: (row_shape(name, self._rows, self._layers, top_k), row_dtype(name, num_experts))
            for name in self._names
        }

    def _dataset(self, path: str, shape: tuple[int, ...], dtype: np.dtype, compress: str | None = None) -> None:
        options: dict[str, Any] = {}
        if compress is not None:
            options = {"chunks": (min(self._chunk_rows, shape[0]), *shape[1:])}
            options |= dict(hdf5plugin.Zstd(clevel=3)) if compress == "zstd" else {"compression": "gzip"}
        assert self._file is not None
        # Early allocation without fill values puts every contiguous dataset at its place before any data is there.
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        if compress is None:
            properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        self._file.create_dataset(path, shape, dtype, track_times=False, dcpl=properties, **options)

    def _put_steps(self, steps: np.ndarray, phase: np.ndarray) -> None:
        self._put("/steps/offset", self._step + 1, self._row + np.cumsum(steps, dtype=np.int64))
        self._put("/steps/phase", self._step, phase)
        self._step += steps.size
        self._row += int(steps.sum())

    def _check_steps(self, steps: np.ndarray, phase: np.ndarray, rows: int) -> None:
        if steps.shape != phase.shape or steps.ndim != 1:
            raise MoetraceError(f"{self._shown}: steps and phase differ in shape: {steps.shape} and {phase.shape}.")
        if steps.size and (steps.min() < 1 or phase.max() > MIXED):
            raise MoetraceError(f"{self._shown}: each step needs one row or more and the phase 0, 1 or 2.")
        if int(steps.sum()) != rows:
            raise MoetraceError(f"{self._shown}: the steps have {steps.sum()} rows, the arrays {rows}.")
        if np.any(phase == MIXED) and self._names and "row_phase" not in self._names:
            raise MoetraceError(f"{self._shown}: a mixed step needs the phase of each row (row_phase).")
        if self._row + rows > self._rows or self._step + steps.size > self._steps:
            raise MoetraceError(f"{self._shown}: more than the announced {self._rows} rows in {self._steps} steps.")

    def _flush(self, whole_chunks: bool) -> None:
        """Write buffered rows, each chunk once and in one order, so that bytes don't depend on the size of appends."""
        held = sum(len(part["experts"]) for part in self._held)
        ready = held - held % self._chunk_rows if whole_chunks else held
        if ready == 0:
            return
        first = self._row - held
        if ready == held and not self._compress:
            for part in self._held:
                for name in self._names:
                    self._put(ROW_PATHS[name], first, part[name])
                first += len(part["experts"])
            self._held = []
            return
        joined = {name: np.concatenate([part[name] for part in self._held]) for name in self._names}
        for start in range(0, ready, self._chunk_rows):
            for name in self._names:
                stop = min(start + self._chunk_rows, ready)
                self._put(ROW_PATHS[name], first + start, joined[name][start:stop])
        self._held = [{name: array[ready:] for name, array in joined.items()}]

    def _put(self, path: str, start: int, array: np.ndarray) -> None:
        assert self._file is not None, "append() needs the `with` block"
        dataset = self._file[path]
        assert isinstance(dataset, h5py.Dataset)
        dataset[start : start + len(array)] = array
        self._hashes[path].update(np.ascontiguousarray(array).data)

    def _finish(self) -> None:
        if self._row != self._rows or self._step != self._steps:
            raise MoetraceError(
                f"{self._shown}: {self._rows} rows in {self._steps} steps were announced, but {self._row} in "
                f"{self._step} came."
            )
        self._flush(whole_chunks=False)
        assert self._file is not None
        for path, digest in self._hashes.items():
            if path in self._file:
                _write_text(self._file[path], "sha256", digest.hexdigest(), self._shown)
        self._file.close()

    def _abandon(self) -> None:
        with uninterrupted():
            self._output.error = self._output.error or OSError("abandoned")  # so that closing writes nothing more
            if self._file is not None:
                self._file.close()
            self._output.discard()

    def _refused(self, error: OSError) -> MoetraceError:
        return MoetraceError(f"{self._shown} could not be written: {error.strerror or error}; nothing was changed.")


def append_parts(
    writer: Writer, parts: Sequence[Mapping[str, np.ndarray]], steps: np.ndarray, phase: np.ndarray
) -> None:
    """Write the next whole steps, as `Writer.append`, whose rows come in several parts: no copy joins them.

    `parts` are arrays by name, those that the trace has, each with the next rows.
    """
    writer._add(parts, steps, phase)


class CountsWriter(Writer):
    """A `Writer` of a trace that holds counts (`/counts`) instead of ids: `append_counts` in the place of `append`."""

    def __init__(self, path: str | os.PathLike[str], **facts: Any) -> None:
        super().__init__(path, **facts)
        self._names = []
        self._hashes["/counts"] = hashlib.sha256()

    def append_counts(self, counts: np.ndarray, rows: np.ndarray, phase: np.ndarray) -> None:
        """Write the next steps: `counts` [n, layers, experts], the token rows [n] and the phase [n] of each step."""
        counts = as_dtype(f"{self._shown}: counts", counts, np.dtype("<i8"))
        rows = as_dtype(f"{self._shown}: rows", rows, np.dtype("<i8"))
        phase = as_dtype(f"{self._shown}: phase", phase, np.dtype("u1"))
        want = (len(rows), self._layers, int(self._attributes["num_experts"]))
        if counts.shape != want:
            raise MoetraceError(f"{self._shown}: counts has shape {counts.shape}, but {want} is needed.")
        if counts.size and counts.min() < 0:
            raise MoetraceError(f"{self._shown}: a count is negative.")
        self._check_steps(rows, phase, int(rows.sum()))
        with uninterrupted():
            self._put("/counts", self._step, counts)
            self._put_steps(rows, phase)
        if self._output.error is not None:
            raise self._refused(self._output.error)

    def _data(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"/counts": ((self._steps, self._layers, int(self._attributes["num_experts"])), np.dtype("<i8"))}


def _write_text(target: Any, name: str, text: str, where: str) -> None:
    data = text.encode()
    if len(data) > ATTRIBUTE_BYTES:
        raise MoetraceError(f"{where}: the attribute {name} would take {len(data)} bytes, above {ATTRIBUTE_BYTES}.")
    # Fixed length: a text of variable length lies in a global heap, whose bytes depend on earlier writes.
    target.attrs.create(name, data, dtype=h5py.string_dtype("utf-8", max(len(data), 1)))
