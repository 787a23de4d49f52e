"""Dumps of SGLang's expert distribution recorder, as `moetrace.importers.sglang` describes them."""

from pathlib import Path

import numpy as np

from support.writers import Sample, routing

SLOTS = 8  # the writer's width for every top_k
# Two replicas of expert 0 in layer 1: nine physical experts of eight logical ones.
MAP = np.array([[3, 1, 2, 0, 4, 5, 6, 7, 7], [0, 2, 1, 3, 5, 4, 7, 6, 0], [7, 6, 5, 4, 3, 2, 1, 0, 0]])
# forward_mode (1 extend, 2 decode, 3 mixed, 4 idle) and segments: request, first position, rows.
PASSES = [
    (1, [(0, 0, 4), (1, 0, 2)]),
    (2, [(0, 4, 1), (1, 2, 1)]),
    (3, [(2, 0, 9), (0, 5, 1), (1, 3, 1)]),
    (4, []),
    (1, [(3, 0, 12)]),
    (1, [(3, 12, 3)]),
    (2, [(0, 6, 1), (1, 4, 1), (2, 9, 1), (3, 15, 1)]),
    (2, [(0, 7, 1), (2, 10, 1), (3, 16, 1)]),
]


def physical(logical: np.ndarray, to_logical: np.ndarray, seed: int = 0) -> np.ndarray:
    """Physical ids of [rows, layers, top_k] logical ones, replicas by lot; -1 stays."""
    random = np.random.default_rng(seed)
    ids = np.full(logical.shape, -1)
    for at in np.ndindex(logical.shape):
        if logical[at] >= 0:
            ids[at] = random.choice(np.flatnonzero(to_logical[at[1]] == logical[at]))
    return ids


def record(number: int, rank: int, mode: int, segments: list, logical: np.ndarray, first_token: int = 0) -> dict:
    """A record of a per_token dump: `logical` [rows, layers, top_k] of the segments in turn."""
    import torch

    ids = physical(logical, MAP, number).transpose(1, 0, 2)
    slots = np.full((*ids.shape[:2], SLOTS), -1, np.int32)
    slots[:, :, : ids.shape[2]] = ids
    counts = np.stack([np.bincount(of_layer[of_layer >= 0], minlength=MAP.shape[1]) for of_layer in slots])
    rows = sum(rows for _, _, rows in segments)
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": list(range(first_token, first_token + rows)),
        "positions": [first + i for _, first, rows in segments for i in range(rows)],
        "extend_seq_lens": [rows for _, _, rows in segments] if mode in (1, 3) else None,
        "forward_mode": mode,
        "topk_ids_of_layer": torch.from_numpy(slots),
        "misc_objects": [],
        "global_physical_count": torch.from_numpy(counts.astype(np.int32)),
    }


def detailed(path: Path, records: list[dict], to_logical: np.ndarray = MAP) -> Path:
    import torch

    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(to_logical)}, path)
    return path


def per_pass(path: Path, records: list[dict]) -> Path:
    names = ("forward_pass_id", "rank", "gatherer_key", "global_physical_count")
    return detailed(path, [{name: record[name] for name in names} for record in records])


def per_token(
    path: Path, passes: list = PASSES, top_k: int = 2, rank: int = 0, seed: int = 0
) -> tuple[Path, np.ndarray]:
    """Write a dump; return it and the logical ids [rows, 3, top_k] of all its rows."""
    records, found = [], []
    for number, (mode, segments) in enumerate(passes):
        logical = routing(sum(rows for _, _, rows in segments), 3, top_k, 8, 100 * seed + number)
        records.append(record(number + 5, rank, mode, segments, logical, 1000 * rank + 50 * number))
        found.append(logical)
    return detailed(path, records), np.concatenate(found)


def stat(path: Path, counts: np.ndarray) -> Path:
    import torch

    content = {"rank": 0, "logical_count": torch.from_numpy(counts), "average_utilization_rate_over_window": None}
    torch.save(content, path)
    return path


def csv(folder: Path, rank: int, when: float, counts: np.ndarray) -> Path:
    path = folder / f"expert_distribution_rank{rank}_timestamp{when}.csv"
    lines = [f"{layer},{expert},{counts[layer, expert]}" for layer, expert in np.argwhere(counts)]
    path.write_text("layer_id,expert_id,count\n" + "\n".join(lines) + "\n")
    return path


def samples(folder: Path) -> list[Sample]:
    random = np.random.default_rng(0)
    counts = random.integers(0, 5, (4, 3, 8), np.int32)
    counts[2:] = 0
    token = per_token(folder / "expert_distribution_recorder_1.5_0.pt")[0]
    other = per_token(folder / "expert_distribution_recorder_1.5_1.pt", rank=1, seed=1)[0]
    segments = [(0, 0, 4)]
    passes = [per_pass(folder / f"p{r}.pt", [record(1, r, 1, segments, routing(4, 3, 2, 8, r))]) for r in range(2)]
    return [
        Sample([token, other]),
        Sample(passes, {"top_k": 2}),
        Sample([stat(folder / "expert_distribution_recorder_2.5.pt", counts)], {"top_k": 2}),
        Sample([csv(folder, 0, 1.5, counts[0])], {"top_k": 2, "num_experts": 8}),
    ]
