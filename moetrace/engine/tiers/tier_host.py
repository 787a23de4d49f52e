"""Host memory as a cache above a disk: what it holds, and when the rest of a layer's experts has been read."""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.machine import Machine
from moetrace.engine.residencies.ewma import by_average
from moetrace.engine.residencies.least_stale import by_layer
from moetrace.engine.residencies.lfu import by_frequency
from moetrace.engine.residencies.lfu_in_cache import by_frequency_in_cache
from moetrace.engine.residencies.lfu_window import by_recent_frequency
from moetrace.engine.residencies.lfuda import by_count_and_age
from moetrace.engine.residency import EVICTED_SHARE, Cache, empty_cache, empty_cells, touch_and_admit
from moetrace.engine.state import ON_GPU, TALLY, records
from moetrace.engine.view import LayerScratch, new_scratch, view_of
from moetrace.jit.compile import kernel
from moetrace.spec.host_memory import Disk, host_residency_of
from moetrace.spec.policy import PolicySpec

DISK = np.dtype(
    [
        ("s_per_byte", np.float64),
        ("latency_s", np.float64),
        ("rule", np.int64),  # of host memory's residency: one of those below
    ]
)
# Counts of host memory and the disk in a replay, beside the log.
HOST_TALLY = np.dtype(
    [(name, np.int64) for name in ("hits", "misses")]  # experts that were demanded of host memory
    + [(name, np.float64) for name in ("disk_bytes", "busy_s")]  # read, those of prefetches too
    + [
        ("read_s", np.float64),  # when the last expert of the layer at hand is read, after the router's word
        ("spare_s", np.float64),  # how long the disk is free for prefetches in the next stretch of time
    ]
)
# The ring's order, and the hooks that kernels call by number: of a first-class function Numba can make no member.
RING, LFU, LFU_IN_CACHE, LFU_WINDOW, LFUDA, EWMA, LEAST_STALE = 0, 1, 2, 3, 4, 5, 6
RULES = {
    None: RING,
    by_frequency: LFU,
    by_frequency_in_cache: LFU_IN_CACHE,
    by_recent_frequency: LFU_WINDOW,
    by_count_and_age: LFUDA,
    by_average: EWMA,
    by_layer: LEAST_STALE,
}
_lfu, _lfu_in_cache, _lfu_window = kernel(by_frequency), kernel(by_frequency_in_cache), kernel(by_recent_frequency)
_lfuda, _ewma, _least_stale = kernel(by_count_and_age), kernel(by_average), kernel(by_layer)


class HostMemory(NamedTuple):
    """The experts of the disk that host memory holds, and the state of its residency."""

    disk: Any  # DISK [1]
    cells: Any  # CELL [L, E]
    cache: Cache
    scratch: LayerScratch  # of those active experts of the layer at hand that the GPU does not hold
    tally: Any  # TALLY [1], for its clock
    books: Any  # HOST_TALLY [1]


def host_of(disk: Disk, policy: PolicySpec, machine: Machine, slots: int) -> HostMemory:
    """Return empty host memory for ``slots`` experts, above a disk."""
    layers, experts = machine.weight_bytes.shape
    residency = host_residency_of(policy.host_residency)
    record, books = records(1, DISK), records(1, HOST_TALLY)
    record["s_per_byte"], record["latency_s"] = 1 / disk.bytes_s, disk.latency_s
    record["rule"], books["spare_s"] = RULES[residency.hook], np.inf
    share = EVICTED_SHARE if policy.evicted_share is None else policy.evicted_share
    cells, scratch = empty_cells(layers, experts, True), new_scratch(machine)
    cache = empty_cache(layers, experts, 1, slots, residency.order, share)
    return HostMemory(record, cells, cache, scratch, records(1, TALLY), books)


@kernel
def read_from_disk(host, layer, size, active):
    """Say when each active expert is in host memory: missing experts are read one by one, in demand order."""
    if host is None:
        return
    disk, books, first = host.disk[0], host.books[0], layer * host.cells.shape[1]
    free_s = 0.0
    for i in range(size):
        expert = active[i]
        expert.ready_s = 0.0
        if expert.resident:
            continue
        if host.cache.resident[first + expert.expert]:
            books.hits += 1
            continue
        free_s += expert.weight_bytes * disk.s_per_byte + disk.latency_s
        expert.ready_s = free_s
        books.misses += 1
        books.disk_bytes += expert.weight_bytes
    books.busy_s += free_s
    books.read_s = free_s


@kernel
def spare_disk(host, moe_s):
    """Leave the disk to prefetches for what a layer's reads leave of its ``moe_s`` seconds."""
    if host is None:
        return
    host.books[0].spare_s = max(0.0, moe_s - host.books[0].read_s)


@kernel
def keep_in_host(host, step, layer, size, work):
    """After a layer: touch the active experts that host memory holds, and offer it those that were read."""
    if host is None:
        return
    host.books[0].spare_s = np.inf  # no demand is read until the next router speaks
    cells, cache, scratch, first = host.cells, host.cache, host.scratch, layer * host.cells.shape[1]
    asked, missing = 0, 0
    for i in range(size):
        expert = work.state.scratch.active[i]
        if expert.resident:
            cache.active[first + expert.expert] = 1  # the GPU runs it: it is not evicted now, and not touched
            continue
        seen = scratch.active[asked]
        seen.expert, seen.rows, seen.weight_bytes = expert.expert, expert.rows, expert.weight_bytes
        seen.resident = cache.resident[first + expert.expert]
        scratch.load[asked], scratch.plan[asked] = np.int64(expert.rows), ON_GPU
        missing += 1 - np.int64(seen.resident)
        asked += 1
    pool = (cache.age[0], np.int64(cache.residents[0] >= cache.capacity[0]))
    view = view_of(step, layer, work.batch.steps, work.machine, work.setting[0], scratch, pool)
    _learn(host.disk[0].rule, cells, view, layer, scratch.load[:asked], scratch.plan[:asked])
    touch_and_admit(cells, cache, layer, asked, scratch, missing, host.tally)
    for i in range(size):
        cache.active[first + work.state.scratch.active[i].expert] = 0


@kernel
def _learn(rule, cells, view, layer, load, plan):
    """Call the hook of host memory's residency."""
    if rule == LFU:
        _lfu(cells, view, layer, load, plan)
    elif rule == LFU_IN_CACHE:
        _lfu_in_cache(cells, view, layer, load, plan)
    elif rule == LFU_WINDOW:
        _lfu_window(cells, view, layer, load, plan)
    elif rule == LFUDA:
        _lfuda(cells, view, layer, load, plan)
    elif rule == EWMA:
        _ewma(cells, view, layer, load, plan)
    elif rule == LEAST_STALE:
        _least_stale(cells, view, layer, load, plan)


# Prefetches of what host memory does not hold


@kernel
def disk_s_per_byte(host, key):
    """Return what the disk takes for a byte of an expert that is fetched ahead; 0 if it is in host memory."""
    if host is None:
        return 0.0
    return 0.0 if host.cache.resident[key] else host.disk[0].s_per_byte


@kernel
def disk_spare_s(host):
    """Return for how long prefetches may read from the disk."""
    if host is None:
        return np.inf
    return host.books[0].spare_s


@kernel
def read_end_s(host):
    """Return when the reads that the layer at hand demands end, after the router's word."""
    if host is None:
        return 0.0
    return host.books[0].read_s


@kernel
def note_read_ahead(host, seconds, byte_count):
    """Note what a prefetch has read."""
    if host is None:
        return
    books = host.books[0]
    books.spare_s -= seconds
    books.busy_s += seconds
    books.disk_bytes += byte_count


def end_disk(host: HostMemory, part: Any) -> None:
    """Write what the disk did into its record of the unit log, after the last block."""
    for name, figure in (("busy_s", "busy_s"), ("bytes", "disk_bytes"), ("experts", "misses")):
        part[name] = host.books[figure][0]
