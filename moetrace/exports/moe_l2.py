"""A router map for moe-l2 (`moe-l2 start --gpu --router-map FILE`, `MOE_L2_ROUTER_FILE`): which experts to pin.

A line a layer, `layer expert1 expert2 ...`, most wanted first (yalun753/moe-l2, moe_l2/cli.py, commit 09781938).
`# EXPERT_TOTAL n` says how many there are: its expert cache has three slots for each, unless MOE_L2_CACHE_SLOTS does.
"""

from collections.abc import Callable
from typing import IO

from moetrace.exports.resident import Counted, KeptChoice, kept, tallied


def write(trace: Counted, file: IO[bytes], progress: Callable[[int], object], choice: KeptChoice) -> None:
    """Write the set to `file`."""
    pairs = kept(trace, choice, tallied(trace, choice, progress).counts)
    file.write(f"# EXPERT_TOTAL {len(pairs)}\n".encode())
    for entry, layer in enumerate(trace.layer_index.tolist()):
        own = pairs[pairs[:, 0] == entry, 1].tolist()
        if own:
            file.write(f"{layer} {' '.join(map(str, own))}\n".encode())
