"""CSV of llama.cpp's moe-trace tools, as `moetrace.importers.llamacpp` describes them."""

from pathlib import Path

import numpy as np

from support.writers import Sample
from support.writers.known import Pass, passes


def choices(passes: list[Pass], layers: list[int]) -> str:
    """`layer,expert`, a line a choice, layer after layer."""
    lines = []
    for one in passes:
        for entry, layer in enumerate(layers):
            lines += [f"{layer},{i}" for ids in one.ids[:, entry].tolist() if ids[0] >= 0 for i in ids]
    return "\n".join(lines) + "\n"


def tokens(passes: list[Pass], layers: list[int]) -> str:
    """`pos,layer,id0,id1,...`; positions of a prompt count back from -1, behind those of the batches before."""
    lines = []
    prompt = decoded = 0
    for one in passes:
        prompt, decoded = (prompt, decoded) if one.prefill else (0, decoded)
        for entry, layer in enumerate(layers):
            rows = [ids for ids in one.ids[:, entry].tolist() if ids[0] >= 0]
            for number, ids in enumerate(rows):
                pos = -(prompt + len(rows) - number) if one.prefill else decoded
                lines.append(",".join(map(str, (pos, layer, *ids))))
        prompt, decoded = (prompt + len(one.ids), 0) if one.prefill else (prompt, decoded + 1)
    return "\n".join(lines) + "\n"


def read_flat(passes: list[Pass], num_experts: int, seed: int = 0) -> list[Pass]:
    """The same where prompts were read as if sorted rows of all experts were contiguous rows of the chosen ones."""
    random = np.random.default_rng(seed)
    found = []
    for one in passes:
        rows, layers, top_k = one.ids.shape
        ids = np.argsort(random.random((layers, rows, num_experts)), axis=2)
        flat = ids.reshape(layers, -1)[:, : rows * top_k].reshape(layers, rows, top_k).transpose(1, 0, 2)
        found.append(Pass(flat, True) if one.prefill else one)
    return found


def samples(folder: Path) -> list[Sample]:
    known = passes([4, 3, 1, 1, 1], 3, 2, 8)
    (folder / "a.csv").write_text(choices(known, [0, 1, 2]))
    (folder / "b.csv").write_text(tokens(known, [0, 1, 2]))
    (folder / "c.csv").write_text(choices(read_flat(known, 8), [3, 4, 5]))
    hints = {"num_experts": 8, "top_k": 2}
    return [Sample([folder / name], hints) for name in ("a.csv", "b.csv", "c.csv")]
