"""A placement manifest for experts4bit (`e4b-placement/1`): which experts are in VRAM, in main memory, on NVMe.

pjordanandrsn/experts4bit-qlora, `engines/placement.py`: `tiers` must name each [layer, expert] once, `geometry` says
how many there are; `masses` are the shares of choices. Fields that only its solver knows (hashes of a calibration) are
null. It numbers the modules with experts from 0, in their order, without the dense layers between them:
`enable_hybrid_tier` of `engines/hybrid.py` takes them so unless its `layers` says otherwise (as stored in November
2026). A trace of part of a model can't be numbered so.
"""

import json
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from moetrace.exports.resident import Counted, KeptChoice, check_whole, hottest, kept, tallied

_ORDERS = {"gpu": "gnf4-fused-grouped/1", "cpu": "gnf4-native-locked-tree/1"}  # what its placements of version 1 have


def write(trace: Counted, file: IO[bytes], progress: Callable[[int], object], choice: KeptChoice) -> None:
    """Write the set as the VRAM tier, and the hottest others as that of main memory, all of them by default."""
    check_whole(trace, "e4b-placement numbers all of a model from 0")
    counts = tallied(trace, choice, progress).counts
    vram = kept(trace, choice, counts)
    taken = np.zeros(counts.shape, bool)
    taken[vram[:, 0], vram[:, 1]] = True
    rest = np.array([pair for pair in hottest(counts).tolist() if not taken[tuple(pair)]], np.int64).reshape(-1, 2)
    room = len(rest) if choice.dram_slots is None else choice.dram_slots
    tiers = {"vram": vram, "dram": rest[:room], "nvme": rest[room:]}
    share = {name: float(counts[own[:, 0], own[:, 1]].sum() / counts.sum()) for name, own in tiers.items()}
    sizes = set() if trace.expert_bytes is None else set(trace.expert_bytes.ravel().tolist())
    manifest: dict[str, Any] = {
        "schema": "e4b-placement/1",
        "geometry": {
            "n_layers": trace.layers,
            "n_experts": trace.num_experts,
            "bytes_per_expert": sizes.pop() if len(sizes) == 1 else None,
        },
        "profile": {"kind": "measured", "sha256": None},
        "calibration_sha256": None,
        "reduction_order_ids": _ORDERS,
        "tiers": {name: own.tolist() for name, own in tiers.items()},
        "masses": {f"{name}_frac": mass for name, mass in share.items()},
    }
    file.write((json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())
