"""Event traces of moe-cache-eval, as `moetrace.importers.moe_cache_eval` describes them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from support.writers import Sample, routing


def save(
    folder: Path, steps: list[tuple[int, int, np.ndarray, np.ndarray]], num_experts: int, manifest: bool = True
) -> list[Path]:
    """Write the events of steps, each (request, phase, ids and gates [tokens, layers, top_k]); ids of -1 count not."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    event: dict[str, list[Any]] = {name: [] for name in EVENT}
    access: dict[str, list[Any]] = {name: [] for name in ACCESS}
    offsets = [0]
    for cycle, (request, phase, ids, gates) in enumerate(steps):
        for layer in range(ids.shape[1]):
            chosen = ids[:, layer].ravel()
            mass = np.bincount(chosen[chosen >= 0], gates[:, layer].ravel()[chosen >= 0], num_experts)
            counts = np.bincount(chosen[chosen >= 0], minlength=num_experts)
            active = np.flatnonzero(counts)
            values = (request, cycle, cycle, phase, layer, len(ids))
            for name, value in zip(EVENT, values, strict=True):
                event[name].append(value)
            for name, array in zip(ACCESS, (active, counts[active], mass[active]), strict=True):
                access[name] += array.tolist()
            offsets.append(len(access["expert_ids"]))
    tensors = {name: np.array(values, DTYPES[name]) for name, values in (event | access).items()}
    files = [folder / "events.safetensors"]
    metadata = {"schema": "moe-controller-events", "schema_version": "1"}
    save_file(tensors | {"offsets": np.array(offsets, np.int64)}, files[0], metadata)
    if manifest:
        files.append(folder / "manifest.json")
        _, layers, top_k = steps[0][2].shape
        model = {"id": "org/Some-MoE", "commit": "0" * 40, "model_type": "x", "num_layers": layers}
        digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
        artifacts = {"events": {"path": files[0].name, "sha256": digest, "bytes": files[0].stat().st_size}}
        said = {"schema_version": 1, "status": "complete", "artifacts": artifacts}
        said["model"] = model | {"num_experts": num_experts, "top_k": top_k}
        files[1].write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
    return files


EVENT = ("request_indices", "scheduler_steps", "forward_cycles", "phases", "layer_ids", "token_counts")
ACCESS = ("expert_ids", "assignment_counts", "gate_mass")
DTYPES = dict.fromkeys((*EVENT, *ACCESS), np.int32)
DTYPES |= {"phases": np.uint8, "layer_ids": np.int16, "expert_ids": np.int16, "gate_mass": np.float32}


def samples(folder: Path) -> list[Sample]:
    gates = np.full((4, 9, 2), 0.5)
    prompt = [(seed // 3, 0, routing(4, 9, 2, 8, seed), gates) for seed in range(9)]
    one = [(-1, 1, routing(1, 9, 2, 8, seed), gates[:1]) for seed in range(30)]
    hints = {"num_experts": 8, "top_k": 2}
    return [
        Sample(save(folder / "prompt", prompt, 8)[:1], hints),
        Sample(save(folder / "decode", one, 8, manifest=False), hints),
    ]
