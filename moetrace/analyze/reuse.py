"""Reuse: how many tokens pass until an expert is chosen again, and what an LRU cache of any capacity would hit."""

from typing import NamedTuple

import numpy as np

from moetrace.engine.compile import kernel

DISTANCES = 1 << 14  # reuse distances are told apart up to here; the last entry counts those beyond


class Reuse(NamedTuple):
    """What is known of each layer so far; feed it rows with `add`.

    Stack distances are Mattson's (Mattson et al. 1970): how many other experts of the layer were accessed since the
    last access of this one. An LRU cache of C experts hits exactly the accesses of a stack distance below C, so one
    pass gives all capacities. Accesses follow one another, row by row and within a row in the order of its slots.
    """

    stack: np.ndarray  # int64 [L, E]: accesses by stack distance
    distance: (
        np.ndarray
    )  # int64 [L, DISTANCES + 1]: accesses by the rows since the expert's last choice; 0 = twice in a row
    total: np.ndarray  # int64 [L]: sum of these distances
    accesses: np.ndarray  # int64 [L]
    rank: np.ndarray  # uint16 [L, E]: place of each expert in the LRU stack
    last: np.ndarray  # int64 [L, E]: row of its last choice, -1 if there was none
    rows: np.ndarray  # int64 [L]: rows so far that made choices in the layer


def no_reuse(layers: int, experts: int) -> Reuse:
    """Return what is known before the first row."""
    return Reuse(
        np.zeros((layers, experts), np.int64),
        np.zeros((layers, DISTANCES + 1), np.int64),
        np.zeros(layers, np.int64),
        np.zeros(layers, np.int64),
        np.tile(np.arange(experts, dtype=np.uint16), (layers, 1)),
        np.full((layers, experts), -1, np.int64),
        np.zeros(layers, np.int64),
    )


def add(reuse: Reuse, layer: int, ids: np.ndarray, order: np.ndarray) -> None:
    """Feed the next rows of a layer: ids uint16 [n, k] in the order `order` int32 [n]."""
    of_layer = (array[layer] for array in (reuse.stack, reuse.distance, reuse.rank, reuse.last))
    reuse.rows[layer], total, accesses = _access(ids, order, reuse.rows[layer], *of_layer)
    reuse.total[layer] += total
    reuse.accesses[layer] += accesses


def hit_curve(reuse: Reuse, layer: int) -> np.ndarray:
    """Return the hit rate of an LRU cache of C = 1..E experts, float64 [E]; first accesses miss."""
    accesses = reuse.accesses[layer]
    return np.cumsum(reuse.stack[layer]) / accesses if accesses else np.full(reuse.stack.shape[1], np.nan)


def quantile(reuse: Reuse, layer: int, share: float) -> float:
    """Return the least distance that `share` of the layer's reuses do not exceed, at most DISTANCES; NaN for none."""
    below = np.cumsum(reuse.distance[layer])
    return float(np.searchsorted(below, share * below[-1])) if below[-1] else np.nan


def share_within(reuse: Reuse, layer: int, distance: int) -> float:
    """Return which share of the reuses come within so many rows; NaN if nothing is reused."""
    count = reuse.distance[layer]
    return float(count[: distance + 1].sum() / count.sum()) if count.any() else np.nan


def mean_distance(reuse: Reuse, layer: int) -> float:
    """Return the mean reuse distance in rows; NaN if nothing is reused."""
    reuses = reuse.distance[layer].sum()
    return float(reuse.total[layer] / reuses) if reuses else np.nan


@kernel(inline=False)
def _access(ids, order, rows, stack, distance, rank, last):
    """Access the experts of the rows of one layer; return rows so far, sum of the distances, accesses.

    Instead of a list, each expert has its place in the stack: those above the one accessed move down by one. That is
    one comparison and addition for each expert, which the compiler does for a whole vector register at a time.
    """
    total = accesses = 0
    for t in range(order.size):
        row = ids[order[t]]
        present = 0
        for slot in range(row.size):
            expert = row[slot]
            if expert == 65535:
                continue
            present = 1
            accesses += 1
            place = rank[expert]
            for other in range(rank.size):
                rank[other] += np.uint16(rank[other] < place)
            rank[expert] = 0
            if last[expert] >= 0:
                gap = rows - last[expert]
                total += gap
                distance[min(gap, distance.size - 1)] += 1
                stack[place] += 1
            last[expert] = rows
        rows += present
    return rows, total, accesses
