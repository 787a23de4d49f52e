"""Transfers to the GPU before demand (timing model, section 7): a queue that flows beside the layers."""

from typing import NamedTuple

import numpy as np

from moetrace.engine.residency import keep, link_by_age, pool_of
from moetrace.jit.compile import kernel
from moetrace.jit.random import GOLDEN, mix

# Kinds of prefetch (`prefetches/`).
NO_PREFETCH, FROM_PROMPT, ONLINE, ORACLE, BY_WORTH, RELAYOUT = 0, 1, 2, 3, 4, 5

# A transfer is complete when at most this remains, and has begun when more than this has moved: the flow is a fluid,
# and rounds.
DONE_BYTES = 1e-3


class Queue(NamedTuple):
    """Transfers in the order in which they run; ``place[key] = -1`` means not queued.

    An entry that leaves the middle stays in ``key`` and is skipped, as its place is no longer its own.
    """

    weight_bytes: np.ndarray  # float64 [L * E]
    key: np.ndarray  # int32 [2 * L * E]
    ends: np.ndarray  # int64 [4]: first entry, one past the last, complete ones in between, completed ever
    place: np.ndarray  # int32 [L * E]: where in `key` an expert stands
    moved_bytes: np.ndarray  # float64 [L * E]
    late: np.ndarray  # uint8 [L * E]: counted as late already
    target: np.ndarray  # int64 [L * E]: step * L + layer that an `oracle` entry is meant for


HEAD, TAIL, COMPLETE, COMPLETED_EVER = 0, 1, 2, 3


def empty_queue(weight_bytes: np.ndarray) -> Queue:
    """Return an empty queue for the experts of a model, of ``weight_bytes`` float64 [L, E]."""
    cells = weight_bytes.size
    return Queue(
        weight_bytes=weight_bytes.reshape(-1),
        key=np.zeros(2 * cells, np.int32),
        ends=np.zeros(4, np.int64),
        place=np.full(cells, -1, np.int32),
        moved_bytes=np.zeros(cells),
        late=np.zeros(cells, np.uint8),
        target=np.zeros(cells, np.int64),
    )


@kernel
def is_complete(queue, key):
    """Return whether all of an expert's bytes have arrived."""
    return queue.weight_bytes[key] - queue.moved_bytes[key] <= DONE_BYTES


@kernel
def join(queue, key, target):
    """Put an expert at the end of the queue."""
    if queue.ends[TAIL] == queue.key.size:
        _close_up(queue)
    queue.place[key] = queue.ends[TAIL]
    queue.key[queue.ends[TAIL]] = key
    queue.ends[TAIL] += 1
    queue.late[key] = 0
    queue.target[key] = target


@kernel
def _close_up(queue):
    """Move the entries to the front of the queue's room, without those that left."""
    tail = 0
    for at in range(queue.ends[HEAD], queue.ends[TAIL]):
        key = np.int64(queue.key[at])
        if queue.place[key] == at:
            queue.key[tail] = key
            queue.place[key] = tail
            tail += 1
    queue.ends[HEAD] = 0
    queue.ends[TAIL] = tail


@kernel
def leave(queue, key):
    """Take an expert out of the queue; return 1 if some of its bytes had moved, else 0."""
    moved = queue.moved_bytes[key] > DONE_BYTES
    if moved and is_complete(queue, key):
        queue.ends[COMPLETE] -= 1
    queue.place[key] = -1
    queue.moved_bytes[key] = 0.0
    _trim(queue)
    return 1 if moved else 0


@kernel
def note_late(queue, key):
    """Return 1 the first time that an entry is demanded with some of its bytes moved, else 0."""
    if queue.place[key] < 0 or queue.moved_bytes[key] <= DONE_BYTES or queue.late[key]:
        return 0
    queue.late[key] = 1
    return 1


@kernel
def _trim(queue):
    """Let the queue begin with an entry that has not left."""
    head, tail = queue.ends[HEAD], queue.ends[TAIL]
    while head < tail and queue.place[queue.key[head]] != head:
        head += 1
    if head == tail:
        head = tail = 0
    queue.ends[HEAD] = head
    queue.ends[TAIL] = tail


@kernel
def flow(queue, budget_bytes):
    """Let up to ``budget_bytes`` arrive, first come first served; return the bytes that moved."""
    left, moved_bytes = budget_bytes, 0.0
    for at in range(queue.ends[HEAD], queue.ends[TAIL]):
        if left <= 0:
            break
        key = np.int64(queue.key[at])
        if queue.place[key] != at:
            continue
        remaining = queue.weight_bytes[key] - queue.moved_bytes[key]
        if remaining <= DONE_BYTES:
            continue
        step_bytes = min(left, remaining)
        queue.moved_bytes[key] += step_bytes
        left -= step_bytes
        moved_bytes += step_bytes
        if is_complete(queue, key):
            queue.ends[COMPLETE] += 1
            queue.ends[COMPLETED_EVER] += 1
    return moved_bytes


@kernel
def remaining_bytes(queue):
    """Return the bytes in the queue that have yet to arrive."""
    total = 0.0
    for at in range(queue.ends[HEAD], queue.ends[TAIL]):
        key = np.int64(queue.key[at])
        if queue.place[key] == at and not is_complete(queue, key):
            total += queue.weight_bytes[key] - queue.moved_bytes[key]
    return total


@kernel
def admit_complete(queue, cells, cache, tally):
    """Before a layer's ``dense``: keep arrived experts, in queue order, or drop them for lack of room."""
    experts = cells.shape[1]
    at = queue.ends[HEAD]
    while queue.ends[COMPLETE] > 0:
        key = np.int64(queue.key[at])
        if queue.place[key] == at and is_complete(queue, key):
            leave(queue, key)
            if keep(cells, cache, key // experts, key % experts, tally):
                link_by_age(cells, cache, key)
                cache.fresh[key] = 1
            else:
                tally[0].wasted += 1
        at += 1


@kernel
def score_to_beat(cells, cache, layer):
    """Return the least score of a layer's residents. A free slot counts as one of score 0, and so does no resident."""
    experts = cells.shape[1]
    floor, residents = np.inf, 0
    for e in range(experts):
        if cache.resident[layer * experts + e]:
            floor = min(floor, cells[layer, e].score)
            residents += 1
    pool = pool_of(cache, layer)
    return min(floor, 0.0) if residents == 0 or cache.residents[pool] < cache.capacity[pool] else floor


@kernel
def join_by_score(queue, cells, cache, layer, most):
    """``online:m``: after a layer, its best non-resident experts beyond the worst resident one join the queue."""
    experts = cells.shape[1]
    first, floor = layer * experts, score_to_beat(cells, cache, layer)
    for _ in range(most):
        best, score = -1, floor
        for e in range(experts):
            cell = cells[layer, e]
            if cell.score > score and cache.resident[first + e] == 0 and queue.place[first + e] < 0:
                best, score = e, cell.score
        if best < 0:
            break
        join(queue, first + best, 0)


@kernel
def join_ahead(queue, cells, cache, demand, at, now, setting):
    """``oracle:d``: entries whose layer has passed leave; what the next d layers want joins the queue.

    ``at`` is the layer's row in ``demand``, ``now`` the same counted from the start of the trace. An expert that
    stands in the queue already takes the later layer as its own. Returns how many left with some bytes moved.
    """
    layers, experts = cells.shape
    wasted = 0
    for entry in range(queue.ends[HEAD], queue.ends[TAIL]):
        key = np.int64(queue.key[entry])
        if queue.place[key] == entry and queue.target[key] < now:
            wasted += leave(queue, key)
    for ahead in range(1, setting.depth + 1):
        if at + ahead + 1 >= demand.start.size:
            break
        step, layer = divmod(now + ahead, layers)
        for i in range(demand.start[at + ahead], demand.start[at + ahead + 1]):
            expert = np.int64(demand.expert[i])
            key = layer * experts + expert
            if cache.resident[key] == 0 and chance(setting.seed, step, layer, expert) < setting.chance:
                if queue.place[key] < 0:
                    join(queue, key, now + ahead)
                else:
                    queue.target[key] = now + ahead
    return wasted


@kernel
def chance(seed, step, layer, expert):
    """Return a number from 0 to 1 that depends only on the arguments: a chain of splitmix64 steps."""
    x = np.uint64(seed)
    for value in (step, layer, expert):
        x = mix(x + GOLDEN + np.uint64(value))
    return float(x) / 18446744073709551616.0
