"""Expert statistics of TensorRT-LLM, as `moetrace.importers.trtllm` describes them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from support.writers import Sample, routing

# (iteration, layer) -> counts [experts], or ids [tokens, top_k].
Tensors = Mapping[tuple[int, int], np.ndarray]


def save(folder: Path, num_experts: int, top_k: int, ranks: list[Tensors], raw: bool = False) -> list[Path]:
    """Write meta_info.json and a file a rank into `folder`."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    files = [folder / "meta_info.json"]
    files[0].write_text(json.dumps({"num_experts": num_experts, "num_experts_per_token": top_k}))
    for number, rank in enumerate(ranks):
        files.append(folder / f"rank{number}{'_raw' * raw}.safetensors")
        dtype = np.int32 if raw else np.int64
        save_file({f"{i}_{layer}": array.astype(dtype) for (i, layer), array in rank.items()}, files[-1])
    return files


def counted(ids: np.ndarray, num_experts: int) -> np.ndarray:
    return np.bincount(ids.ravel(), minlength=num_experts)


def samples(folder: Path) -> list[Sample]:
    cells = [(iteration, layer) for iteration in (7, 8) for layer in (3, 4)]
    ids = [{cell: routing(5, 1, 2, 8, 10 * rank + n)[:, 0] for n, cell in enumerate(cells)} for rank in range(2)]
    counts = [{cell: counted(array, 8) for cell, array in rank.items()} for rank in ids]
    return [
        Sample(save(folder / "counts", 8, 2, counts)),
        Sample(save(folder / "raw", 8, 2, ids, raw=True)),
        Sample(save(folder / "one", 8, 2, counts[:1])[1:], {"num_experts": 8, "top_k": 2}),
    ]
