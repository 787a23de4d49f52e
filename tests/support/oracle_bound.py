"""The oracle's lower bound (timing model, section 8), written from the page: lists, and one expert after another."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from support.oracle_layer import Machine, less

BELOW, SHARE_STEP, PRICE_STEP, MOST_STEP, LEAST_PRICE = 0.98, 0.02, 0.05, 0.3, 1e-4
DONE_BYTES = 1e-3


@dataclass
class Weighing:
    """One weight of the link, the weight of the GPU beside it, and the sum so far."""

    c: float
    p: float = 0.0
    r: float = 1.0
    total_s: float = 0.0


@dataclass
class Bound:
    """The bound on its way through a trace; ``g`` units share an expert, ``room`` experts are on the GPU at most."""

    machine: Machine
    g: int
    room: int
    full: bool
    dense_s: float = 0.0
    heads_s: float = 0.0
    level: float = 0.0
    price: float = 0.0
    least_price: float = 0.0
    seen: set = field(default_factory=set)
    at: dict = field(default_factory=dict)  # the level at an expert's last demand

    def __post_init__(self):
        m = self.machine
        sizes = [float(size) for size in m.W.ravel() if size > 0]
        mean_bytes = math.fsum(sizes) / len(sizes)
        self.fetch_s = mean_bytes / m.B_l if m.linked else 0.0
        if m.home is None:
            c = 1.0 if m.linked else 0.0
        else:
            work_s = max(m.flop_per_row / self.g / m.home.F, mean_bytes / self.g / m.home.B)
            home_s = (work_s + m.home.own_start + m.sparse_s(m.home)) * self.g / m.N
            c = BELOW * home_s / (home_s + self.fetch_s)
        self.weighings = [Weighing(0.0), Weighing(c)]
        self.price = 1e9 if self.room == 0 else 0.0
        if self.full:
            everything = [(layer, e) for layer in range(m.L) for e in range(m.E)]
            self.seen, self.at = set(everything), dict.fromkeys(everything, 0.0)

    def add_step(self, demand: list[dict[int, int]], before_s: float) -> None:
        """Add a step; ``demand`` has n[e] of each layer, ``before_s`` comes before the experts of each."""
        m, held_s = self.machine, 0.0
        self.heads_s += m.head_s()
        self.dense_s += m.L * before_s
        for layer, n in enumerate(demand):
            if n:
                held_s += self.add_layer(layer, n)
            self.level += self.price / m.L
        if not 0 < self.room < len(self.seen):
            return
        if self.price == 0.0:
            self.price = sum(len(n) for n in demand) / (4 * self.room)
            self.least_price = LEAST_PRICE * self.price
        else:
            change = PRICE_STEP * (held_s / (self.fetch_s * self.price) / self.room - 1)
            self.price = max(self.price * math.exp(max(-MOST_STEP, min(MOST_STEP, change))), self.least_price)

    def add_layer(self, layer: int, n: dict[int, int]) -> float:
        """Add a layer to both sums; return what its experts held, of those that the GPU takes beside the link."""
        m = self.machine
        G = {e: m.gpu_s(layer, e, n[e], True) + m.gpu.layer_start / len(n) for e in n}
        F = {e: max(m.W[layer, e] - DONE_BYTES, 0.0) / m.B_l if m.linked else 0.0 for e in n}
        hold = {e: self.fetch_s * (self.level - self.at.get((layer, e), -math.inf)) for e in n}
        for e in n:
            hold[e] = hold[e] if self.fetch_s > 0 or (layer, e) in self.at else math.inf
            self.at[layer, e] = self.level
            self.seen.add((layer, e))
        carry = {e: min(F[e], hold[e]) for e in n}
        held = {e: hold[e] if hold[e] < F[e] else 0.0 for e in n}
        if m.home is None:
            for one in self.weighings:
                one.total_s += (1 - one.c) * sum(G.values()) + one.c * sum(carry.values())
            return sum(held.values())
        H = {e: m.home_s(layer, e, n[e], self.g) * self.g / m.N for e in n}
        act_s = m.activation_row_bytes * self.g * min(n.values()) / m.B_l + m.t_l
        a = 2 * act_s + m.home.layer_start
        y = sum(H.values()) / (sum(G.values()) + sum(H.values()))

        def on_gpu(c: float, p: float) -> set[int]:
            return {e for e in n if less(p * G[e] + c * carry[e], (1 - c - p) * H[e])}

        def weighed(c: float, p: float) -> float:
            there = on_gpu(c, p)
            of_gpu = sum(p * G[e] + c * carry[e] for e in there)
            return of_gpu + (1 - c - p) * (a + sum(H[e] for e in n if e not in there))

        held_s = 0.0
        for one in self.weighings:
            c, p = one.c, one.p
            all_there = (1 - c) * sum(G.values()) + c * sum(carry.values())
            with_gpu, without = weighed(c, p), weighed(c, 0.0)
            both = with_gpu if one is self.weighings[0] else max(with_gpu, without)
            one.total_s += min(both, all_there)
            held_s = sum(held[e] for e in on_gpu(c, 0.0 if less(with_gpu, without) else p))
            there = on_gpu(c, p)
            busier = less(a + sum(H[e] for e in n if e not in there), sum(G[e] for e in there))
            one.r = one.r + SHARE_STEP * max(1 / y - one.r, 0.0) if busier else one.r * (1 - SHARE_STEP)
            one.p = (1 - c) * y * one.r
        return held_s

    def seconds(self) -> float:
        """Return the bound: the greatest of what the two weighings leave."""
        slots = self.room * self.level if self.room else 0.0
        left = [(1 - w.c) * self.dense_s + w.total_s - w.c * self.fetch_s * slots for w in self.weighings]
        return self.heads_s + max(left)


def room_of(policy, machine: Machine, dispatch: Callable | None) -> int:
    """Return how many experts may be on the GPU at once: beside the slots, the parts that `split` runs of a queue."""
    if dispatch or policy.dispatch != "split" or policy.prefetch == "none":
        return machine.slots
    return machine.slots + 4 if policy.prefetch == "foresee" else machine.L * machine.E
