"""Experts wanted by the prompts: the data-set-free residency ``prefill`` (timing model, section 7; arXiv 2601.03992).

Nothing is known but the prompt: the experts that a request's prefill chose most are the ones to hold for its decode.
"""

from typing import NamedTuple

import numpy as np

from moetrace.engine.prefetch import HEAD, TAIL, join, leave, restore
from moetrace.engine.residency import link
from moetrace.engine.schedule import places_of
from moetrace.jit.compile import kernel
from moetrace.trace.schema import DECODE, PREFILL


class Prompts(NamedTuple):
    """Counts of the requests that are under way, and when each of them ends."""

    counts: np.ndarray  # int32 [places, L * E]: of each request under way
    total: np.ndarray  # int64 [L * E]: of all of them
    place: np.ndarray  # int32 [requests]: where a request's counts stand
    order: np.ndarray  # int64 [requests]: requests by their last step, those whose prefill ends there last
    last_step: np.ndarray  # int64 [requests]
    last_prefill_step: np.ndarray  # int64 [requests], -1 = none
    cursor: np.ndarray  # int64 [1]: how many of `order` are over
    kept: np.ndarray  # float64 [L * E]: moved bytes of queued experts, while the queue is rebuilt


def prompts_of(last_step: np.ndarray, first_prefill: np.ndarray, last_prefill: np.ndarray, cells: int) -> Prompts:
    """Return the books for requests whose steps are given (int64 [requests], -1 = no prefill)."""
    place, places = places_of(first_prefill, last_step)
    return Prompts(
        counts=np.zeros((places, cells), np.int32),
        total=np.zeros(cells, np.int64),
        place=place,
        order=np.lexsort((last_prefill == last_step, last_step)),
        last_step=last_step,
        last_prefill_step=last_prefill,
        cursor=np.zeros(1, np.int64),
        kept=np.zeros(cells),
    )


def emptied(prompts: Prompts) -> Prompts:
    """Return books of the same requests in which nothing is counted yet."""
    cells = prompts.total.size
    return prompts._replace(
        counts=np.zeros(prompts.counts.shape, np.int32),
        total=np.zeros(cells, np.int64),
        cursor=np.zeros(1, np.int64),
        kept=np.zeros(cells),
    )


@kernel
def count_prompts(prompts, batch, s, num_experts):
    """Count the choices of the prefill rows of the block's step ``s``; of a lone prompt's, by its demand."""
    begin, stop = batch.offset[s], batch.offset[s + 1]
    layers = batch.experts.shape[1]
    if batch.steps.phase[s] == DECODE:
        return
    alone = True
    for row in range(begin, stop):
        alone &= (batch.row_phase[row] == PREFILL) & (batch.request[row] == batch.request[begin])
    if alone:
        count = prompts.counts[prompts.place[batch.request[begin]]]
        for at in range(s * layers, (s + 1) * layers):
            first = (at - s * layers) * num_experts
            for i in range(batch.demand.start[at], batch.demand.start[at + 1]):
                count[first + batch.demand.expert[i]] += batch.demand.rows[i]
                prompts.total[first + batch.demand.expert[i]] += batch.demand.rows[i]
        return
    for row in range(begin, stop):
        if batch.row_phase[row] == PREFILL:
            _count_row(prompts, batch.experts[row], prompts.place[batch.request[row]], num_experts)


@kernel
def _count_row(prompts, experts, place, num_experts):
    """Count the choices, uint16 [L, k], of a prefill row for the request whose counts stand at ``place``."""
    for layer in range(experts.shape[0]):
        for slot in range(experts.shape[1]):
            e = np.int64(experts[layer, slot])
            if e < num_experts:
                prompts.counts[place, layer * num_experts + e] += 1
                prompts.total[layer * num_experts + e] += 1


@kernel
def forget_ended(prompts, step, just_prefilled):
    """Forget requests whose last step this is; those whose prefill ends in it only if ``just_prefilled``."""
    while prompts.cursor[0] < prompts.order.size:
        request = prompts.order[prompts.cursor[0]]
        if prompts.last_step[request] > step or (prompts.last_prefill_step[request] == step and not just_prefilled):
            return
        prompts.cursor[0] += 1
        if prompts.place[request] >= 0:
            count = prompts.counts[prompts.place[request]]
            for key in range(count.size):
                prompts.total[key] -= count[key]
                count[key] = 0


@kernel(inline=False)
def want_most_frequent(cells, total, begin, stop, most):
    """Want the up to ``most`` most counted of the keys ``begin`` to ``stop``; ties: lower key; never a count of 0.

    Wanted experts may be kept and are never evicted; unwanted ones are evicted and never kept.
    """
    experts, counts = cells.shape[1], total[begin:stop]
    highest = 0
    for i in range(counts.size):
        highest = max(highest, counts[i])
    # Counts from `threshold` on are wanted, all of them: found by halving, as counting many at once is cheap.
    low, threshold, above = 1, highest + 1, 0
    while low < threshold:
        middle, found = (low + threshold) >> 1, 0
        for i in range(counts.size):
            found += counts[i] >= middle
        if found <= most:
            threshold, above = middle, found
        else:
            low = middle + 1
    ties = most - above  # wanted among those one below the threshold
    for row in range(counts.size // experts):
        layer = begin // experts + row
        for e in range(experts):
            count = counts[row * experts + e]
            tied = (count == threshold - 1) & (count > 0)
            wanted = (count >= threshold) | (tied & (ties > 0))
            ties -= tied
            cells[layer, e].admit = wanted
            cells[layer, e].score = np.inf if wanted else 0.0


@kernel
def make_wanted(cells, cache, total):
    """Recompute *wanted*: the capacity's worth of most frequent experts, of each layer or of the whole model."""
    pools = cache.residents.size
    span = total.size // pools
    for pool in range(pools):
        want_most_frequent(cells, total, pool * span, (pool + 1) * span, cache.capacity[pool])
        _line_up_unwanted(cells, cache, pool, pool * span, (pool + 1) * span)


@kernel(inline=False)
def _line_up_unwanted(cells, cache, pool, begin, stop):
    """Rebuild a pool's ring from the residents that are not wanted any more."""
    experts = cells.shape[1]
    by_touch = np.empty(cache.residents[pool] + 1, np.int64)  # order of touch, then of key; each may be the last
    ids = np.empty(experts, np.int64)  # of a layer's residents
    size = 0
    for layer in range(begin // experts, stop // experts):
        residents = 0
        for e in range(experts):
            cache.after[layer * experts + e] = -1
            ids[residents] = e
            residents += cache.resident[layer * experts + e]
        for i in range(residents):
            key = layer * experts + ids[i]
            by_touch[size] = cache.touched[key] * cache.resident.size + key
            size += cells[layer, ids[i]].score < np.inf
    _sort(by_touch, size)
    end = cache.resident.size + pool
    cache.after[end] = cache.before[end] = end
    for i in range(size):
        link(cache, by_touch[i] % cache.resident.size, end)


@kernel
def _sort(keys, size):
    """Sort the first ``size`` keys (Shell's way: NumPy's argsort would add 1.9 s to the first run's compilation)."""
    gap = size // 2
    while gap > 0:
        for i in range(gap, size):
            key = keys[i]
            j = i
            while j >= gap and keys[j - gap] > key:
                keys[j] = keys[j - gap]
                j -= gap
            keys[j] = key
        gap = 1 if gap == 2 else gap * 5 // 11


@kernel(inline=False)
def queue_wanted(queue, cells, cache, prompts, tally):
    """Rebuild the queue: wanted experts that are not resident, layer by layer, by count descending, then id.

    A transfer that was partly done and is still wanted keeps its bytes; one that is not is wasted.
    """
    layers, experts = cells.shape
    for at in range(queue.ends[HEAD], queue.ends[TAIL]):
        key = queue.key[at]
        if queue.place[key] != at:
            continue
        moved_bytes = queue.moved_bytes[key]
        wasted = leave(queue, key)
        if cells[key // experts, key % experts].admit:
            prompts.kept[key] = moved_bytes
        else:
            tally[0].wasted += wasted
    ids = np.empty(experts, np.int64)
    for layer in range(layers):
        size = 0
        for e in range(experts):
            ids[size] = e
            size += (cells[layer, e].admit != 0) & (cache.resident[layer * experts + e] == 0)
        for i in range(size):
            e, j = ids[i], i
            while j > 0 and prompts.total[layer * experts + ids[j - 1]] < prompts.total[layer * experts + e]:
                ids[j] = ids[j - 1]
                j -= 1
            ids[j] = e
        for i in range(size):
            key = layer * experts + ids[i]
            late = queue.late[key]
            join(queue, key, 0)
            if prompts.kept[key] > 0:
                restore(queue, key, prompts.kept[key], late)
            prompts.kept[key] = 0.0
