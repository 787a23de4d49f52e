"""The content of a trace file of schema ``moetrace/1``: names, dtypes, and the checks that need only NumPy."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moetrace.spec.errors import MoetraceError

SCHEMA = "moetrace/1"
PREFILL, DECODE, MIXED = 0, 1, 2
PHASE_NAMES = ("prefill", "decode", "mixed")
PREFETCHED, NOT_RECORDED = 2, 255  # after 0 miss and 1 hit

# Name in Python -> path in the file, of the data that has one entry a row.
ROW_PATHS = {
    "experts": "/experts",
    "gates": "/gates",
    "request": "/rows/request",
    "position": "/rows/position",
    "token": "/rows/token",
    "row_phase": "/rows/phase",
    "recorded": "/recorded/resident",
}
# The rest, with its dtype.
OTHER_PATHS = {
    "offset": ("/steps/offset", np.dtype("<i8")),
    "phase": ("/steps/phase", np.dtype("u1")),
    "layer_index": ("/layers/index", np.dtype("<u2")),
    "expert_bytes": ("/layers/expert_bytes", np.dtype("<i8")),
    "layer_experts": ("/layers/experts", np.dtype("<u2")),
}
OPTIONAL_OTHERS = ("expert_bytes", "layer_experts")
OPTIONAL = ("gates", "token", "row_phase", "recorded")
# One row and one layer is a cell: top_k ids. These have the shape of /experts, the others one value a row.
PER_CHOICE = ("experts", "gates", "recorded")

BLOCK_BYTES = 4 << 20
# Python strings that come from a file are read only up to this size, and written only up to it: HDF5 keeps
# attributes up to 64 KiB in the object header, which is what makes the bytes of a file reproducible.
ATTRIBUTE_BYTES = 32 << 10
MAX_EXPERTS = MAX_LAYERS = 65535
# Memory is taken by the numbers that a file states, so these have bounds. The largest models have some 20,000 experts
# in all layers; 67 million steps are four days of decoding at 5 ms a step.
MAX_CELLS = 1 << 24  # layers x experts; a row or a step of counts is at most as long
MAX_ROWS, MAX_STEPS, MAX_REQUESTS = 1 << 40, 1 << 26, 1 << 24
MAX_COUNT, MAX_COUNTED = 1 << 32, 1 << 62  # of one expert in a step, and of all in a trace: sums fit int64
STEP_BYTES = 512 << 20  # of the rows of a step where whole steps are needed: their ids, and ROW_BYTES each
ROW_BYTES = 32  # request, position and phase of a row, and arrays made from them
CHUNK_BYTES = 64 << 20  # the most that a compressed chunk unpacks to
PART_ROWS = 1 << 18  # at a time, where rows are narrow
_PAIRS_UP_TO = 32  # slots, beyond which sorting a cell is faster than comparing all pairs
MAX_NESTING = 64  # of `source`: deep enough for any, and far from where Python gives up


class Rows(NamedTuple):
    """Whole steps without their expert ids (a first pass over a file: who ends when)."""

    first_step: int
    steps: int
    offset: np.ndarray  # int64 [steps + 1], relative to the first row here
    request: np.ndarray  # int32 [rows]
    position: np.ndarray  # int32 [rows]
    phase: np.ndarray  # uint8 [rows]: 0 prefill, 1 decode


class Block(NamedTuple):
    """Whole steps of a trace, and perhaps some further ones to look ahead at.

    `steps` counts those to process; `offset` and the arrays over rows cover the ones ahead as well.
    `experts` is an ordinary C-contiguous array; absent ids are 255 (uint8) or 65535 (uint16).
    """

    first_step: int
    steps: int
    offset: np.ndarray  # int64 [steps + ahead + 1], relative to the block's first row
    experts: np.ndarray  # uint8 | uint16 [rows, layers, top_k]
    request: np.ndarray  # int32 [rows]
    position: np.ndarray  # int32 [rows]
    phase: np.ndarray  # uint8 [rows]: 0 prefill, 1 decode


class Part(NamedTuple):
    """Successive rows, of whole steps or of a part of one; values are checked, except ids."""

    first: int  # number of the first row
    experts: np.ndarray  # uint8 | uint16 [rows, layers, top_k]; [0, layers, top_k] where ids were not asked for
    step: np.ndarray  # int64 [rows]
    request: np.ndarray  # int32 [rows]
    position: np.ndarray  # int32 [rows]
    phase: np.ndarray  # uint8 [rows]: 0 prefill, 1 decode


class CountBlock(NamedTuple):
    """Whole steps of a trace that holds only counts."""

    first_step: int
    counts: np.ndarray  # int64 [steps, layers, num_experts]
    rows: np.ndarray  # int64 [steps]: token rows of each
    phase: np.ndarray  # uint8 [steps]: 0 prefill, 1 decode, 2 mixed


def expert_dtype(num_experts: int) -> np.dtype:
    """The narrowest dtype that holds every id and the absent mark: uint8 up to 255 experts, else uint16."""
    return np.dtype(np.uint8 if num_experts <= 255 else np.uint16)


def absent_id(num_experts: int) -> int:
    """The id that says that a row made no choice there: 255 or 65535."""
    return int(np.iinfo(expert_dtype(num_experts)).max)


def row_dtype(name: str, num_experts: int) -> np.dtype:
    """The dtype of the row data `name` (a key of `ROW_PATHS`)."""
    if name == "experts":
        return expert_dtype(num_experts)
    return np.dtype({"gates": "<f2", "row_phase": "u1", "recorded": "u1"}.get(name, "<i4"))


def row_shape(name: str, rows: int, layers: int, top_k: int) -> tuple[int, ...]:
    """The shape of the row data `name` (a key of `ROW_PATHS`)."""
    return (rows, layers, top_k) if name in PER_CHOICE else (rows,)


def plain_text(text: str) -> str:
    """`text` that can be encoded: a lone surrogate, which JSON and HDF5 let through, becomes a question mark."""
    return text.encode(errors="replace").decode()


def plain_json(where: str, value: Any, levels: int = MAX_NESTING) -> Any:
    """`value` as any JSON reader takes it: `plain_text`, null for NaN and infinities; `where` begins the error.

    Raises MoetraceError if it is nested deeper than `levels` or holds what JSON does not have.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict | list | tuple) and levels == 0:
        raise MoetraceError(f"{where} is nested deeper than {MAX_NESTING} levels.")
    if isinstance(value, dict):
        return {plain_text(str(key)): plain_json(where, inner, levels - 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(where, inner, levels - 1) for inner in value]
    if isinstance(value, str):
        return plain_text(value)
    if not isinstance(value, int | float | None):
        raise MoetraceError(f"{where} holds a {type(value).__name__}, which JSON does not have.")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_sizes(where: str, num_experts: int, top_k: int, layers: int, rows: int, steps: int) -> None:
    """Raise a MoetraceError that starts with `where` if the sizes of a trace make no sense."""
    named = {"num_experts": num_experts, "top_k": top_k, "layers": layers, "rows": rows, "steps": steps}
    for name, size in named.items():
        if not isinstance(size, int | np.integer):
            raise MoetraceError(f"{where}: {name} is {size!r}, but must be a whole number.")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise MoetraceError(f"{where}: num_experts is {num_experts}, but must be 1 to {MAX_EXPERTS}.")
    if not 1 <= top_k <= num_experts:
        raise MoetraceError(f"{where}: top_k is {top_k}, but must be 1 to num_experts ({num_experts}).")
    if not 1 <= layers <= MAX_LAYERS:
        raise MoetraceError(f"{where}: the trace has {layers} layers, but needs 1 to {MAX_LAYERS}.")
    if layers * num_experts > MAX_CELLS:
        raise MoetraceError(
            f"{where}: {layers} layers of {num_experts} experts are more than the {MAX_CELLS:,} experts that a trace "
            f"may have."
        )
    if rows < 1 or steps < 1:
        raise MoetraceError(f"{where}: the trace is empty ({rows} rows in {steps} steps).")
    if rows > MAX_ROWS or steps > MAX_STEPS:
        raise MoetraceError(
            f"{where}: {rows:,} rows in {steps:,} steps are too many: a trace may have {MAX_ROWS:,} rows and "
            f"{MAX_STEPS:,} steps."
        )


def check_steps(where: str, offset: np.ndarray, phase: np.ndarray, rows: int, has_row_phase: bool) -> None:
    """Raise unless the steps cut the rows `0:rows` into runs of one row or more, each of a known phase."""
    path = f"{where}: /steps/offset"
    if offset[0] != 0:
        raise MoetraceError(f"{path} must begin with 0, but begins with {offset[0]}.")
    if offset[-1] != rows:
        raise MoetraceError(f"{path} must end with the number of rows ({rows}), but ends with {offset[-1]}.")
    for start in range(0, phase.size, 1 << 20):  # in slices: a trace may have a step for each row
        part = offset[start : start + (1 << 20) + 1]
        wrong = np.flatnonzero(part[1:] <= part[:-1])
        if wrong.size:
            step = start + int(wrong[0])
            raise MoetraceError(
                f"{path} must increase by one row or more a step, but goes from {offset[step]} to "
                f"{offset[step + 1]} at step {step}."
            )
    highest = int(phase.max())
    if highest > MIXED:
        step = int(np.argmax(phase > MIXED))
        raise MoetraceError(f"{where}: /steps/phase of step {step} is {phase[step]}, but must be 0, 1 or 2.")
    if highest == MIXED and not has_row_phase:
        step = int(np.argmax(phase == MIXED))
        raise MoetraceError(f"{where}: step {step} is mixed, so /rows/phase is needed, but it is missing.")


def check_layers(
    where: str,
    layer_index: np.ndarray,
    expert_bytes: np.ndarray | None,
    num_experts: int,
    layer_experts: np.ndarray | None = None,
) -> None:
    """Raise unless layers are in increasing order, have some experts, and these a positive size (a layer, or each)."""
    layers = layer_index.size
    if np.any(layer_index[1:] <= layer_index[:-1]):
        layer = int(np.argmax(layer_index[1:] <= layer_index[:-1]))
        raise MoetraceError(f"{where}: /layers/index must increase, but does not after entry {layer}.")
    if layer_experts is not None:
        _check_layer_experts(where, layer_experts, layers, num_experts)
    if expert_bytes is None:
        return
    check_expert_bytes_shape(where, expert_bytes.shape, layers, num_experts)
    if expert_bytes.min() < 1:
        layer = int(np.argwhere(expert_bytes < 1)[0][0])
        raise MoetraceError(f"{where}: /layers/expert_bytes of layer entry {layer} is not positive.")


def _check_layer_experts(where: str, layer_experts: np.ndarray, layers: int, num_experts: int) -> None:
    if layer_experts.shape != (layers,):
        raise MoetraceError(f"{where}: /layers/experts has shape {layer_experts.shape}, but must be ({layers},).")
    wrong = np.flatnonzero((layer_experts < 1) | (layer_experts > num_experts))
    if wrong.size:
        raise MoetraceError(
            f"{where}: /layers/experts of layer entry {wrong[0]} is {layer_experts[wrong[0]]}, but must be 1 to "
            f"num_experts ({num_experts})."
        )


def check_expert_bytes_shape(where: str, shape: tuple[int, ...], layers: int, num_experts: int) -> None:
    """Raise unless sizes of experts are given per layer or per expert."""
    if shape not in ((layers,), (layers, num_experts)):
        raise MoetraceError(
            f"{where}: /layers/expert_bytes has shape {shape}, but must be ({layers},) or ({layers}, {num_experts})."
        )


def check_requests(where: str, requests: int) -> None:
    """Raise if a trace has more requests than anything keeps a figure of each of."""
    if requests > MAX_REQUESTS:
        raise MoetraceError(f"{where} has more than the {MAX_REQUESTS:,} requests that a trace may have.")


def check_counts(
    where: str, first_step: int, counts: np.ndarray, rows: np.ndarray | None = None, counted: int = 0
) -> int:
    """Raise unless counts [steps, layers, experts] are 0 to MAX_COUNT, or to the `rows` [steps] of their step.

    `first_step` is the number of the first step, `counted` the sum of the counts before it. Returns the sum with these;
    raises if it is more than can be summed further.
    """
    most = np.full(len(counts), MAX_COUNT) if rows is None else np.minimum(np.asarray(rows, np.int64), MAX_COUNT)
    wrong = (counts < 0) | (counts > most[:, None, None])
    if wrong.any():
        step, layer, expert = (int(i) for i in np.argwhere(wrong)[0])
        upper = f"{MAX_COUNT}" if rows is None else f"the {rows[step]} rows of the step"
        raise MoetraceError(
            f"{where}: /counts of step {first_step + step}, layer entry {layer}, expert {expert} is "
            f"{counts[step, layer, expert]}, but must be 0 to {upper}."
        )
    counted += int(counts.sum())
    if counted > MAX_COUNTED:
        raise MoetraceError(f"{where}: the counts sum to {counted}, but may sum to {MAX_COUNTED} at most.")
    return counted


def step_ranges(offset: np.ndarray, rows: int) -> Iterator[tuple[int, int]]:
    """Cut steps into ranges of at most `rows` rows, but at least one step; `offset` int64 [steps + 1]."""
    first = 0
    while first < len(offset) - 1:
        stop = int(np.searchsorted(offset, offset[first] + rows, side="right")) - 1
        stop = max(stop, first + 1)
        yield first, stop
        first = stop


def check_step_bytes(where: str, offset: np.ndarray, first: int, stop: int, row_bytes: int) -> None:
    """Raise if the rows of the steps first:stop are too large to be taken at once, as a step must be.

    `offset` is int64 [steps + 1], `row_bytes` the bytes read of a row beside its request, position and phase.
    """
    rows = int(offset[stop] - offset[first])
    size = rows * (ROW_BYTES + row_bytes)
    if size > STEP_BYTES:
        which = f"step {first} has" if stop - first == 1 else f"the steps {first} to {stop - 1} have"
        raise MoetraceError(
            f"{where}: {which} {rows:,} rows, which take {size / 2**20:,.0f} MiB at once, above the "
            f"{STEP_BYTES >> 20} MiB of a step: cut long prompts with `moetrace rebatch --chunk`."
        )


def check_rows(where: str, first_row: int, rows: Rows | Part) -> None:
    """Raise unless requests and positions are >= 0 (requests need not be consecutive), row phases 0 or 1."""
    for path, wrong, values, want in (
        ("/rows/request", rows.request < 0, rows.request, "0 or more"),
        ("/rows/position", rows.position < 0, rows.position, "0 or more"),
        ("/rows/phase", rows.phase > DECODE, rows.phase, "0 or 1"),
    ):
        if wrong.any():
            row = int(np.argmax(wrong))
            raise MoetraceError(f"{where}: {path} of row {first_row + row} is {values[row]}, but must be {want}.")


def check_row_phase(where: str, first_row: int, phase: np.ndarray, stated: np.ndarray) -> None:
    """Raise unless the phase of each row is that of its step, `stated` (repeated for each row), or that is mixed."""
    wrong = (phase != stated) & (stated != MIXED)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise MoetraceError(
            f"{where}: /rows/phase of row {first_row + row} is {phase[row]}, but its step is "
            f"{PHASE_NAMES[stated[row]]} ({stated[row]})."
        )


def check_recorded(where: str, first_row: int, recorded: np.ndarray, experts: np.ndarray) -> None:
    """Raise unless each recorded residency [rows, layers, top_k] is 0, 1 or 2, or 255 where the id is absent."""
    wrong = recorded > PREFETCHED
    wrong &= ~((recorded == NOT_RECORDED) & (experts == np.iinfo(experts.dtype).max))
    if wrong.any():
        row, layer, slot = (int(i) for i in np.argwhere(wrong)[0])
        raise MoetraceError(
            f"{where}: /recorded/resident row {first_row + row}, layer entry {layer} is {recorded[row, layer, slot]}, "
            f"but must be 0, 1 or 2."
        )


def check_ids(
    where: str, first_row: int, experts: np.ndarray, num_experts: int, layer_experts: np.ndarray | None = None
) -> None:
    """Raise unless each id of `experts` [rows, layers, top_k] is absent or an expert that its layer has, none twice."""
    absent = absent_id(num_experts)
    has = np.full(experts.shape[1], num_experts) if layer_experts is None else layer_experts.astype(np.int64)
    wrong = (experts >= (num_experts if layer_experts is None else has[:, None])) & (experts != absent)
    if wrong.any():
        row, layer, slot = (int(i) for i in np.argwhere(wrong)[0])
        raise MoetraceError(
            f"{where}: /experts row {first_row + row}, layer entry {layer} holds the id {experts[row, layer, slot]}, "
            f"but {'the model' if layer_experts is None else 'that layer'} has {has[layer]} experts."
        )
    if (twice := _twice(experts, absent)).any():
        row, layer = (int(i) for i in np.argwhere(twice)[0])
        found, times = np.unique(experts[row, layer], return_counts=True)
        raise MoetraceError(
            f"{where}: /experts row {first_row + row}, layer entry {layer} chooses expert "
            f"{found[(times > 1) & (found != absent)][0]} more than once."
        )


def _twice(experts: np.ndarray, absent: int) -> np.ndarray:
    """Bool [rows, layers]: some id other than `absent` is there more than once."""
    top_k = experts.shape[-1]
    if top_k > _PAIRS_UP_TO:
        ordered = np.sort(experts, axis=-1)
        return ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != absent)).any(axis=-1)
    # Each pair of slots over all cells at once: 1 ns an id at top_k 8, 7 ns at 22, where sorting takes 55.
    slots = np.ascontiguousarray(np.moveaxis(experts, -1, 0))
    twice = np.zeros(experts.shape[:-1], bool)
    for slot in range(1, top_k):
        same = np.zeros_like(twice)
        for other in range(slot):
            same |= slots[slot] == slots[other]
        twice |= same & (slots[slot] != absent)
    return twice


def check_alike(where: str, first: Any, other_where: str, other: Any, names: Sequence[str]) -> None:
    """Raise unless `first` and `other` (traces, captures) are equal in each attribute of `names`: one model's shape."""
    for name in names:
        if not np.array_equal(getattr(first, name), getattr(other, name)):
            raise MoetraceError(f"{other_where} and {where} differ in {name}, so they can't share a trace.")


def as_dtype(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` as contiguous `dtype`; raise a MoetraceError that starts with `name` if a number would not survive."""
    array = np.asarray(array)
    if array.dtype != dtype:
        if array.dtype.kind not in ("iu" if dtype.kind in "iu" else "iuf"):
            raise MoetraceError(f"{name} holds {array.dtype}, but must hold {dtype}.")
        limits = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
        # fmin and fmax, because min and max of what holds a NaN are NaN.
        low, high = (f.reduce(array, axis=None) for f in (np.fmin, np.fmax)) if array.size else (0, 0)
        if low < limits.min or high > limits.max:
            raise MoetraceError(f"{name} holds numbers from {low} to {high}, beyond those of {dtype}.")
    return np.ascontiguousarray(array, dtype=dtype)
