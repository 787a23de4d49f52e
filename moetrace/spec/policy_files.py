"""Files of numbers that a policy names: the loads of experts, and the set of those that stay."""

from pathlib import Path

import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.spec.load import data_lines, read_table


def load_loads(path: str | Path, layers: int, experts: int) -> np.ndarray:
    """Read the loads of placements `ep-lpt` and `eplb`, and of `remote`: a CSV, a line a layer, a number an expert.

    Returns float64 `[layers, experts]`; raises a MoetraceError that names the line.
    """
    return read_table(path, layers, experts)


def load_static(path: str | Path, layers: int, experts: int) -> np.ndarray:
    """Read the experts of residency `static`: a CSV of lines `layer,expert`, with or without that header.

    Returns int64 `[n, 2]` in the file's order; raises a MoetraceError that names the line.
    """
    pairs: dict[tuple[int, int], None] = {}
    for number, cells in data_lines(path, ("layer", "expert")):
        try:
            layer, expert = (int(cell) for cell in cells)
        except ValueError:
            raise MoetraceError(f"{path}, line {number}: wants a layer and an expert, as in 0,17.") from None
        if not (0 <= layer < layers and 0 <= expert < experts):
            raise MoetraceError(
                f"{path}, line {number}: wants a layer below {layers} and an expert below {experts}, "
                f"got {layer},{expert}."
            )
        if (layer, expert) in pairs:
            raise MoetraceError(f"{path}, line {number}: expert {expert} of layer {layer} is there twice.")
        pairs[layer, expert] = None
    return np.array(list(pairs), np.int64).reshape(-1, 2)
