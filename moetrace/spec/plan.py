"""Plans as engines read them: which expert is in each slot of each unit.

`plan_json` reads those of SGLang, vLLM and vllm-ascend. TensorRT-LLM (`moe_load_balancer: FILE.yaml`,
examples/ep_load_balancer): `num_slots`, `layer_updates_per_iter` (0: the plan stays) and
`initial_global_assignments`, the expert in each slot by index of the MoE layer. Everywhere, units have successive
slots, equally many.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.model import Model
from moetrace.spec.ordinary_file import read_ordinary
from moetrace.spec.plan_json import check_numbers, rows_of_json

FORMATS = {".json": "SGLang", ".yaml": "TensorRT-LLM", ".yml": "TensorRT-LLM"}
MAX_SLOTS = 1 << 16  # of a layer
MAX_BYTES = 8 << 20  # of a plan file; one of 58 layers of 288 slots has 80 kB
_NUMBERS = ("num_slots", "layer_updates_per_iter", "ep_size")
_INTEGER = re.compile(r"[0-9]{1,6}", re.ASCII)
# For lines without spaces at their end: a pattern that skips these takes the square of a long line's length.
_TOP = re.compile(r"([a-z_]+):(?: +(\S.*))?", re.ASCII)
_LAYER = re.compile(r" +([0-9]{1,6}):(?: +(\S.*))?", re.ASCII)
_ITEM = re.compile(r" +- +([0-9]{1,6})", re.ASCII)
_ENTRY = re.compile(r" *([0-9]{1,6}) *: *(\[[^][{}]*\]) *(?:,|$) *", re.ASCII)
_COMMENT = re.compile(r"(?:^|(?<=[ \t]))#")


def form_of(path: Path) -> str:
    """Return whose format the name of a plan file says, a value of `FORMATS`; raise UsageError if none's."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise UsageError(
            f"{path} does not say whose plan it is: .json is SGLang's, vLLM's or vllm-ascend's, .yaml TensorRT-LLM's."
        ) from None


def load_plan(
    path: str | Path, layer_index: np.ndarray, experts: int, units: int, model: Model | None = None
) -> np.ndarray:
    """Read the plan of a file.

    Args:
        path: The file of SGLang, vLLM or vllm-ascend (.json), or of TensorRT-LLM (.yaml). SGLang's may also have a
            row for each MoE layer only. A plan of more layers is taken if these are the model's others, or dense ones
            before the last.
        layer_index: Absolute index of each MoE layer in the model, int64 [L].
        experts: Experts of a layer.
        units: Number of units that share the slots.
        model: The model, which may know the numbers of its MoE layers. By default not known.

    Returns:
        int32 [L, units, slots], the expert in each slot. Every expert has at least one.

    Raises:
        UsageError: `units` cannot share the plan's slots equally, or the suffix is another one.
        MoetraceError: The file cannot be read or is wrong, or nothing says which of its layers are meant. The message
            names file, and layer or line.
    """
    path = Path(path)
    form = form_of(path)
    text = _text(path)
    if form == "SGLang":
        slots = rows_of_json(path, text, layer_index, units, model)
    else:
        slots = _from_trtllm(path, text, layer_index, units, model)
    sizes = {len(row) for row in slots}
    if sizes <= {0}:
        raise MoetraceError(f"{path} is a plan without slots: nothing says where an expert is.")
    if len(sizes) > 1 or 0 in sizes:
        raise MoetraceError(f"{path}: layers have from {min(sizes)} to {max(sizes)} slots, but need equally many.")
    if max(sizes) > MAX_SLOTS or max(sizes) % units:
        raise UsageError(
            f"{path} has {max(sizes)} slots a layer, which {units} units cannot share: take another number."
        )
    plan = np.array(slots, np.int32)
    for row, layer in zip(plan, layer_index, strict=True):
        if row.max() >= experts:
            raise MoetraceError(f"{path}: layer {layer} has expert {row.max()}, but the trace has {experts} experts.")
        missing = np.flatnonzero(np.bincount(row, minlength=experts) == 0)
        if missing.size:
            raise MoetraceError(f"{path}: layer {layer} has no slot for expert {missing[0]}.")
    return plan.reshape(len(plan), units, -1)


def _text(path: Path) -> str:
    if not os.path.lexists(path):
        raise MoetraceError(f"there is no plan file {path}.")
    try:
        return read_ordinary(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise MoetraceError(f"{path} is no text file.") from None


def _from_trtllm(path: Path, text: str, layer_index: np.ndarray, units: int, model: Model | None) -> list[list[int]]:
    numbers, layers = _parse(path, text)
    if numbers.get("ep_size", units) != units:
        raise UsageError(
            f"{path} is a plan for {numbers['ep_size']} units, not {units}: set the units to {numbers['ep_size']}."
        )
    missing = next((layer for layer in layer_index.tolist() if layer not in layers), None)
    if missing is not None:
        raise MoetraceError(f"{path} has no layer {missing} among its initial_global_assignments.")
    check_numbers(path, set(layers), layer_index, model)
    rows = [layers[layer] for layer in layer_index.tolist()]
    if any(len(row) != numbers.get("num_slots") for row in rows):
        raise MoetraceError(f"{path}: num_slots must be there and the number of slots of every layer.")
    return rows


def _parse(path: Path, text: str) -> tuple[dict[str, int], dict[int, list[int]]]:
    """Read the YAML that plans are written in: whole numbers, and lists of them by layer, `[1, 2]` or `- 1`."""
    numbers: dict[str, int] = {}
    layers: dict[int, list[int]] = {}
    inside, items = False, None

    def add(line: int, layer: int, slots: list[int]) -> list[int]:
        if layer in layers:
            raise MoetraceError(f"{path}, line {line}: layer {layer} is there twice.")
        layers[layer] = slots
        return slots

    for line, content in _logical_lines(path, text):
        if match := _TOP.fullmatch(content):
            name, value = match.groups()
            inside, items = name == "initial_global_assignments", None
            if inside and not layers:
                for layer, slots in _mapping(path, line, value) if value else ():
                    add(line, layer, slots)
            elif inside or name not in _NUMBERS or name in numbers:
                raise _odd(path, line)
            else:
                numbers[name] = _integer(path, line, value)
        elif inside and (match := _LAYER.fullmatch(content)):
            slots = add(line, int(match[1]), _integers(path, line, match[2]) if match[2] else [])
            items = None if match[2] else slots
        elif items is not None and (match := _ITEM.fullmatch(content)):
            items.append(int(match[1]))
        else:
            raise _odd(path, line)
    return numbers, layers


def _logical_lines(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a document with their numbers: without comments, and a list in brackets as one line."""
    began, depth, held, first = False, 0, [], 0
    for number, row in enumerate(text.splitlines(), 1):
        content = _COMMENT.split(row, maxsplit=1)[0].rstrip(" \t")
        if not content.strip() or (content == "---" and not began):
            continue
        if content == "...":
            break
        began = True
        first = first if held else number
        held.append(content.lstrip(" ") if held else content)
        depth += content.count("[") + content.count("{") - content.count("]") - content.count("}")
        if depth <= 0:
            yield first, " ".join(held)
            depth, held = 0, []
    if held:
        raise MoetraceError(f"{path}: the list that begins in line {first} does not end.")


def _mapping(path: Path, line: int, flow: str) -> Iterator[tuple[int, list[int]]]:
    """Read `{1: [1, 2], 2: [2, 1]}`."""
    if not (flow.startswith("{") and flow.endswith("}")):
        raise _odd(path, line)
    at, inner = 0, flow[1:-1].strip(" ")
    while at < len(inner):
        match = _ENTRY.match(inner, at)
        if not match:
            raise _odd(path, line)
        yield int(match[1]), _integers(path, line, match[2])
        at = match.end()


def _integers(path: Path, line: int, flow: str) -> list[int]:
    """Read `[1, 2]`, in which a last comma may stand."""
    if not (flow.startswith("[") and flow.endswith("]")):
        raise _odd(path, line)
    parts = [part.strip(" ") for part in flow[1:-1].split(",")]
    if len(parts) > 1 and not parts[-1]:
        parts.pop()
    return [_integer(path, line, part) for part in parts]


def _integer(path: Path, line: int, text: str | None) -> int:
    if text is None or not _INTEGER.fullmatch(text):
        raise _odd(path, line)
    return int(text)


def _odd(path: Path, line: int) -> MoetraceError:
    return MoetraceError(
        f"{path}, line {line} is not as in a plan of TensorRT-LLM: num_slots, layer_updates_per_iter and "
        f"initial_global_assignments, with whole numbers and lists of them."
    )
