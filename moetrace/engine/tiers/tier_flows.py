"""Prefetches on a machine with more tiers: each flows as fast as link and holder let it."""

from moetrace.engine.machine import FIRST_HOME
from moetrace.engine.prefetch import COMPLETE, COMPLETED_EVER, DONE_BYTES, HEAD, TAIL, is_complete
from moetrace.engine.tiers.tier_host import disk_s_per_byte, disk_spare_s, note_read_ahead
from moetrace.jit.compile import kernel


@kernel
def fetch_s_per_byte(tiers, machine, key):
    """Return the seconds that a byte of an expert takes over the link."""
    term, experts = tiers.term[0], machine.weight_bytes.shape[1]
    spread = machine.share > 1 or machine.home[key // experts, key % experts] - FIRST_HOME == term.all_group
    return max(machine.link[0].s_per_byte, term.all_s_per_byte if spread else term.one_s_per_byte)


@kernel
def flow_tiers(tiers, queue, budget_s, machine):
    """Let prefetches flow for up to ``budget_s`` seconds, first come first served; return bytes and seconds used.

    What host memory does not hold is passed over while the disk has no time for it.
    """
    left_s, used_s, moved_bytes = budget_s, 0.0, 0.0
    for at in range(queue.ends[HEAD], queue.ends[TAIL]):
        if left_s <= 0:
            break
        key = queue.key[at]
        if queue.place[key] != at:
            continue
        remaining = queue.weight_bytes[key] - queue.moved_bytes[key]
        if remaining <= DONE_BYTES:
            continue
        disk_s = disk_s_per_byte(tiers.host, key)
        most_s = min(left_s, disk_spare_s(tiers.host)) if disk_s > 0.0 else left_s
        if most_s <= 0:
            continue
        s_per_byte = max(fetch_s_per_byte(tiers, machine, key), disk_s)
        step_bytes = min(most_s / s_per_byte, remaining) if s_per_byte > 0.0 else remaining
        if disk_s > 0.0:
            note_read_ahead(tiers.host, step_bytes * s_per_byte, step_bytes)
        queue.moved_bytes[key] += step_bytes
        left_s -= step_bytes * s_per_byte
        used_s += step_bytes * s_per_byte
        moved_bytes += step_bytes
        if is_complete(queue, key):
            queue.ends[COMPLETE] += 1
            queue.ends[COMPLETED_EVER] += 1
    return moved_bytes, used_s
