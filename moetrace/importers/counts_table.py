"""Tables of counts without more: the JSON of EPLB, and a tensor that torch.save wrote.

* `{"logical_count": [[...], ...]}`, [layers, experts] or [steps, layers, experts], as SGLang's
  `--init-expert-location FILE.json` takes it and `moetrace export --to eplb` writes it.
* `[[...], ...]`, [layers, experts], as JSON.
* A tensor [layers, experts] of torch.save, by itself or as `expert_load_view` in a dict, or a dict with a tensor
  [experts] for each number of a layer. `expert_load_view.pt` is what vllm-ascend's `examples/eplb/eplb_strategy.py`
  (commit 161696b7) makes plans from. In a dict as `logical_count` it is `sglang`'s.

A table is a step. Its rows are the least that explain the counts; phases are not recorded.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moetrace.importers.captured import Counts, Hints
from moetrace.importers.reading.text import text_of
from moetrace.importers.router_logits import is_pickle
from moetrace.importers.sglang_counts import counts_of_steps
from moetrace.importers.sglang_dumps import load_plain, table, whole
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import MAX_LAYERS

# A pickle (protocol opcode and version) whose first object is no dict: dicts of tensors are sglang's.
_NO_DICT = re.compile(rb"/data\.pkl.{0,128}?\x80.[^}]", re.DOTALL)

# One whose dict begins with the name of a load view, or with the number of a layer.
_DICT = re.compile(rb"/data\.pkl.{0,128}?\x80.\}(?:q.)?\(?(?:X.{4}(?:expert_load_view|expert_load)q|[KM])", re.DOTALL)
_VIEWS = ("expert_load_view", "expert_load")
_LISTS = re.compile(rb"\s*\[\s*\[\s*\d")

_MAX_BYTES = 16 << 20  # a table of 61 layers of 384 experts has some 200 kB


class _Table(msgspec.Struct):
    logical_count: list[list[float]]


class _TableOfSteps(msgspec.Struct):
    logical_count: list[list[list[float]]]


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is such JSON, or such a file of torch.save, and not of logits."""
    if first.startswith(b"PK\x03\x04"):
        known = _NO_DICT.search(first) or _DICT.search(first)
        return bool(known) and b"_rebuild_tensor" in first and not is_pickle(first)
    if _LISTS.match(first):
        return True
    return first.lstrip().startswith(b"{") and b'"logical_count"' in first


def read(sources: Sequence[Path], hints: Hints) -> list[Counts]:
    """Counts of each file."""
    return [_read(path, hints) for path in sources]


def _read(path: Path, hints: Hints) -> Counts:
    with path.open("rb") as file:
        archive = file.read(2) == b"PK"
    counts, layers = _tensor(path) if archive else (_json(path), None)
    hints.reading(path.stat().st_size)
    facts: dict[str, Any] = {"format": "counts-table", "engine": "not recorded"}
    _ask_about_axes(path, counts, hints)
    found = counts_of_steps(str(path), len(counts), counts.shape[1:], lambda at: counts[at], facts, hints, (path,))
    return found if layers is None else found._replace(layer_index=layers[found.layer_index])


def _ask_about_axes(path: Path, counts: np.ndarray, hints: Hints) -> None:
    """Say if counts [steps, layers, experts] look like [experts, layers]: all tokens go through each layer."""
    layers, experts = counts.sum((0, 2)), counts.sum((0, 1))
    if experts.size > 1 and (experts == experts[0]).all() and not (layers == layers[0]).all():
        hints.note(
            f"{path}: each of its {experts.size} columns adds up to {int(experts[0]):,}, but its {layers.size} rows do "
            f"not agree: if the rows are experts, transpose the table to [layers, experts]."
        )


def _tensor(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Counts [1, layers, experts], and the numbers of the layers if the file says them."""
    value = load_plain(path)
    if isinstance(value, dict):
        if name := next((name for name in _VIEWS if name in value), None):
            return table(f"{path}: {name}", value[name]), None
        return _by_layer(path, value)
    axes = getattr(value, "ndim", 0)
    if axes != 2:
        what = f"a tensor of {axes} axes" if axes else f"a {type(value).__name__}"
        raise MoetraceError(
            f"{path} holds {what}, not counts [layers, experts]: save {{'logical_count': tensor}} of [steps, layers, "
            f"experts], or the sum over the steps."
        )
    return table(f"{path}: its tensor", value), None


def _by_layer(path: Path, value: dict[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The same of a dict with a tensor [experts] for each number of a layer."""
    if not all(type(layer) is int and 0 <= layer < MAX_LAYERS for layer in value):
        raise MoetraceError(f"{path} holds a dict whose keys are not numbers of layers, nor logical_count.")
    layers = sorted(value)
    claimed = sum(getattr(tensor, "nbytes", 0) for tensor in value.values())
    if claimed > path.stat().st_size:  # a pickle may name one tensor any number of times
        raise MoetraceError(f"{path}: its layers claim {claimed} bytes, but the file has {path.stat().st_size}.")
    rows = [table(f"{path}: layer {layer}", value[layer], axes=1)[0] for layer in layers]
    if len({row.size for row in rows}) != 1:
        raise MoetraceError(f"{path}: its layers have not equally many experts.")
    return np.concatenate(rows)[None], np.array(layers)


def _json(path: Path) -> np.ndarray:
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise MoetraceError(f"{path} has {size} bytes, but such counts need at most {_MAX_BYTES}.")
    text = text_of(path)
    try:
        counts = _decoded(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MoetraceError(f"{path} is not as expected: {str(error).rstrip('.')[:200]}.") from None
    except ValueError:  # NumPy's, of lists of different lengths
        raise MoetraceError(f"{path}: the layers of logical_count have not equally many experts.") from None
    if not counts.size:
        raise MoetraceError(f"{path}: logical_count is empty.")
    return whole(f"{path}: logical_count", counts if counts.ndim == 3 else counts[None])


def _decoded(text: bytes) -> np.ndarray:
    """Counts float64 [layers, experts] or [steps, layers, experts]."""
    if _LISTS.match(text):
        return np.array(msgspec.json.decode(text, type=list[list[float]]), np.float64)
    try:
        return np.array(msgspec.json.decode(text, type=_Table).logical_count, np.float64)
    except msgspec.ValidationError as error:
        if not str(error).startswith("Expected `float`, got `array`"):
            raise
    return np.array(msgspec.json.decode(text, type=_TableOfSteps).logical_count, np.float64)
