"""Experts that move to the GPU, and those that stay there, by their worth (`foresight.py`; timing model, section 7)."""

import numpy as np

from moetrace.engine.foresight import PLACES, grow_stale
from moetrace.engine.prefetch import COMPLETE, DONE_BYTES, HEAD, TAIL, is_complete, join, leave
from moetrace.engine.state import ON_GPU
from moetrace.jit.compile import kernel

INFINITE = 0x7FF0_0000_0000_0000  # the bits of infinity


@kernel
def _look(f, queue, cache, layer):
    """Find the worth of a layer's best candidate and least resident, leaving out those that `cache.active` bars.

    Worths are compared as bits, since the least and greatest of many integers are found at once; the expert is only
    looked up if asked.
    """
    experts = f.worth.shape[1]
    part = slice(layer * experts, (layer + 1) * experts)
    barred, resident, place = cache.active[part], cache.resident[part], queue.place[part]
    weight_bytes = queue.weight_bytes[part]
    best, least = np.int64(0), np.int64(INFINITE)
    for e in range(experts):
        bits = f.worth_bits[layer, e]
        least = min(least, bits if (resident[e] != 0) & (barred[e] == 0) else np.int64(INFINITE))
    for e in range(experts):
        bits, out = f.worth_bits[layer, e], (resident[e] != 0) | (barred[e] != 0)
        best = max(best, np.int64(0) if out | (place[e] >= 0) | (weight_bytes[e] <= 0.0) else bits)
    f.best_bits[layer], f.least_bits[layer] = best, least
    f.stale[layer] = 0


@kernel
def _look_again(f, queue, cache):
    """Update the layers whose state is out of date; return how many layers there are."""
    for i in range(f.stale_count[0]):
        _look(f, queue, cache, f.stale_layers[i])
    f.stale_count[0] = 0
    return f.stale.size


@kernel
def _least_worth(f, queue, cache):
    """Return the least worth of a resident that is not barred, infinity without one."""
    layers = _look_again(f, queue, cache)
    least = np.int64(INFINITE)
    for layer in range(layers):
        least = min(least, f.least_bits[layer])
    f.least_bits[layers] = least
    return f.least_worth[layers]


@kernel
def _least_resident(f, queue, cache):
    """Return the key of the resident of least worth that is not barred, -1 = none; ties: the lower key."""
    if _least_worth(f, queue, cache) < np.inf:
        layers, experts = f.worth.shape
        least = f.least_bits[layers]
        for layer in range(layers):
            if f.least_bits[layer] == least:
                for key in range(layer * experts, (layer + 1) * experts):
                    if f.worth_bits[layer, key - layer * experts] != least or cache.active[key]:
                        continue
                    if cache.resident[key]:
                        return key
    return -1


@kernel
def _best_candidate(f, queue, cache, above):
    """Return the key of greatest worth ``above`` a bar, neither resident nor queued nor barred; ties: the lower key."""
    layers, experts = _look_again(f, queue, cache), f.worth.shape[1]
    best = np.int64(0)
    for layer in range(layers):
        best = max(best, f.best_bits[layer])
    f.best_bits[layers] = best
    if f.best_worth[layers] > above:
        for layer in range(layers):
            if f.best_bits[layer] == best:
                for key in range(layer * experts, (layer + 1) * experts):
                    if f.worth_bits[layer, key - layer * experts] != best or cache.resident[key] or cache.active[key]:
                        continue
                    if queue.place[key] < 0 and queue.weight_bytes[key] > 0.0:
                        return key
    return -1


@kernel
def _worth(f, key):
    """Return what a key is worth."""
    return f.worth[key // f.worth.shape[1], key % f.worth.shape[1]]


@kernel
def queue_best(f, queue, cache, layer, size, scratch, tally):
    """Rebuild the queue: transfers that have begun and are still worth it, then the best; by worth for each byte to go.

    Experts fetched whole for this layer do not join: they are about to be offered.
    """
    experts = f.worth.shape[1]
    _bar(f, cache, layer, size, scratch, False)
    least = _least_worth(f, queue, cache)
    bar = 0.0 if least == np.inf or cache.residents[0] < cache.capacity[0] else least
    kept = 0
    for at in range(queue.ends[HEAD], queue.ends[TAIL]):
        key = np.int64(queue.key[at])
        if queue.place[key] != at:
            continue
        begun = queue.moved_bytes[key] > DONE_BYTES
        if is_complete(queue, key) or (begun and _worth(f, key) > bar):
            f.picked[kept] = key
            kept += 1
        else:
            tally[0].wasted += leave(queue, key)
            grow_stale(f, key // experts)
    while kept < PLACES and cache.capacity[0] > 0:
        key = _best_candidate(f, queue, cache, bar + f.margin)
        if key < 0:
            break
        join(queue, key, 0)
        grow_stale(f, key // experts)
        f.picked[kept] = key
        kept += 1
    _order(f, queue, kept, bar)
    _unbar(f, cache, layer, size, scratch)


@kernel
def _order(f, queue, kept, bar):
    """Let the queue be the ``kept`` picked ones, by worth above the bar for each byte to go; stable."""
    for i in range(kept):
        key = f.picked[i]
        value = (_worth(f, key) - bar) / max(queue.weight_bytes[key] - queue.moved_bytes[key], DONE_BYTES)
        j = i
        while j > 0 and f.value[j - 1] < value:
            f.picked[j], f.value[j] = f.picked[j - 1], f.value[j - 1]
            j -= 1
        f.picked[j], f.value[j] = key, value
    queue.ends[HEAD], queue.ends[TAIL] = 0, kept
    for i in range(kept):
        queue.key[i] = f.picked[i]
        queue.place[f.picked[i]] = i


@kernel
def _bar(f, cache, layer, size, scratch, whole_layer):
    """Bar the experts that are fetched for a layer; if there are any and that is asked, all that are active in it."""
    first, fetched = layer * f.worth.shape[1], 0
    for i in range(size):
        if scratch.plan[i] == ON_GPU and not scratch.active[i].resident:
            cache.active[first + scratch.active[i].expert] = 1
            fetched += 1
    if fetched > 0 and whole_layer:
        for i in range(size):
            cache.active[first + scratch.active[i].expert] = 1
    if fetched > 0:
        grow_stale(f, layer)
    return fetched


@kernel
def _unbar(f, cache, layer, size, scratch):
    """Bar none of a layer's active experts."""
    for i in range(size):
        key = layer * f.worth.shape[1] + scratch.active[i].expert
        if cache.active[key]:
            grow_stale(f, layer)
        cache.active[key] = 0


@kernel
def admit_by_worth(f, queue, cells, cache, tally):
    """Before a layer's ``dense``: keep arrived experts, in queue order, or drop them."""
    at = queue.ends[HEAD]
    while queue.ends[COMPLETE] > 0:
        key = np.int64(queue.key[at])
        if queue.place[key] == at and is_complete(queue, key):
            leave(queue, key)
            grow_stale(f, key // f.worth.shape[1])
            if _keep(f, queue, cells, cache, key, tally):
                cache.fresh[key] = 1
            else:
                tally[0].wasted += 1
        at += 1


@kernel
def touch_and_admit_by_worth(f, queue, cells, cache, layer, size, scratch, tally):
    """After a layer, in demand order: touch residents, offer fetched experts; none is evicted for another of them."""
    fetched = _bar(f, cache, layer, size, scratch, True)
    for i in range(size):
        expert = scratch.active[i].expert
        key = layer * f.worth.shape[1] + expert
        kept = fetched > 0 and scratch.plan[i] == ON_GPU and _keep(f, queue, cells, cache, key, tally)
        if kept or cache.resident[key]:
            tally[0].clock += 1
            cache.touched[key] = cells[layer, expert].touched = tally[0].clock
    _unbar(f, cache, layer, size, scratch)


@kernel
def _keep(f, queue, cells, cache, key, tally):
    """Keep a copy if there is room, or instead of the least resident if that is worth less; return whether it is."""
    experts = f.worth.shape[1]
    if cache.resident[key]:
        return False
    if cache.residents[0] >= cache.capacity[0]:
        victim = _least_resident(f, queue, cache)
        if victim < 0 or _worth(f, victim) >= _worth(f, key):
            return False
        cells[victim // experts, victim % experts].resident = 0
        cache.resident[victim] = 0
        cache.residents[0] -= 1
        tally[0].wasted += cache.fresh[victim]
        tally[0].evictions += 1
        cache.fresh[victim] = 0
        grow_stale(f, victim // experts)
    cells[key // experts, key % experts].resident = 1
    cache.resident[key] = 1
    cache.residents[0] += 1
    grow_stale(f, key // experts)
    return True
