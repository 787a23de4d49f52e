"""Reuse: how many tokens pass until an expert is chosen again, and what an LRU cache of any capacity would hit."""

from typing import NamedTuple

import numpy as np

from moetrace.jit.compile import kernel

DISTANCES = 1 << 14  # the last entry counts all longer reuse distances


class Reuse(NamedTuple):
    """The state of each layer so far; feed it rows with `add` or `add_all`.

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
    rank: np.ndarray  # uint8 or, beyond 256 experts, uint16 [L, E]: place of each expert in the LRU stack
    last: np.ndarray  # int64 [L, E]: row of its last choice, -1 before the first
    rows: np.ndarray  # int64 [L]: rows so far that made choices in the layer


def no_reuse(layers: int, experts: int) -> Reuse:
    """Return the state before the first row."""
    return Reuse(
        np.zeros((layers, experts), np.int64),
        np.zeros((layers, DISTANCES + 1), np.int64),
        np.zeros(layers, np.int64),
        np.zeros(layers, np.int64),
        np.tile(np.arange(experts, dtype=np.uint8 if experts <= 256 else np.uint16), (layers, 1)),
        np.full((layers, experts), -1, np.int64),
        np.zeros(layers, np.int64),
    )


def forget(reuse: Reuse) -> None:
    """Begin with empty caches again, as if no expert had been chosen; counts stay."""
    reuse.rank[:] = np.arange(reuse.rank.shape[1])
    reuse.last[:] = -1


def add(reuse: Reuse, layer: int, ids: np.ndarray, order: np.ndarray) -> None:
    """Feed the next rows of one layer: ids uint16 [n, k], of which `order` int32 [m] says which to look at when.

    `add_all` is faster where all layers are at hand.
    """
    place, unused = np.empty((2, order.size, ids.shape[1]), reuse.rank.dtype)
    _move(ids, ids, order, reuse.rank[layer], reuse.rank[layer].copy(), place, unused)
    _record(reuse, layer, ids, order, place)


def add_all(reuse: Reuse, ids: np.ndarray, order: np.ndarray) -> None:
    """Feed the next rows of all layers: ids uint16 [L, n, k], in an `order` as `add` takes it."""
    layers, _, k = ids.shape
    one_place, other_place = np.empty((2, order.size, k), reuse.rank.dtype)
    for layer in range(0, layers - 1, 2):
        other = layer + 1
        _move(ids[layer], ids[other], order, reuse.rank[layer], reuse.rank[other], one_place, other_place)
        _record(reuse, layer, ids[layer], order, one_place)
        _record(reuse, other, ids[other], order, other_place)
    if layers % 2:
        add(reuse, layers - 1, ids[layers - 1], order)


def _record(reuse: Reuse, layer: int, ids: np.ndarray, order: np.ndarray, place: np.ndarray) -> None:
    of_layer = (array[layer] for array in (reuse.stack, reuse.distance, reuse.last))
    reuse.rows[layer], total, accesses = _note(ids, order, place, reuse.rows[layer], *of_layer)
    reuse.total[layer] += total
    reuse.accesses[layer] += accesses


def hit_curve(reuse: Reuse, layer: int) -> np.ndarray:
    """Return the hit rate of an LRU cache of C = 1..E experts, float64 [E]; first accesses miss."""
    accesses = reuse.accesses[layer]
    return np.cumsum(reuse.stack[layer]) / accesses if accesses else np.full(reuse.stack.shape[1], np.nan)


def quantile(reuse: Reuse, layer: int, share: float) -> float:
    """Return the least distance that `share` of the layer's reuses do not exceed, at most DISTANCES; NaN for none."""
    below = np.cumsum(reuse.distance[layer])
    enough = np.ceil(share * below[-1] - 1e-9)  # 0.1 * 30 is above 3
    return float(np.searchsorted(below, enough)) if below[-1] else np.nan


def share_within(reuse: Reuse, layer: int, distance: int) -> float:
    """Return the share of the reuses within a number of rows; NaN if nothing is reused."""
    count = reuse.distance[layer]
    return float(count[: distance + 1].sum() / count.sum()) if count.any() else np.nan


def mean_distance(reuse: Reuse, layer: int) -> float:
    """Return the mean reuse distance in rows; NaN if nothing is reused."""
    reuses = reuse.distance[layer].sum()
    return float(reuse.total[layer] / reuses) if reuses else np.nan


@kernel(inline=False)
def _move(one, other, order, one_rank, other_rank, one_place, other_place):
    """Access the experts of two layers, [n, k], in turn: where in its layer's stack each stood goes to place [n, k].

    Instead of a list, each expert has its place in the stack, and those above the accessed one move down by one: one
    comparison and addition for each expert, done for a vector register of them at a time. An access waits for the
    stores of the one before it; two layers at once hide that (8.1 ns an access of 128 experts alone, 4.4 together).
    """
    for t in range(order.size):
        for slot in range(one.shape[1]):
            a, b = one[order[t], slot], other[order[t], slot]
            a_place = one_rank[a] if a != 65535 else one_rank.dtype.type(0)
            b_place = other_rank[b] if b != 65535 else other_rank.dtype.type(0)
            for expert in range(one_rank.size):
                one_rank[expert] += one_rank[expert] < a_place
                other_rank[expert] += other_rank[expert] < b_place
            if a != 65535:
                one_rank[a] = 0
            if b != 65535:
                other_rank[b] = 0
            one_place[t, slot] = a_place
            other_place[t, slot] = b_place


@kernel(inline=False)
def _note(ids, order, place, rows, stack, distance, last):
    """Count the accesses of a layer by stack and by reuse distance; return rows so far, sum of distances, accesses."""
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
            if last[expert] >= 0:
                gap = rows - last[expert]
                total += gap
                distance[min(gap, distance.size - 1)] += 1
                stack[place[t, slot]] += 1
            last[expert] = rows
        rows += present
    return rows, total, accesses
