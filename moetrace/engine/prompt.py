"""Experts wanted by the prompts: the data-set-free residency ``prefill`` (timing model, section 7; arXiv 2601.03992).

Nothing is known but the prompt: the experts that a request's prefill chose most are the ones to hold for its decode.
"""

from typing import NamedTuple

import numpy as np

from moetrace.engine.prefetch import COMPLETE, DONE_BYTES, HEAD, TAIL, is_complete
from moetrace.engine.residency import link, unlink
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
    )


def emptied(prompts: Prompts) -> Prompts:
    """Return books of the same requests in which nothing is counted yet."""
    cells = prompts.total.size
    return prompts._replace(
        counts=np.zeros(prompts.counts.shape, np.int32),
        total=np.zeros(cells, np.int64),
        cursor=np.zeros(1, np.int64),
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


@kernel
def make_wanted(cells, cache, total):
    """Recompute *wanted*: the capacity's worth of most frequent experts, of each layer or of the whole model."""
    pools = cache.residents.size
    span = total.size // pools
    for pool in range(pools):
        _want_most_frequent(cells, cache, total, pool, pool * span, (pool + 1) * span)


@kernel(inline=False)
def _want_most_frequent(cells, cache, total, pool, begin, stop):
    """Want the most counted of a pool's keys, up to its capacity; ties: lower key; never a count of 0.

    Wanted experts may be kept and are never evicted; unwanted ones are evicted and never kept. A prompt changes few of
    them: the others are read, many at once, and not written.
    """
    experts = cells.shape[1]
    threshold, tied_layer, tied_expert = _threshold_of(total[begin:stop], cache.capacity[pool], experts)
    unwanted = np.empty(cache.residents[pool] + 1, np.int64)  # residents, from now on; each may be the last
    size = 0
    for layer in range(begin // experts, stop // experts):
        first = layer * experts
        # Views, with numbers that are never negative: only so are many experts compared at a time.
        counts, before = total[first : first + experts], cache.wanted[first : first + experts]
        tied = first - begin < tied_layer * experts
        most_tied = experts if tied else (tied_expert if first - begin == tied_layer * experts else 0)
        changes = np.uint8(0)
        for e in range(experts):
            changes |= _is_wanted(counts, e, threshold, most_tied) ^ before[e]
        if changes == 0:
            continue
        for e in range(experts):
            wanted = _is_wanted(counts, e, threshold, most_tied)
            if wanted == before[e]:
                continue
            before[e] = wanted
            cells[layer, e].admit, cells[layer, e].score = wanted, np.inf if wanted else 0.0
            if cache.resident[first + e] and wanted:
                unlink(cache, first + e)
            elif cache.resident[first + e]:
                unwanted[size] = _age_key(cache, first + e)
                size += 1
    _sort(unwanted, size)
    other = cache.resident.size + pool  # where the ring closes, near which those belong that were touched of late
    for i in range(size - 1, -1, -1):
        while cache.before[other] < cache.resident.size and _age_key(cache, cache.before[other]) > unwanted[i]:
            other = cache.before[other]
        link(cache, unwanted[i] % cache.resident.size, other)
        other = unwanted[i] % cache.resident.size


@kernel
def _age_key(cache, key):
    """Return a number by which residents are in the order of their last touch, then of their keys."""
    return cache.touched[key] * cache.resident.size + key


@kernel
def _is_wanted(counts, e, threshold, most_tied):
    """Return 1 if an expert of a layer is wanted, else 0: of those counted once less, the first ``most_tied`` are."""
    return np.uint8((counts[e] >= threshold) | ((counts[e] == threshold - 1) & (e < most_tied)))


@kernel
def _threshold_of(counts, most, experts):
    """Return the least count of which all experts are wanted, found by halving, as counting many at once is cheap.

    And where those with one count less stop being wanted: a layer of the pool and an expert in it, 0 and 0 = none.
    """
    highest = 0
    for i in range(counts.size):
        highest = max(highest, counts[i])
    low, threshold, above = 1, highest + 1, 0
    while low < threshold:
        middle, found = (low + threshold) >> 1, 0
        for i in range(counts.size):
            found += counts[i] >= middle
        if found <= most:
            threshold, above = middle, found
        else:
            low = middle + 1
    ties = most - above
    if threshold == 1 or ties == 0:
        return threshold, 0, 0
    layer = 0
    while True:  # there are more of them than ``ties``, or the threshold would be lower
        of_layer, found = counts[layer * experts : (layer + 1) * experts], 0
        for e in range(experts):
            found += of_layer[e] == threshold - 1
        if found >= ties:
            break
        ties -= found
        layer += 1
    for e in range(experts):
        ties -= of_layer[e] == threshold - 1
        if ties == 0:
            return threshold, layer, e + 1
    return threshold, layer, experts


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
        key = np.int64(queue.key[at])
        if queue.place[key] != at:
            continue
        queue.place[key] = -1
        if not cache.wanted[key]:
            tally[0].wasted += queue.moved_bytes[key] > DONE_BYTES
            queue.moved_bytes[key] = 0.0
    ids, order = np.empty(experts, np.int64), np.empty(experts, np.int64)
    tail, complete = 0, 0
    for layer in range(layers):
        first, size = layer * experts, 0
        wanted, resident = cache.wanted[first : first + experts], cache.resident[first : first + experts]
        for e in range(experts):
            ids[size] = e
            size += wanted[e] > resident[e]
        for i in range(size):
            order[i] = ids[i] - prompts.total[first + ids[i]] * experts  # by count descending, then id
        _sort(order, size)
        for i in range(size):
            key = first + order[i] % experts
            queue.key[tail], queue.place[key], queue.target[key] = key, tail, 0
            tail += 1
            has_begun = queue.moved_bytes[key] > 0.0
            queue.late[key] &= has_begun
            complete += has_begun and is_complete(queue, key)
    queue.ends[HEAD], queue.ends[TAIL], queue.ends[COMPLETE] = 0, tail, complete
