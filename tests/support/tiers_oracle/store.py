"""What is kept: the GPU's experts (version 1's memory, with a link of version 2), and the host's beside a disk."""

import math
from dataclasses import dataclass, field

from support.oracle_entries import Entry, Expert
from support.oracle_memory import Memory
from support.tiers_oracle.domains import Relayout
from support.tiers_oracle.line import Line
from support.tiers_oracle.link import View, carried, carry_s
from support.tiers_oracle.machine import Disk, Tiers


@dataclass
class Store(Memory):
    """The GPU's copies and the prefetch queue."""

    relayout: Relayout | None = None
    view: View | None = None  # the link as the decisions of this layer see it
    evictions: int = 0  # not yet charged
    flowing_s: float = 0.0  # in which prefetches flowed

    def admit(self, key: Expert, active: set[Expert], prefetched: bool) -> bool:
        was_room = self.room(key[0])
        admitted = super().admit(key, active, prefetched)
        self.evictions += admitted and not was_room
        return admitted

    def cap(self, key: Expert) -> float:
        layer, e = key
        return self.machine.cap(self.relayout.units[layer][e])

    def flow_at(self, second: float, seconds: float) -> float:
        """Move the queue for that long from a moment on; return the seconds in which something flowed."""
        m: Tiers = self.machine
        before = self.moved_bytes
        if m.is_plain_link:
            super().flow(seconds)
            flowed = (self.moved_bytes - before) / m.B_l if m.linked else 0.0
            self.flowing_s += flowed
            return flowed
        share, flowed = 1 - m.loss, 0.0
        for entry in [entry for entry in self.queue if not entry.complete]:
            cap, left_s = self.cap(entry.key), seconds - flowed
            possible = carried(m, second + flowed, left_s, cap) * share
            if possible < entry.left:
                self.move(entry, possible)
                flowed = seconds
                if not entry.complete:
                    break
            else:
                flowed += carry_s(m, entry.left / share, second + flowed, cap)
                self.move(entry, entry.left)
        self.flowing_s += flowed
        return flowed

    def wait_at(self, second: float) -> float:
        """Wait until the queue is empty; return the seconds."""
        m: Tiers = self.machine
        if m.is_plain_link:
            waited = super().wait()
        else:
            waited = 0.0
            for entry in [entry for entry in self.queue if not entry.complete]:
                waited += carry_s(m, entry.left / (1 - m.loss), second + waited, self.cap(entry.key))
                self.move(entry, entry.left)
        self.flowing_s += waited
        return waited

    def layer_done(self, line: Line, T: int) -> None:
        super().layer_done(line, T)
        if self.policy.prefetch == "relayout":
            step, layer = self.now
            hot = self.relayout.decide(layer, self.demand[step][layer], self.resident(layer), self.view)
            self.queue_hot(layer, hot)

    def queue_hot(self, layer: int, hot: list[int]) -> None:
        """Queue as `online` does, but of these only, and all of them."""
        scores = {e: self.score.get((layer, e), 0.0) for e in range(self.machine.E)}
        residents = self.resident(layer)
        slots = [0.0] if self.room(layer) or not residents else []
        bar = min(slots + [scores[e] for e in residents])
        out = [e for e in hot if scores[e] > bar and e not in residents and not self.queued((layer, e))]
        for e in sorted(out, key=lambda e: (-scores[e], e)):
            self.queue.append(Entry((layer, e), float(self.machine.W[layer, e])))


@dataclass
class HostMemory:
    """The experts that host memory holds; the disk holds all."""

    m: Tiers
    disk: Disk
    kept: dict[Expert, int] = field(default_factory=dict)  # and the number of its admission
    touched: dict[Expert, int] = field(default_factory=dict)
    demands: dict[Expert, int] = field(default_factory=dict)
    clock: int = 0
    hits: int = 0
    misses: int = 0
    bytes: float = 0.0
    busy_s: float = 0.0

    @property
    def slots(self) -> float:
        return math.inf if self.disk.host_slots is None else self.disk.host_slots

    def read(self, layer: int, asked: list[int]) -> dict[int, float]:
        """Return when each expert that is not here has been read; asked: in demand order, none on the GPU."""
        free, reads = 0.0, {}
        for e in asked:
            if (layer, e) in self.kept:
                self.hits += 1
                continue
            self.misses += 1
            took = self.m.W[layer, e] / self.disk.B + self.disk.latency_s
            free += took
            reads[e] = free
            self.bytes += self.m.W[layer, e]
            self.busy_s += took
        return reads

    def victim_key(self, key: Expert) -> tuple:
        kind = self.disk.host_residency
        first = {"lru": 0, "fifo": self.kept[key], "lfu": self.demands.get(key, 0)}[kind]
        return (first, self.touched.get(key, -1), *key)

    def layer_done(self, layer: int, asked: list[int], active: set[int]) -> None:
        """Count, then touch and admit in demand order; nobody goes for an expert of the same layer."""
        for e in asked:
            self.demands[layer, e] = self.demands.get((layer, e), 0) + 1
        for e in asked:
            key = (layer, e)
            if key not in self.kept:
                if len(self.kept) >= self.slots:
                    victims = [other for other in self.kept if not (other[0] == layer and other[1] in active)]
                    if not victims:
                        continue
                    del self.kept[min(victims, key=self.victim_key)]
                self.kept[key] = self.clock
            self.clock += 1
            self.touched[key] = self.clock
