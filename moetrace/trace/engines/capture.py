"""What every importer returns, whatever the format it reads."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

# What `Capture.parts` yields: rows of "experts" and of each optional array, by name.
Part = Mapping[str, np.ndarray]


class Capture(NamedTuple):
    """One source: its rows in time order, and the routing of these rows, part by part."""

    model: str  # as the source calls it
    num_experts: int
    top_k: int
    layer_index: np.ndarray  # uint16 [layers]
    expert_bytes: np.ndarray | None  # int64 [layers] or [layers, experts]
    request: np.ndarray  # integers [rows], any numbering
    position: np.ndarray  # integers [rows]
    phase: np.ndarray  # uint8 [rows]: 0 prefill, 1 decode
    optional: tuple[str, ...]  # of "gates", "token", "recorded"
    facts: dict[str, Any]  # for the trace's `source`: engine, quantization, licence, ...; no path, no clock time
    parts: Callable[[], Iterator[Part]]
