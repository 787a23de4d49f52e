"""Rows that get lost on a relaxed link: packets of activations are not sent again, and a choice loses its gate."""

import numpy as np

from moetrace.engine.state import CPU, ON_GPU
from moetrace.engine.tiers.tier_link import IN, OUT, TO_CPU, TO_HOME, draw
from moetrace.jit.compile import kernel


@kernel
def lose_rows(transfers, batch, s, size, scratch, term, share):
    """Add a layer's gates to the sums of all, and of those that were lost; ``s``: the step's place in the block."""
    if transfers is None:
        return
    if transfers.term[0].is_relaxed:
        _lose_rows(transfers, batch, s, size, scratch, term, share)


@kernel(inline=False)
def _lose_rows(transfers, batch, s, size, scratch, term, share):
    """Do that, on a link that loses rows."""
    for i in range(size):
        transfers.place[scratch.active[i].expert] = i + 1
    if term.sends_once:
        _lose_of(transfers, batch, s, scratch, (TO_HOME, 1, 1, -1))
    else:
        _lose_of(transfers, batch, s, scratch, (TO_HOME, term.units, share, term.all_group))
    if term.has_cpu:
        _lose_of(transfers, batch, s, scratch, (TO_CPU, 1, 1, -1))
    layer = transfers.state[0].layer
    for row in range(batch.offset[s], batch.offset[s + 1]):
        for slot in range(batch.experts.shape[2]):
            if _place(transfers, batch, row, layer, slot) > 0:
                transfers.state[0].all_mass += _gate(batch, row, layer, slot)
    for i in range(size):
        transfers.place[scratch.active[i].expert] = 0


@kernel
def _place(transfers, batch, row, layer, slot):
    """Return one more than the place of a choice's expert among the active ones; 0 where nothing was chosen."""
    expert = np.int64(batch.experts[row, layer, slot])
    return transfers.place[expert] if expert < transfers.place.size else 0


@kernel
def _gate(batch, row, layer, slot):
    """Return a choice's gate: 1/k if the trace has no gates."""
    gate = np.float64(batch.gates[row, layer, slot]) if batch.gates.shape[0] > 0 else np.nan
    return gate if np.isfinite(gate) else 1.0 / batch.experts.shape[2]


@kernel
def _runs_on(scratch, i, device):
    """Return whether the i-th active expert runs there; what GPU and home share runs at home, too."""
    plan = scratch.plan[i]
    return plan == CPU if device == TO_CPU else plan != CPU and plan != ON_GPU


@kernel
def _units(group, where):
    """Return the first unit that runs an expert of a group, and how many do; ``where`` as in `_lose_of`."""
    _, units, share, all_group = where
    if units == 1:
        return 0, 1
    return (0, units) if group == all_group else (group * share, share)


@kernel
def _lose_of(transfers, batch, s, scratch, where):
    """Add the gates that are lost on a device: which, its units, units of a group, and the group of all units.

    The rows of a transfer lie unit by unit, in the trace's order: the first walk finds where each unit's rows begin.
    """
    device, units, _, _ = where
    state, layer, slots = transfers.state[0], transfers.state[0].layer, batch.experts.shape[2]
    transfers.row_of[:units] = -1
    transfers.next_row[:units] = 0
    for row in range(batch.offset[s], batch.offset[s + 1]):
        for slot in range(slots):
            at = _place(transfers, batch, row, layer, slot)
            if at > 0 and _runs_on(scratch, at - 1, device):
                first, count = _units(scratch.active[at - 1].group, where)
                for unit in range(first, first + count):
                    transfers.next_row[unit] += transfers.row_of[unit] != row
                    transfers.row_of[unit] = row
    begin = 0
    for unit in range(units):
        transfers.next_row[unit], begin = begin, begin + transfers.next_row[unit]
        transfers.row_of[unit] = -1
    for row in range(batch.offset[s], batch.offset[s + 1]):
        for slot in range(slots):
            at = _place(transfers, batch, row, layer, slot)
            if at == 0 or not _runs_on(scratch, at - 1, device):
                continue
            first, count = _units(scratch.active[at - 1].group, where)
            is_lost = False
            for unit in range(first, first + count):
                if transfers.row_of[unit] != row:
                    transfers.row_of[unit] = row
                    transfers.lost[unit] = _is_lost(transfers, device, transfers.next_row[unit])
                    transfers.next_row[unit] += 1
                is_lost |= transfers.lost[unit] != 0
            if is_lost:
                state.lost_mass += _gate(batch, row, layer, slot)


@kernel
def _is_lost(transfers, device, place):
    """Return whether a packet is lost that the row at a place of the transfer touches, out or back."""
    term = transfers.term[0]
    begin = place * term.row_bytes
    first, last = int(np.floor(begin / term.mtu_bytes)), int(np.ceil((begin + term.row_bytes) / term.mtu_bytes))
    for packet in range(first, max(last, first + 1)):
        if draw(transfers, device, OUT, packet) < term.loss or draw(transfers, device, IN, packet) < term.loss:
            return True
    return False
