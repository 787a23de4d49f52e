"""Logs of mbolt's patch of llama.cpp, as `moetrace.importers.mbolt` describes them."""

import struct
from pathlib import Path

import numpy as np

from support.writers import Sample, routing


def log(passes: list[np.ndarray], layers: list[int], num_experts: int, last: bool = True) -> bytes:
    """A log of passes [tokens, layers, k]; of the `last` layer, the last token of each only."""
    data = [b"MBLT", struct.pack("<2I", 1, num_experts)]
    for ids in passes:
        for entry, layer in enumerate(layers):
            own = ids[-1:, entry] if last and entry == len(layers) - 1 else ids[:, entry]
            data += [struct.pack("<3I", layer, own.shape[1], len(own)), own.astype("<i4").tobytes()]
    return b"".join(data)


def samples(folder: Path) -> list[Sample]:
    one, two = folder / "a.mbolt", folder / "b.mbolt"
    one.write_bytes(log([routing(n, 3, 2, 8, n) for n in (5, 1, 1, 4, 1)], [0, 1, 2], 8))
    two.write_bytes(log([routing(n, 2, 4, 300, n) for n in (2, 1)], [3, 7], 0, last=False)[:-9])
    return [Sample([one]), Sample([two], {"num_experts": 300})]
