"""Expert popularity that Fiddler counts: a JSON object with total_input_tokens and expert_popularity [layers][experts].

`benchmarks/popularity.py` (commit 341ef744) writes one for each subject of MMLU. total_input_tokens are the words of
the prompts, split at blanks, not tokens, which follow from the counts: each layer routes every token to top_k experts,
so that all layers count alike. Fiddler runs Mixtral 8x7B, with a top_k of 2, unless the user says otherwise.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from moetrace.importers.captured import Counts, Hints
from moetrace.importers.reading.text import text_of
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import MIXED, check_sizes

TOP_K = 2
_MAX_BYTES = 16 << 20
_MAX_COUNT = 1 << 40


class _Popularity(msgspec.Struct):
    total_input_tokens: int
    expert_popularity: list[list[int]]


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is such an object."""
    return first.lstrip().startswith(b"{") and b'"expert_popularity"' in first


def read(sources: Sequence[Path], hints: Hints) -> list[Counts]:
    """One step of counts a file."""
    return [_read(path, hints) for path in sources]


def _read(path: Path, hints: Hints) -> Counts:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise MoetraceError(f"{path} has {size} bytes, but such counts need at most {_MAX_BYTES}.")
    hints.reading(size)
    try:
        said = msgspec.json.decode(text_of(path), type=_Popularity)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MoetraceError(f"{path} is not as expected: {str(error).rstrip('.')[:200]}.") from None
    rows = said.expert_popularity
    if not rows or not rows[0] or len(set(map(len, rows))) > 1:
        raise MoetraceError(f"{path}: the layers of expert_popularity have no experts, or not equally many.")
    if not all(0 <= count < _MAX_COUNT for layer in rows for count in layer):
        raise MoetraceError(f"{path}: expert_popularity holds a number that is not 0 to {_MAX_COUNT - 1}.")
    counts = np.array(rows, np.int64)
    top_k = hints.top_k or TOP_K
    layers, num_experts = counts.shape
    check_sizes(str(path), num_experts, top_k, layers, 1, 1)
    total = counts.sum(axis=1)
    if (uneven := total != total[0]).any():
        layer = int(uneven.argmax())
        raise MoetraceError(f"{path}: layer {layer} counts {total[layer]} choices, but layer 0 {total[0]}.")
    if total[0] == 0 or total[0] % top_k:
        raise MoetraceError(f"{path}: each layer counts {total[0]} choices, which are no tokens of {top_k} choices.")
    return Counts(
        model="mixtral-8x7b" if (layers, num_experts, top_k) == (32, 8, TOP_K) else "",
        num_experts=num_experts,
        top_k=top_k,
        layer_index=np.arange(layers),
        rows=total[:1] // top_k,
        phase=np.array([MIXED], np.uint8),
        facts={"format": "fiddler", "engine": "Fiddler", "prompt_words": said.total_input_tokens},
        parts=lambda: iter([counts[None]]),
        sources=(path,),
    )
