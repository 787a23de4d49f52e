"""`mixed` (TriMoE): each expert whole on its `ep` unit or on another one, or spread over all units, as a file says."""

import numpy as np

from moetrace.engine.placement import Placing, round_robin
from moetrace.spec.choices import Placement
from moetrace.spec.errors import MoetraceError
from moetrace.spec.load import data_lines

HEADER = ["layer", "expert", "unit"]
EVERY = "striped"


def as_laid_out(placing: Placing) -> np.ndarray:
    """Read the layout; a group behind the last unit stands for all of them. Raises MoetraceError that names a line."""
    groups, every = round_robin(placing), placing.units if placing.units > 1 else 0
    if placing.layout is None:
        return groups
    layers, experts = groups.shape
    seen: set[tuple[int, int]] = set()
    for number, cells in data_lines(placing.layout, HEADER):
        cells = [cell.strip() for cell in cells]
        wants = MoetraceError(
            f"{placing.layout}, line {number}: wants a layer below {layers}, an expert below {experts}, and a unit "
            f"below {placing.units} or {EVERY}, as in 0,17,{EVERY}."
        )
        try:
            layer, expert = int(cells[0]), int(cells[1])
            unit = int(cells[2]) if cells[2] != EVERY else every
            units = placing.units if cells[2] != EVERY else every + 1
        except (ValueError, IndexError):
            raise wants from None
        inside = 0 <= layer < layers and 0 <= expert < experts and 0 <= unit < units
        if not inside or len(cells) != len(HEADER):
            raise wants
        if (layer, expert) in seen:
            raise MoetraceError(f"{placing.layout}, line {number}: expert {expert} of layer {layer} is there twice.")
        seen.add((layer, expert))
        groups[layer, expert] = unit
    return groups


RECORD = Placement(
    name="mixed",
    meaning="each expert whole on one unit or spread over all, as a layout's file says",
    hook=as_laid_out,
    parameters=("layout",),
    mixes=True,
    needs_units=True,
    list_order=74,
)
