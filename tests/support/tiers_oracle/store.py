"""What is kept: the GPU's experts (version 1's memory, with a link of version 2), and the host's beside a disk."""

import math
from dataclasses import dataclass
from dataclasses import replace as with_changes

from support.oracle_entries import Entry, Expert
from support.oracle_layer import OracleTrace, demand_order
from support.oracle_memory import Memory
from support.tiers_oracle.domains import Relayout
from support.tiers_oracle.line import Line
from support.tiers_oracle.link import View, carried, carry_s
from support.tiers_oracle.machine import Disk, Plain, Tiers


@dataclass
class Store(Memory):
    """The GPU's copies and the prefetch queue."""

    relayout: Relayout | None = None
    host: "HostMemory | None" = None
    view: View | None = None  # the link as the decisions of this layer see it
    evictions: int = 0  # not yet charged
    flowing_s: float = 0.0  # in which prefetches flowed

    def admit(self, key: Expert, active: set[Expert], prefetched: bool) -> bool:
        was_room = self.room(key[0])
        admitted = super().admit(key, active, prefetched)
        self.evictions += admitted and not was_room
        return admitted

    def cap(self, entry: Entry) -> float:
        """Bytes/s, resent ones too, that the place gives from which it is read; a disk reads each byte once."""
        layer, e = entry.key
        if self.reads(entry):
            return self.host.disk.B / (1 - self.machine.loss)
        return self.machine.cap(self.relayout.units[layer][e])

    def forget(self) -> None:
        super().forget()
        self.relayout.forget()

    def flow_at(self, second: float, seconds: float, disk_s: float = 0.0) -> float:
        """Move the queue for that long from a moment on; return the seconds in which something flowed.

        disk_s: those of them that the disk has for it; what host memory lacks waits when they are over.
        """
        m: Tiers = self.machine
        before = self.moved_bytes
        if m.is_plain_link and not self.host:
            super().flow(seconds)
            flowed = (self.moved_bytes - before) / m.B_l if m.linked else 0.0
            self.flowing_s += flowed
            return flowed
        flowed = 0.0
        for entry in [entry for entry in self.queue if not entry.complete]:
            from_disk = self.reads(entry)
            left_s = min(seconds - flowed, disk_s) if from_disk else seconds - flowed
            possible = carried(m, second + flowed, left_s, self.cap(entry)) * (1 - m.loss)
            moved, took = entry.left, left_s
            if possible < entry.left:
                moved = possible
            else:
                took = self.whole_s(entry, second + flowed)
            self.move(entry, moved)
            flowed += took
            if from_disk:
                disk_s -= took
                self.host.ahead(moved, took)
            if not entry.complete and flowed >= seconds:
                break
        self.flowing_s += flowed
        return flowed

    def wait_at(self, second: float) -> float:
        """Wait until the queue is empty; return the seconds."""
        m: Tiers = self.machine
        if m.is_plain_link and not self.host:
            waited = super().wait()
        else:
            waited = 0.0
            for entry in [entry for entry in self.queue if not entry.complete]:
                took = self.whole_s(entry, second + waited)
                waited += took
                if self.reads(entry):
                    self.host.ahead(entry.left, took)
                self.move(entry, entry.left)
        self.flowing_s += waited
        return waited

    def reads(self, entry: Entry) -> bool:
        """Whether the disk has to read it, as host memory lacks it."""
        return self.host is not None and entry.key not in self.host.copies

    def whole_s(self, entry: Entry, second: float) -> float:
        """Return how long what is left of it takes from a moment on."""
        return carry_s(self.machine, entry.left / (1 - self.machine.loss), second, self.cap(entry))

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
class HostMemory(Memory):
    """The experts that host memory holds, as a GPU of so many slots that all layers share; the disk holds all."""

    disk: Disk | None = None
    hits: int = 0
    misses: int = 0
    bytes: float = 0.0
    busy_s: float = 0.0

    @classmethod
    def of(cls, trace: OracleTrace, m: Tiers, policy: Plain) -> "HostMemory":
        slots = math.inf if m.disk.host_slots is None else m.disk.host_slots
        own = with_changes(policy, scope="global", residency=m.disk.host_residency, prefetch="none", budget=None)
        nothing = [[{} for _ in range(m.L)] for _ in range(trace.steps)]
        return cls(trace, with_changes(m, slots=slots), own, own.residency, nothing, disk=m.disk)

    def read(self, layer: int, asked: list[int]) -> dict[int, float]:
        """Return when each expert that is not here has been read; asked: in demand order, none on the GPU."""
        free, reads = 0.0, {}
        for e in asked:
            if (layer, e) in self.copies:
                self.hits += 1
                continue
            self.misses += 1
            took = self.machine.W[layer, e] / self.disk.B + self.disk.latency_s
            free += took
            reads[e] = free
            self.bytes += self.machine.W[layer, e]
            self.busy_s += took
        return reads

    def ahead(self, volume: float, seconds: float) -> None:
        """Count what passes through to the GPU before anybody demands it."""
        self.bytes += volume
        self.busy_s += seconds

    def asked(self, step: int, layer: int, reached: dict[int, int], active: set[int], T: int) -> None:
        """Count, then touch and admit in demand order; nobody goes for an expert of the same layer.

        reached: the rows of those that were not on the GPU; active: these and all others.
        """
        self.now = (step, layer)
        self.demand[step][layer] = reached
        for e in reached:
            self.demand_steps.setdefault((layer, e), []).append(step)
        self.update_scores(layer, reached, T)
        before, stay = set(self.copies), {(layer, e) for e in active}
        for e in demand_order(reached):
            key = (layer, e)
            if key in self.copies or self.admit(key, stay, False):
                self.touches += 1
                self.touched[key] = self.touches
                self.copies[key].demands += 1
                self.copies[key].visited = key in before
