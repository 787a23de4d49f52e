"""`foresee` (timing model, section 7), slowly: every list is sorted, every minimum taken over all residents."""

from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from support.oracle_layer import DECODE, Machine, OracleTrace

Expert = tuple[int, int]


def power(x: float, n: int) -> float:
    """x to the n: the factors x, x*x, ... that the binary digits of n name, from the lowest on."""
    result = 1.0
    for digit in reversed(f"{n:b}"):
        result = result * x if digit == "1" else result
        x = x * x
    return result


def scaled(p: np.ndarray, k: int) -> np.ndarray:
    """Scale to a sum of k, each at most 1; eight sums, of every 8th expert each, are added up."""
    total = reduce(add, (reduce(add, p[first::8].tolist(), 0.0) for first in range(8)))
    return np.minimum(p * (k / total), 1.0) if total > 0 else p


@dataclass
class Table:
    """Who follows whom in a layer: float32 [E, E]."""

    values: np.ndarray
    count: list[int]

    def learn(self, sources: list[int], chosen: list[int]) -> None:
        for j in sources:
            self.count[j] += 1
            rate = np.float32(max(1 / 32, 1.0 / (self.count[j] + 4.0)))
            for e in range(len(self.values)):
                old = self.values[j, e]
                self.values[j, e] = old + rate * (np.float32(e in chosen) - old)

    def mean(self, sources: list[int]) -> np.ndarray:
        total = np.zeros(len(self.values))
        for j in sources:
            total = total + self.values[j].astype(float)
        return total * (1.0 / len(sources))


@dataclass
class Foresight:
    """What was learned; `worth[layer]` is what follows from it."""

    trace: OracleTrace
    machine: Machine
    policy: Any
    b: int = 1
    previous: dict[int, int | None] = field(default_factory=dict)  # of each row, its request's row before

    def __post_init__(self):
        L, E = self.machine.L, self.machine.E
        self.k = self.trace.experts.shape[2]
        start = self.k / E
        self.fast, self.slow, self.follow, self.now, self.long = (np.full((L, E), start) for _ in range(5))
        self.M, self.X = ([Table(np.full((E, E), start, np.float32), [0] * E) for _ in range(L)] for _ in range(2))
        self.D = min(self.given("ahead_layers", 6), L - 1)
        self.step_of, latest = {}, {}
        for step in range(self.trace.steps):
            for row in self.trace.rows_of(step):
                request = int(self.trace.request[row])
                self.previous[row], self.step_of[row] = latest.get(request), step
                latest[request] = row

    def given(self, name: str, default: Any) -> Any:
        value = getattr(self.policy, name, None)
        return default if value is None else value

    def worth(self, key: Expert) -> float:
        return float(self.given("now_weight", 1.0) * self.now[key] + self.given("long_weight", 2.0) * self.long[key])

    def choices(self, row: int | None, layer: int) -> list[int]:
        return [] if row is None else [int(e) for e in self.trace.experts[row, layer] if e >= 0]

    def rho(self, layer: int) -> float:
        m = self.machine
        first = next((e for e in range(m.E) if m.W[layer, e] > 0), None)  # others are remote
        if m.home is None or self.policy.dispatch == "gpu" or first is None:  # nothing runs there
            return 0.0
        share = 1 if m.home_is_cpu else self.share(layer, first)
        return m.flop_per_row / (share * m.home.F) / (m.W[layer, first] / (share * m.home.B) + m.lone_start(m.home))

    def share(self, layer: int, e: int) -> int:
        """Return the number of units that share an expert."""
        kind, _, g = self.policy.placement.partition(":")
        if kind == "tp":
            return int(g or self.machine.N)
        is_spread = kind == "striped" or (kind == "mixed" and self.policy.layout.get((layer, e)) == "striped")
        return self.machine.N if is_spread else 1

    def see(self, step: int, layer: int, n: dict[int, int]) -> None:
        """The router of a layer has spoken."""
        rows = [int(row) for row in self.trace.rows_of(step)]
        decode = self.trace.phase(step) == DECODE
        if decode:
            self.b = len(rows)
        there = sum(bool(self.choices(row, layer)) for row in rows)
        if there:
            load = np.array([n.get(e, 0) / there for e in range(self.machine.E)])
            self.fast[layer] += (1.0 - (3 / 4) ** (there / self.b)) * (load - self.fast[layer])
            self.slow[layer] += (1.0 - (63 / 64) ** (there / self.b)) * (load - self.slow[layer])
        for row in rows:
            self.learn(row, step, layer)
        sources = rows if decode else rows[-1:] if self.b == 1 else []
        self.expect_next(sources, layer)
        target = layer + self.D
        if self.D and (decode or (target >= self.machine.L and self.b == 1)):
            self.expect_ahead(sources, layer, target % self.machine.L)

    def learn(self, row: int, step: int, layer: int) -> None:
        chosen, before = self.choices(row, layer), self.previous[row]
        if not chosen:
            return
        if self.D and layer >= self.D:
            self.X[layer].learn(self.choices(row, layer - self.D), chosen)
        elif self.D and before is not None and self.step_of[before] < step:
            self.X[layer].learn(self.choices(before, layer - self.D + self.machine.L), chosen)
        self.M[layer].learn(self.choices(before, layer), chosen)

    def hope(self, layer: int) -> np.ndarray:
        return 1 / 8 * self.fast[layer] + 7 / 8 * self.slow[layer]

    def expect_next(self, sources: list[int], layer: int) -> None:
        E, b, rho, slow = self.machine.E, self.b, self.rho(layer), self.slow[layer]
        follows = self.given("follows", True)
        means = [self.M[layer].mean(c) for row in sources if follows and (c := self.choices(row, layer))]
        u, v, total = np.ones(E), np.zeros(E), np.zeros(E)
        for m in means:
            p = scaled(self.hope(layer) * (m * (1.0 / (slow + 0.1))), self.k)
            u, v, total = u * (1.0 - p), v + p, total + m
        if means:
            self.follow[layer] += 1 / 4 * (total * (1.0 / len(means)) - self.follow[layer])
        else:
            hope = self.hope(layer)
            u, v = np.array([power(1.0 - h, b) for h in hope.tolist()]), b * hope
        self.now[layer] = np.maximum(1.0 - u, rho * v)
        p = scaled(slow * (self.follow[layer] * (1.0 / (slow + 0.1))) if follows else slow.copy(), self.k)
        none = np.array([power(1.0 - x, b) for x in p.tolist()])
        self.long[layer] = np.maximum(1.0 - none, rho * b * p)

    def expect_ahead(self, sources: list[int], layer: int, target: int) -> None:
        means = [self.X[target].mean(c) for row in sources if (c := self.choices(row, layer))]
        u, v = np.ones(self.machine.E), np.zeros(self.machine.E)
        for m in means:
            lift = m * (1.0 / (self.slow[target] + 0.1))
            p = scaled(self.hope(target) * (lift * lift), self.k)
            u, v = u * (1.0 - p), v + p
        if means:
            self.now[target] = np.maximum(1.0 - u, self.rho(target) * v)

    def requeue(self, memory: Any, fetched: list[Expert]) -> None:
        """Make the queue of a `Memory` anew: what has begun and is still worth it, then the best."""
        m = self.machine
        bar = min((self.worth(key) for key in memory.copies), default=0.0) if not memory.room(0) else 0.0
        for entry in list(memory.queue):
            if not (entry.complete or (entry.started and self.worth(entry.key) > bar)):
                memory.leave(entry)
        barred = {*memory.copies, *fetched, *(entry.key for entry in memory.queue)}
        keys = [(layer, e) for layer in range(m.L) for e in range(m.E) if m.W[layer, e] > 0]
        best = [key for key in keys if key not in barred and self.worth(key) > bar + self.given("margin", 0.1)]
        best.sort(key=lambda key: (-self.worth(key), key))
        left = 4 - len(memory.queue) if m.slots else 0
        memory.queue += [memory.entry(key) for key in best[:left]]
        memory.queue.sort(key=lambda entry: -(self.worth(entry.key) - bar) / max(entry.left, 1e-3))
