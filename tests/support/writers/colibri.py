"""Routing traces and histories of colibri, as `moetrace.importers.colibri` describes them."""

from pathlib import Path

import numpy as np

from support.writers import Sample, routing
from support.writers.known import Pass, passes


def route_trace(passes: list[Pass], gates: np.ndarray, layers: list[int]) -> str:
    """`<call> <row> <layer> <id>:<gate> ...`, gates [rows, layers, top_k]; absent ids are left out."""
    lines = []
    call = first = 0
    for one in passes:
        for entry, layer in enumerate(layers):
            for row, ids in enumerate(one.ids[:, entry].tolist()):
                pairs = zip(ids, gates[first + row, entry].tolist(), strict=True)
                pairs = [f"{expert}:{gate:.4f}" for expert, gate in pairs if expert >= 0]
                lines.append(" ".join([f"{call} {row} {layer}", *pairs]))
            call += 1
        first += len(one.ids)
    return "\n".join(lines) + "\n"


def fnv(name: str) -> int:
    value = 0x811C9DC5
    for letter in name.encode():
        value = (value ^ letter) * 0x01000193 % 2**32
    return value


def usage(counts: dict[int, np.ndarray], layers: int, experts: int, engine: str | None = "olmoe") -> str:
    """`<layer> <expert> <count>` of counts above 0; headers unless `engine` is None."""
    lines = [] if engine is None else [f"-1 {layers} {experts}", f"-2 1 {fnv(engine)}"]
    for layer, row in counts.items():
        lines += [f"{layer} {expert} {count}" for expert, count in enumerate(row.tolist()) if count]
    return "\n".join(lines) + "\n"


def samples(folder: Path) -> list[Sample]:
    known = [one._replace(ids=np.abs(one.ids)) for one in passes([4, 1, 1], 3, 2, 8)]
    for one in known:
        one.ids[:-1, -1] = [3, 5]
    (folder / "a.txt").write_text(route_trace(known, np.full((6, 3, 2), 0.5), [1, 2, 5]))
    counts = {layer: np.bincount(routing(9, 1, 2, 8, layer).ravel(), minlength=8) for layer in (1, 2, 4)}
    (folder / "b.coli_usage").write_text(usage(counts, 5, 8))
    (folder / "c.coli_usage").write_text(usage(counts, 5, 8, None))
    hints = {"num_experts": 8, "top_k": 2}
    return [Sample([folder / name], hints) for name in ("a.txt", "b.coli_usage", "c.coli_usage")]
