"""Transfers over a link that loses packets, or whose rate changes: one transfer each, from the moment it starts.

Every kernel here takes `Transfers` or None, and does nothing, or what a plain link does, where that is None.
"""

from typing import Any, NamedTuple

import numpy as np

from moetrace.jit.compile import kernel
from moetrace.jit.random import GOLDEN, mix

# Fields of a draw: whose the bytes are, and in which direction they pass.
TO_GPU_ITSELF, TO_HOME, TO_CPU = 0, 1, 2
OUT, IN = 0, 1

LINK_TERM = np.dtype(
    [
        ("loss", np.float64),  # probability that a packet is lost
        ("mtu_bytes", np.float64),
        ("rto_s", np.float64),
        ("latency_s", np.float64),
        ("row_bytes", np.float64),
        ("is_relaxed", np.int64),  # 1: activations are not sent again
        ("has_rates", np.int64),
        ("key", np.uint64),  # that draws begin with
    ]
)
# The layer at hand, and the losses so far.
LINK_STATE = np.dtype(
    [
        ("at_s", np.float64),  # the router's word, since the start of the replay
        ("step", np.int64),
        ("layer", np.int64),
        ("resent_out_bytes", np.float64),
        ("resent_in_bytes", np.float64),
        ("lost_mass", np.float64),
        ("all_mass", np.float64),
    ]
)
_FULL = 18446744073709551616.0  # 2^64
_LEAST = 1e-17  # a share that is lost in rounding: 1 - _LEAST is 1
_MOST_HALVES = 64  # beyond any range of rounds, so that a search ends for sure


class Transfers(NamedTuple):
    """A link that loses packets, or whose rate changes, and who of a layer's rows is on its way."""

    term: Any  # LINK_TERM [1]
    state: Any  # LINK_STATE [1]
    begin_s: np.ndarray  # float64 [n]: from when on a rate holds; the first also before, the last for ever
    s_per_byte: np.ndarray  # float64 [n]
    place: np.ndarray  # int64 [E]: of an expert, one more than its place among the active ones; 0 = not active
    next_row: np.ndarray  # int64 [units]: place of the next row in the transfer to a unit
    row_of: np.ndarray  # int64 [units]: row that a unit saw last
    lost: np.ndarray  # uint8 [units]: whether that row was lost there


@kernel
def begin_transfers(transfers, tiers, machine, step, layer, dense):
    """The router is about to speak, ``dense`` seconds after the layer began: note when, and the rate at which."""
    if transfers is None:
        return
    state = transfers.state[0]
    state.at_s, state.step, state.layer = tiers.tally[0].now_s + dense, step, layer
    if transfers.term[0].has_rates:
        s_per_byte = transfers.s_per_byte[_rate_at(transfers, state.at_s)]
        machine.link[0].s_per_byte = s_per_byte
        machine.link[0].bytes_s = tiers.term[0].link_bytes_s = 1.0 / s_per_byte


@kernel
def _rate_at(transfers, at_s):
    """Return which rate holds at a time: the last one that has begun, or the first."""
    low, high = 0, transfers.begin_s.size
    while high - low > 1:
        middle = (low + high) // 2
        if transfers.begin_s[middle] <= at_s:
            low = middle
        else:
            high = middle
    return low


@kernel
def carry_s(transfers, byte_count, at_s, cap_s_per_byte):
    """Return the seconds in which bytes pass from ``at_s`` on, each in ``cap_s_per_byte`` at least."""
    at, seconds, left = _rate_at(transfers, at_s), 0.0, byte_count
    while at + 1 < transfers.begin_s.size:
        s_per_byte = max(transfers.s_per_byte[at], cap_s_per_byte)
        part_s = max(0.0, transfers.begin_s[at + 1] - at_s - seconds)
        if left * s_per_byte <= part_s:
            return seconds + left * s_per_byte
        left -= part_s / s_per_byte
        seconds += part_s
        at += 1
    return seconds + left * max(transfers.s_per_byte[at], cap_s_per_byte)


@kernel
def carried_bytes(transfers, seconds, at_s, cap_s_per_byte):
    """Return the bytes that pass in ``seconds`` from ``at_s`` on; the inverse of `carry_s`."""
    at, done_s, byte_count = _rate_at(transfers, at_s), 0.0, 0.0
    while at + 1 < transfers.begin_s.size:
        part_s = max(0.0, transfers.begin_s[at + 1] - at_s - done_s)
        if done_s + part_s >= seconds:
            break
        byte_count += part_s / max(transfers.s_per_byte[at], cap_s_per_byte)
        done_s += part_s
        at += 1
    return byte_count + (seconds - done_s) / max(transfers.s_per_byte[at], cap_s_per_byte)


@kernel
def _stirred(x, value):
    """Return the chain's next number."""
    return mix(x + GOLDEN + np.uint64(value))


@kernel
def draw(transfers, device, direction, item):
    """Return a number from 0 to 1 for a transfer of the layer at hand, or a packet of it: version 1's chain."""
    state = transfers.state[0]
    x = _stirred(_stirred(transfers.term[0].key, state.step), state.layer)
    return float(_stirred(_stirred(_stirred(x, device), direction), item)) / _FULL


@kernel
def _is_through(loss, packets, rounds, u):
    """Return whether all packets have arrived after being sent ``rounds + 1`` times."""
    return u <= (1.0 - loss ** (rounds + 1.0)) ** packets


@kernel
def rounds_of(loss, packets, u):
    """Return R: how often lost packets are sent again, the least k >= 0 with u <= (1 - loss^(k+1))^packets.

    The range is halved until it is found: once loss^(k+1) is lost in rounding, all is through.
    """
    if packets <= 0.0 or u <= 0.0 or _is_through(loss, packets, 0.0, u):
        return 0.0
    low, high = 0.0, np.ceil(np.log(_LEAST) / np.log(loss))
    for _ in range(_MOST_HALVES):
        if high - low <= 1.0:
            break
        middle = np.floor((low + high) / 2.0)
        if _is_through(loss, packets, middle, u):
            high = middle
        else:
            low = middle
    return high


@kernel
def transfer_s(transfers, byte_count, start_s, cap_s_per_byte, who):
    """Return the seconds of a transfer that starts ``start_s`` after the router's word, without its latency.

    ``who``: device, direction and item of its draw. Packets that are sent again are noted.
    """
    term, state = transfers.term[0], transfers.state[0]
    device, direction, item = who
    rounds, more = 0.0, 0.0
    if term.loss > 0.0 and not (term.is_relaxed and device != TO_GPU_ITSELF):
        u = draw(transfers, device, direction, item)
        rounds = rounds_of(term.loss, np.ceil(byte_count / term.mtu_bytes), u)
        more = term.loss * (1.0 - term.loss**rounds) / (1.0 - term.loss)
        if direction == IN:
            state.resent_in_bytes += more * byte_count
        else:
            state.resent_out_bytes += more * byte_count
    from_s = state.at_s + start_s + term.latency_s
    return carry_s(transfers, byte_count * (1.0 + more), from_s, cap_s_per_byte) + rounds * term.rto_s


@kernel
def weights_s(transfers, expert, start_s, cap_s_per_byte):
    """Return the seconds of a demand fetch, an active expert's, with its latency."""
    if transfers is None:
        return expert.fetch_s
    who = (TO_GPU_ITSELF, IN, np.int64(expert.expert))
    return transfers.term[0].latency_s + transfer_s(transfers, expert.weight_bytes, start_s, cap_s_per_byte, who)


@kernel
def activations_s(transfers, byte_count, start_s, plain_s, device, direction):
    """Return the seconds of activations, without their latency; ``plain_s`` on a plain link."""
    if transfers is None:
        return plain_s
    return transfer_s(transfers, byte_count, start_s, 0.0, (device, direction, 0))


@kernel
def resent_bytes(transfers):
    """Return the bytes that were sent again so far, in each direction."""
    if transfers is None:
        return 0.0, 0.0
    return transfers.state[0].resent_out_bytes, transfers.state[0].resent_in_bytes


@kernel
def set_resent_bytes(transfers, resent):
    """Let that have been sent again: after a time line that was drawn once more."""
    if transfers is None:
        return
    transfers.state[0].resent_out_bytes, transfers.state[0].resent_in_bytes = resent


@kernel
def kept_share(transfers):
    """Return the share of a prefetch's packets that arrive."""
    if transfers is None:
        return 1.0
    return 1.0 - transfers.term[0].loss


@kernel
def flow_of(transfers, byte_count, at_s, most_s, s_per_byte, cap_s_per_byte):
    """Return which of a prefetch's bytes pass in ``most_s`` seconds at most, and in which seconds.

    ``s_per_byte`` is a plain link's; ``at_s`` counts from the start of the replay. Losses are a part of the rate.
    """
    if transfers is None:
        each_s = max(s_per_byte, cap_s_per_byte)
        if byte_count * each_s <= most_s:
            return byte_count, byte_count * each_s
        # All of the time, to the last bit: of a rest that is rounding, the next expert would get some 1e-11 bytes.
        return min(most_s / each_s, byte_count), most_s
    kept = kept_share(transfers)
    needed_s = carry_s(transfers, byte_count / kept, at_s, cap_s_per_byte)
    if needed_s <= most_s:
        return byte_count, needed_s
    return min(carried_bytes(transfers, most_s, at_s, cap_s_per_byte) * kept, byte_count), most_s
