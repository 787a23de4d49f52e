"""A NumPy file a layer, as `moetrace.importers.npy_layers` describes them."""

from pathlib import Path

import numpy as np

from support.writers import Sample, routing


def write(folder: Path, ids: np.ndarray, layers: list[int], name: str = "layer_{}.npy") -> list[Path]:
    """Files of ids [rows, layers, top_k]."""
    paths = [folder / name.format(layer) for layer in layers]
    for entry, path in enumerate(paths):
        np.save(path, np.ascontiguousarray(ids[:, entry]))
    return paths


def samples(folder: Path) -> list[Sample]:
    plain = write(folder, routing(9, 3, 2, 8).astype(np.uint8), [0, 1, 2])
    wide = write(folder, routing(5, 2, 3, 300)[:, :, None].astype(np.int64), [3, 12], "moe_layer_{}_ids.npy")
    single = folder / "model.layers.5.mlp.npy"
    np.save(single, routing(7, 1, 1, 8)[:, 0, 0])
    return [
        Sample(plain, {"num_experts": 8}),
        Sample(wide, {"num_experts": 300}),
        Sample([single], {"num_experts": 8}),
    ]
