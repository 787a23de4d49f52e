"""One transfer over the host link: rates over time, lost packets, draws (sections D and M)."""

import math
from dataclasses import dataclass

from support.oracle_entries import mix
from support.tiers_oracle.machine import Tiers

GPU, HOME, CPU = 0, 1, 2  # devices of a draw
OUT, BACK = 0, 1  # directions, seen from the GPU
GOLDEN = 0x9E3779B97F4A7C15


def draw(seed: int, *fields: int) -> float:
    """Return a number in [0, 1) that depends on the seed and (step, layer, device, direction, item)."""
    x = mix((seed + GOLDEN) % 2**64)
    for v in fields:
        x = mix((x + GOLDEN + v) % 2**64)
    return x / 2**64


def resends(eps: float, packets: int, u: float) -> int:
    """Return R: the rounds after the first that a transfer needs until each of its packets has arrived."""
    R = 0
    while u > (1 - eps ** (R + 1)) ** packets:
        R += 1
    return R


def rate_at(m: Tiers, second: float) -> float:
    """Return the link's bytes/s at a moment: that of the last line at or before it, of the first line before that."""
    if m.rates is None:
        return m.B_l
    passed = [rate for at, rate in m.rates if at <= second]
    return passed[-1] if passed else m.rates[0][1]


def changes_after(m: Tiers, second: float) -> list[float]:
    """Return the moments after a second at which the rate changes."""
    return [at for at, _ in m.rates or [] if at > second]


def carry_s(m: Tiers, volume: float, second: float, cap: float) -> float:
    """Return how long that many bytes take from a moment on, at no more than cap bytes/s."""
    began = second
    for change in changes_after(m, second):
        carried = (change - second) * min(rate_at(m, second), cap)
        if carried >= volume:
            break
        volume, second = volume - carried, change
    took = volume / min(rate_at(m, second), cap)
    return took if second == began else (second - began) + took


def carried(m: Tiers, second: float, seconds: float, cap: float) -> float:
    """Return the bytes that pass in some seconds from a moment on, at no more than cap bytes/s."""
    end, volume = second + seconds, 0.0
    inside = [change for change in changes_after(m, second) if change < end]
    if not inside:
        return seconds * min(rate_at(m, second), cap)
    for change in [*inside, end]:
        volume += (change - second) * min(rate_at(m, second), cap)
        second = change
    return volume


@dataclass
class Transfer:
    """What a transfer takes beside its latency, and what it sends more than once."""

    body_s: float
    resent_bytes: float = 0.0


@dataclass
class View:
    """The link of one layer, from the moment at which its router speaks."""

    m: Tiers
    now: float  # second of the replay at which the router speaks
    key: tuple[int, int] | None  # (step, layer) of draws; None: as a decision sees it, without draws, the rate held
    base: bool = False  # the rate of `link.bandwidth`, as the clairvoyant time has it

    def held(self) -> float:
        return self.m.B_l if self.base else rate_at(self.m, self.now)

    def send(self, volume: float, start: float, item: tuple[int, int, int], cap: float = math.inf) -> Transfer:
        """Send bytes reliably, from `start` after the router's word on."""
        m = self.m
        if self.key is None:
            return Transfer(volume / min(self.held(), cap))
        if not m.loss:
            return Transfer(carry_s(m, volume, self.now + start + m.t_l, cap))
        R = resends(m.loss, math.ceil(volume / m.mtu_bytes), draw(m.link_seed, *self.key, *item))
        more = sum(m.loss**round_ for round_ in range(1, R + 1))
        body_s = carry_s(m, volume * (1 + more), self.now + start + m.t_l, cap) + R * m.rto_s
        return Transfer(body_s, volume * more)

    def send_rows(self, volume: float, start: float, device: int, direction: int) -> Transfer:
        """Send activations."""
        m = self.m
        if m.relaxed and self.key is not None:
            return Transfer(carry_s(m, volume, self.now + start + m.t_l, math.inf))
        return self.send(volume, start, (device, direction, 0))

    def fetch(self, layer: int, e: int, units, start: float = 0.0) -> Transfer:
        """Fetch an expert."""
        return self.send(self.m.W[layer, e], start, (GPU, BACK, e), self.m.cap(units))


def lost_pairs(m: Tiers, key: tuple[int, int], device: int, rows_of: list[list[int]]) -> list[set[int]]:
    """Return the rows of each unit that a relaxed transfer loses, out or back; rows_of: what each gets."""
    lost: list[set[int]] = [set() for _ in rows_of]
    size, at = m.activation_row_bytes, 0
    for u, rows in enumerate(rows_of):
        for row in rows:
            first, last = math.floor(at * size / m.mtu_bytes), math.ceil((at + 1) * size / m.mtu_bytes)
            packets = [(direction, i) for direction in (OUT, BACK) for i in range(first, last)]
            if any(draw(m.link_seed, *key, device, direction, i) < m.loss for direction, i in packets):
                lost[u].add(row)
            at += 1
    return lost
