"""The columns of a trace in memory, made of arrays: checked and converted as those of a file."""

from collections.abc import Mapping

import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.trace import schema
from moetrace.trace.hdf5 import Column

IN_MEMORY = "trace in memory"  # what messages call a trace without a file


def columns_of(
    experts: np.ndarray,
    num_experts: int,
    request: np.ndarray | None,
    position: np.ndarray | None,
    optional: Mapping[str, np.ndarray],
) -> tuple[dict[str, Column], tuple[int, int, int]]:
    """Make the columns with one entry a row, as `Trace.from_arrays` takes them; return also rows, layers, top_k."""
    if np.ndim(experts) != 3:
        raise MoetraceError(f"experts has shape {np.shape(experts)}, but must be [rows, layers, top_k].")
    rows, layers, top_k = np.shape(experts)
    schema.check_sizes(IN_MEMORY, num_experts, top_k, layers, rows, 1)
    request = np.zeros(rows, np.int32) if request is None else request
    given = {
        "experts": experts,
        "request": request,
        "position": _count_up(np.ravel(request)) if position is None else position,
        **optional,
    }
    columns = {}
    for name, array in given.items():
        if name not in schema.ROW_PATHS:
            raise MoetraceError(f"a trace has no array {name!r}, only {', '.join(schema.ROW_PATHS)}.")
        dtype, shape = schema.row_dtype(name, num_experts), schema.row_shape(name, rows, layers, top_k)
        columns[name] = _in_memory(schema.ROW_PATHS[name], schema.as_dtype(name, array, dtype), shape)
    return columns, (rows, layers, top_k)


def other_columns(
    sizes: tuple[int, int, int],
    steps: np.ndarray | None,
    phase: np.ndarray | None,
    layer_index: np.ndarray | None,
    expert_bytes: np.ndarray | None,
    layer_experts: np.ndarray | None = None,
) -> dict[str, Column]:
    """Make the columns of steps and layers, as `Trace.from_arrays` takes them; `sizes` are rows, layers and top_k."""
    rows, layers, _ = sizes
    steps = np.ones(rows, np.int64) if steps is None else schema.as_dtype("steps", steps, np.dtype("<i8"))
    phase = np.full(steps.size, schema.DECODE, np.uint8) if phase is None else phase
    others = {
        "offset": np.concatenate(([0], np.cumsum(steps))),
        "phase": schema.as_dtype("phase", phase, np.dtype("u1")),
        "layer_index": np.arange(layers) if layer_index is None else layer_index,
    }
    if expert_bytes is not None:
        others["expert_bytes"] = expert_bytes
    if layer_experts is not None:
        others["layer_experts"] = layer_experts
    columns = {}
    for name, array in others.items():
        path, dtype = schema.OTHER_PATHS[name]
        shape = {"phase": steps.shape, "layer_index": (layers,)}.get(name, np.shape(array))
        columns[name] = _in_memory(path, schema.as_dtype(name, array, dtype), shape)
    return columns


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
