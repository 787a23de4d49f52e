"""An expert map for vllm-ascend's `eplb_config.expert_map_path`: for each MoE layer and unit, its experts.

`moe_layer_count`, `layer_list`, `device_list`, `device_expert`, as `expert_file_to_tensor` of
vllm_ascend/eplb/core/eplb_utils.py reads them and `_export_tensor_to_file` of eplb/adaptor/vllm_adaptor.py (commit
0011ce33) writes them. Layers without experts have no entry.
"""

from collections.abc import Callable
from typing import IO

from moetrace.exports.planned import PlanChoice, write_plan
from moetrace.trace.format import Trace


def write(trace: Trace, file: IO[bytes], progress: Callable[[int], object], choice: PlanChoice) -> None:
    """Write the map to `file`."""
    write_plan(trace, file, progress, choice, "vllm-ascend")
