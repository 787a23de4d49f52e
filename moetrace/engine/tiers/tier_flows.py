"""Prefetches on a machine with more tiers: each flows as fast as link and holder let it."""

import numpy as np

from moetrace.engine.machine import FIRST_HOME
from moetrace.engine.prefetch import COMPLETE, COMPLETED_EVER, DONE_BYTES, HEAD, TAIL, is_complete
from moetrace.engine.tiers.tier_host import disk_s_per_byte, disk_spare_s, note_read_ahead
from moetrace.engine.tiers.tier_link import flow_of, kept_share
from moetrace.engine.tiers.tier_times import outside_s_per_byte
from moetrace.jit.compile import kernel


@kernel
def flow_tiers(tiers, queue, start_s, budget_s, machine):
    """Let prefetches flow for up to ``budget_s`` seconds, first come first served; return bytes and seconds used.

    They begin ``start_s`` after the layer at hand did.
    """
    left_s, used_s, moved_bytes = budget_s, 0.0, 0.0
    begin_s = tiers.tally[0].now_s + start_s
    for at in range(queue.ends[HEAD], queue.ends[TAIL]):
        if left_s <= 0:
            break
        key = np.int64(queue.key[at])
        if queue.place[key] != at:
            continue
        limits_s = left_s, disk_spare_s(tiers.host)
        step_bytes, step_s, is_read = piece_of(tiers, queue, key, begin_s + used_s, limits_s, machine)
        if step_bytes <= 0.0:
            continue
        if is_read:
            note_read_ahead(tiers.host, step_s, step_bytes)
        queue.moved_bytes[key] += step_bytes
        left_s -= step_s
        used_s += step_s
        moved_bytes += step_bytes
        if is_complete(queue, key):
            queue.ends[COMPLETE] += 1
            queue.ends[COMPLETED_EVER] += 1
    return moved_bytes, used_s


@kernel
def piece_of(tiers, queue, key, at_s, limits_s, machine):
    """Return how many bytes of a queued expert flow from ``at_s`` on, in which seconds, and whether a disk reads them.

    ``limits_s``: seconds in which the link is free, and the disk.
    """
    remaining, experts = queue.weight_bytes[key] - queue.moved_bytes[key], machine.weight_bytes.shape[1]
    disk_s = disk_s_per_byte(tiers.host, key)
    most_s = min(limits_s[0], limits_s[1]) if disk_s > 0.0 else limits_s[0]
    if remaining <= DONE_BYTES or most_s <= 0.0:
        return 0.0, 0.0, False
    group = machine.home[key // experts, key % experts] - FIRST_HOME
    # Lost packets are sent again from host memory: the disk reads each byte once.
    cap_s = max(outside_s_per_byte(tiers.term[0], machine.share, group), disk_s * kept_share(tiers.transfers))
    link_s = machine.link[0].s_per_byte
    step_bytes, step_s = flow_of(tiers.transfers, remaining, at_s, most_s, link_s, cap_s)
    return step_bytes, step_s, disk_s > 0.0
