"""The transfers of a described link that loses packets, or whose rate changes."""

from typing import NamedTuple

import numpy as np

from moetrace.engine.machine import Machine
from moetrace.engine.replay import Batch
from moetrace.engine.state import records
from moetrace.engine.tiers.tier_link import LINK_STATE, LINK_TERM, Transfers
from moetrace.engine.tiers.tier_records import Tiers, new_tiers
from moetrace.jit.random import GOLDEN, mix_64
from moetrace.spec.participants import rates_seen_by
from moetrace.spec.policy import PolicySpec
from moetrace.spec.system import System


class Losses(NamedTuple):
    """Bytes that a link that loses packets sent again in each direction, and the share of all gates that it lost."""

    resent_out_bytes: float
    resent_in_bytes: float
    gate_mass_dropped: float


def losses_of(tiers: Tiers | None) -> Losses | None:
    """Return what a replay's link lost so far; None if it loses nothing."""
    if tiers is None or tiers.transfers is None or not tiers.transfers.term["loss"][0]:
        return None
    state = tiers.transfers.state
    out_bytes, in_bytes, lost, total = (
        float(state[name][0]) for name in ("resent_out_bytes", "resent_in_bytes", "lost_mass", "all_mass")
    )
    return Losses(out_bytes, in_bytes, lost / total if total > 0 else 0.0)


def with_transfers(tiers: Tiers | None, policy: PolicySpec, system: System, machine: Machine) -> Tiers | None:
    """Return a machine's parts beside GPU, home and a plain link, with those of its link, or None.

    Args:
        tiers: The parts found so far.
        policy: Whose dispatch says which rates the link has.
        system: The machine as it is described, with all parts.
        machine: The same in numbers.
    """
    link = system.link
    if link is None or not (link.loss or link.rates):
        return tiers
    term, rates = records(1, LINK_TERM), rates_seen_by(policy, system)
    term["loss"], term["mtu_bytes"] = link.loss or 0.0, link.packet_bytes
    term["rto_s"], term["latency_s"] = link.rto_s, link.latency_s
    term["row_bytes"], term["is_relaxed"] = machine.work["row_bytes"], link.loses_rows
    term["has_rates"], term["key"] = rates is not None, mix_64(np.array([link.seed or 0], np.uint64) + GOLDEN)[0]
    begin_s, s_per_byte = np.zeros(1), machine.link["s_per_byte"].copy()
    if rates is not None:
        begin_s, s_per_byte = rates[:, 0].copy(), 1 / rates[:, 1]
    units, experts = max(system.units, 1), machine.home.shape[1]
    place, next_row, row_of = (np.zeros(size, np.int64) for size in (experts, units, units))
    lost = np.zeros(units, np.uint8)
    transfers = Transfers(term, records(1, LINK_STATE), begin_s, s_per_byte, place, next_row, row_of, lost)
    return (tiers or new_tiers(units))._replace(transfers=transfers)


def note_remote_mass(transfers: Transfers | None, whole: Batch, local: Batch) -> None:
    """Count the gates of what remote functions run of a block, which no link loses."""
    if transfers is None or not transfers.term["is_relaxed"][0]:
        return
    rows = int(whole.offset[len(whole.steps.rows)])
    gone = whole.experts[:rows] != local.experts[:rows]
    each = np.full(gone.shape, np.nan) if len(whole.gates) == 0 else whole.gates[:rows].astype(np.float64)
    transfers.state["all_mass"] += np.where(np.isfinite(each), each, 1 / gone.shape[2])[gone].sum()


def with_rates(machine: Machine, tiers: Tiers | None) -> Machine:
    """Return a machine with a link of its own, if the rate of that changes as the replay goes."""
    if tiers is None or tiers.transfers is None or not tiers.transfers.term["has_rates"][0]:
        return machine
    return machine._replace(link=machine.link.copy())


def without_transfers(tiers: Tiers | None) -> Tiers | None:
    """Return the same with a plain link."""
    return None if tiers is None else tiers._replace(transfers=None, term=tiers.term.copy())
