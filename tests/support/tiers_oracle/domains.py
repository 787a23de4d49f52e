"""Memory domains (section F): which units hold an expert now, and what moves between layouts."""

import math
from dataclasses import dataclass, field

from support.oracle_entries import DONE_BYTES, Expert
from support.oracle_layer import less, place
from support.tiers_oracle.choose import gpu_cost_s
from support.tiers_oracle.line import Situation
from support.tiers_oracle.link import View
from support.tiers_oracle.machine import Plain, Tiers, Units


def first_layout(m: Tiers, policy: Plain) -> list[list[Units]]:
    """Return the units of [layer][expert] at the start."""
    everywhere = list(range(m.N))
    if m.home_is_cpu or not m.N or policy.placement not in ("striped", "mixed"):
        return [list(units) for units in place(policy, m)]
    if policy.placement == "striped":
        return [[everywhere] * m.E for _ in range(m.L)]
    units: list[list[Units]] = [[[e % m.N] for e in range(m.E)] for _ in range(m.L)]
    for (layer, e), where in policy.layout.items():
        units[layer][e] = everywhere if where == "striped" else [int(where)]
    return units


@dataclass(eq=False)
class Move:
    """An expert on its way to another layout."""

    key: Expert
    to: Units
    left: float


@dataclass
class Relayout:
    """What decides the layout again after each layer, and carries it out."""

    m: Tiers
    policy: Plain
    units: list[list[Units]]
    foreseen: dict[Expert, float] = field(default_factory=dict)  # n^
    moves: list[Move] = field(default_factory=list)
    moved_bytes: float = 0.0
    moved_s: float = 0.0

    def flow(self, seconds: float) -> None:
        """Move for that long, first come first served."""
        while self.moves and seconds > 0:
            move = self.moves[0]
            layer, e = move.key
            rate = min(self.m.move_bytes_s, self.m.cap(self.units[layer][e]))
            carried = min(move.left, seconds * rate)
            took = seconds if carried < move.left else carried / rate
            move.left -= carried
            seconds -= took
            self.moved_bytes += carried
            self.moved_s += took
            if move.left <= DONE_BYTES:
                self.units[layer][e] = move.to
                self.moves.pop(0)

    def forget(self) -> None:
        """Begin cold: nothing is foreseen, nothing is on its way, and all stands where it did at the start."""
        self.foreseen.clear()
        self.moves.clear()
        self.units = first_layout(self.m, self.policy)

    def pending(self, key: Expert) -> Move | None:
        return next((move for move in self.moves if move.key == key), None)

    def decide(self, layer: int, n: dict[int, int], resident: set[int], view: View) -> list[int]:
        """Update n^, ask for moves, and return who is foreseen on the GPU."""
        alpha = self.policy.alpha
        for e in range(self.m.E):
            self.foreseen[layer, e] = alpha * n.get(e, 0) + (1 - alpha) * self.foreseen.get((layer, e), 0.0)
        hoped = {e: self.foreseen[layer, e] for e in range(self.m.E) if self.foreseen[layer, e] > 0}
        s = Situation(layer, hoped, 0, resident, self.units[layer])
        device = {e: self.device(s, view, e) for e in s.order}
        everywhere = list(range(self.m.N))
        unit = self.units_of(s, [e for e in s.order if device[e] == "home"])
        for e in s.order:  # in this order they join the queue
            if device[e] != "gpu":
                self.ask((layer, e), everywhere if device[e] == "cpu" else [unit[e]])
        return [e for e in s.order if device[e] == "gpu"]

    def device(self, s: Situation, view: View, e: int) -> str:
        """Return the device of least own cost for the rows that are foreseen; ties GPU, CPU, home."""
        m, n = self.m, s.n[e]
        everywhere = list(range(m.N))
        own = {
            "gpu": gpu_cost_s(m, s, view, e),
            "cpu": m.cpu_cost_s(s.layer, e, n, everywhere) if m.cpu else math.inf,
            "home": m.home_s(s.layer, e, n, 1),
        }
        best = min(own.values())
        return next(name for name, cost in own.items() if not less(best, cost))

    def units_of(self, s: Situation, experts: list[int]) -> dict[int, int]:
        """Keep who is on one unit, or goes there; send the others to the unit of least predicted seconds."""
        predicted, unit = [0.0] * self.m.N, {}
        for e in experts:
            move = self.pending((s.layer, e))
            here, there = self.units[s.layer][e], move.to if move else []
            target = there if len(there) == 1 else here if len(here) == 1 else None
            if target is not None:
                unit[e] = target[0]
                predicted[unit[e]] += self.m.home_s(s.layer, e, s.n[e], 1)
        for e in experts:
            if e not in unit:
                unit[e] = 0
                for u in range(1, self.m.N):
                    if less(predicted[u], predicted[unit[e]]):
                        unit[e] = u
                predicted[unit[e]] += self.m.home_s(s.layer, e, s.n[e], 1)
        return unit

    def ask(self, key: Expert, to: Units) -> None:
        """Let an expert go to a layout: a new move, the one under way, or none if it is there."""
        layer, e = key
        move = self.pending(key)
        if move and move.to == to:
            return
        if move:
            self.moves.remove(move)
        if self.units[layer][e] != to:
            self.moves.append(Move(key, to, float(self.m.W[key])))
