"""The data that `moetrace export` writes beside the rows of a Parquet file, in its footer under the key `moetrace`, as
JSON.

The rows hold only choices that were made: how many experts and slots there are, layers in which nobody chose, and sizes
of experts stand here.
"""

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import MAX_EXPERTS, MAX_LAYERS

KEY = "moetrace"
MOST_SIZES = 1 << 17  # numbers of bytes of experts, that fit a footer; 61 layers of 384 experts have 23,424
_Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_EXPERTS)]
_Bytes = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class ToldByFooter(msgspec.Struct):
    """The trace of which the rows are."""

    num_experts: _Count
    top_k: _Count
    layer_index: list[Annotated[int, msgspec.Meta(ge=0, lt=MAX_LAYERS)]]
    model: str = ""
    facts: dict[str, str] = {}
    layer_experts: list[_Count] | None = None
    expert_bytes: list[_Bytes] | None = None  # of each layer, or of each expert of each layer

    @property
    def sizes(self) -> np.ndarray | None:
        """Bytes of an expert, int64 [layers] or [layers, experts]."""
        if self.expert_bytes is None:
            return None
        sizes = np.array(self.expert_bytes)
        return sizes if sizes.size == len(self.layer_index) else sizes.reshape(-1, self.num_experts)


def told_by_footer(path: Path, footer: bytes | None) -> ToldByFooter | None:
    """The content of the footer, None if it is not of `moetrace export`. Raises MoetraceError if it is inconsistent."""
    if footer is None:
        return None
    try:
        told = msgspec.json.decode(footer, type=ToldByFooter)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MoetraceError(f"{path}: its footer is damaged: {str(error)[:200]}.") from None
    index = np.array(told.layer_index, np.int64)
    if (
        not index.size
        or (np.diff(index) <= 0).any()
        or (told.layer_experts is not None and len(told.layer_experts) != index.size)
        or (told.expert_bytes is not None and len(told.expert_bytes) not in (index.size, index.size * told.num_experts))
    ):
        raise MoetraceError(f"{path}: its footer is damaged: its layers do not fit together.")
    return told
