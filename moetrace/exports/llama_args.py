"""Arguments of llama.cpp that keep the experts of some layers in main memory: `--n-cpu-moe N` or `-ot PATTERN=CPU`.

llama.cpp moves whole layers: `-ot` takes a pattern of tensor names, and `--n-cpu-moe N` is that of the first N layers
(common/arg.cpp; the pattern of experts is `LLM_FFN_EXPS_REGEX` of common/common.h). N slots hold N / experts layers:
those of which a step reads the most experts, and of equal ones the later. A set keeps the layers that it holds whole.
Layers that
a trace does not hold would stay on the GPU (`-ot`) or leave it (`--n-cpu-moe`) unseen: a part of a model is refused.
The file is one line without spaces inside an argument, for `llama-server $(cat FILE) ...`.
"""

from collections.abc import Callable
from typing import IO

import numpy as np

from moetrace.exports.resident import Counted, KeptChoice, check_whole, kept, tallied
from moetrace.spec.errors import UsageError

_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"


def write(trace: Counted, file: IO[bytes], progress: Callable[[int], object], choice: KeptChoice) -> None:
    """Write the arguments to `file`; nothing but a line end if all layers are kept on the GPU."""
    if choice.layer_slots is not None:
        raise UsageError("llama.cpp keeps whole layers: give --slots N or --set FILE.csv instead of --layer-slots.")
    check_whole(trace, "llama-args says of all layers of a model where they are")
    found = tallied(trace, choice, progress)
    on_gpu = np.zeros(trace.layers, bool)
    if choice.holds_set:
        pairs = kept(trace, choice, found.counts)
        on_gpu[:] = np.bincount(pairs[:, 0], minlength=trace.layers) == trace.num_experts
        if len(pairs) and not on_gpu.any():
            raise UsageError(
                f"the set of {len(pairs):,} experts holds no layer whole, and llama.cpp keeps whole layers: "
                f"give --slots N or a set of whole layers."
            )
    else:
        heaviest = np.lexsort((-np.arange(trace.layers), -found.active))
        on_gpu[heaviest[: (choice.slots or 0) // trace.num_experts]] = True
    cpu = trace.layer_index[~on_gpu].tolist()
    first = trace.layer_index[: len(cpu)].tolist()
    if not cpu:
        line = ""
    elif cpu == first:
        line = f"--n-cpu-moe {cpu[-1] + 1}"
    else:
        line = f"-ot blk\\.({'|'.join(map(str, cpu))}){_EXPERTS}=CPU"
    file.write(f"{line}\n".encode())
