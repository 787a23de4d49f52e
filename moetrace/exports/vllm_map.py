"""An expert map for vLLM's `eplb_config.initial_expert_map_path`: for each MoE layer, the expert in each slot.

A list of lists (pull request 49572 at f957c37, not merged when this was written). Layers without experts have no row.
"""

from collections.abc import Callable
from typing import IO

from moetrace.exports.planned import PlanChoice, write_plan
from moetrace.trace.format import Trace


def write(trace: Trace, file: IO[bytes], progress: Callable[[int], object], choice: PlanChoice) -> None:
    """Write the map to `file`."""
    write_plan(trace, file, progress, choice, "vLLM")
