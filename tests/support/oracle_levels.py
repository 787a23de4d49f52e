"""Frequency levels under a deadline, from their text: each layer that an oracle ran is timed again by that oracle.

A replay at the top level is recorded layer by layer: the rows, who was resident, who ran what. Then `leveled` times
every layer at every level on a GPU of other rates, and gives each step the lowest level at which it is in time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from support.oracle import Replay
from support.oracle_layer import Machine, less, time_line
from support.tiers_oracle.line import time_line as time_tiers_line
from support.tiers_oracle.link import View
from support.tiers_oracle.run import Tale


@dataclass
class Level:
    """One row of `[[gpu.levels]]`."""

    frequency: float
    voltage: float


@dataclass
class Leveled:
    """What a replay under a deadline yields: lists over the steps, and the GPU's account."""

    level: list[int] = field(default_factory=list)  # 0 = the top, which comes first
    duration_s: list[float] = field(default_factory=list)
    dense_s: list[float] = field(default_factory=list)
    moe_s: list[float] = field(default_factory=list)
    head_s: list[float] = field(default_factory=list)
    top_s: list[float] = field(default_factory=list)
    gpu_busy_s: list[float] = field(default_factory=list)
    in_time: list[bool] = field(default_factory=list)
    layer_moe_s: np.ndarray | None = None  # [L], over all steps

    def above_idle_j(self, levels: list[Level], active_w: float, idle_w: float) -> float:
        """Sum of (active - idle)*f*v^2*busy."""
        return sum(
            (active_w - idle_w) * levels[n].frequency * levels[n].voltage ** 2 * busy_s
            for n, busy_s in zip(self.level, self.gpu_busy_s, strict=True)
        )


# How to time a layer on another machine: (seconds before its experts, moe, the GPU's busy seconds).
Retime = Callable[[Machine], tuple[float, float, float]]


class RecordedReplay(Replay):
    """A replay that remembers how each of its layers went."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.retimes: list[list[Retime]] = []

    def run_step(self, step: int) -> dict[str, float]:
        self.retimes.append([])
        return super().run_step(step)

    def run_layer(self, step: int, layer: int, T: int, C: int) -> dict[str, float]:
        self.context = C
        return super().run_layer(step, layer, T, C)

    def split(self, layer, n, T, resident, arrived=True):
        line = super().split(layer, n, T, resident, arrived)
        if arrived:  # the clairvoyant run asks, too
            self.last = T, set(resident), line
        return line

    def account(self, layer, n, line, dense_s, demand_bytes) -> None:
        super().account(layer, n, line, dense_s, demand_bytes)
        (T, resident, same), C = self.last, self.context
        assert same is line
        share, units = line.share, self.units[layer]

        def retime(m: Machine) -> tuple[float, float, float]:
            again = time_line(m, layer, n, T, set(line.on_gpu), set(line.on_cpu), resident, units, share)
            return m.dense_s(T, C) + m.overhead_s, again.moe, m.dense_s(T, C) + again.gpu_busy

        self.retimes[-1].append(retime)


class RecordedTale(Tale):
    """The same of version 2's oracle, without draws and rates over time."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.retimes: list[list[Retime]] = []

    def run_step(self, step: int):
        self.retimes.append([])
        return super().run_step(step)

    def account(self, s, line, dense_s, key) -> None:
        super().account(s, line, dense_s, key)
        C, before_s = self.context(key[0]), self.m.dense_s(s.T, self.context(key[0]))
        clock, units = self.clock, list(s.units)
        layer = replace(s, resident=set(s.resident), units=units, reads=dict(s.reads))
        G, on_cpu, chunks = set(line.on_gpu), set(line.on_cpu), (line.home.chunks, line.cpu.chunks)
        assert dense_s == before_s

        def retime(m: Machine) -> tuple[float, float, float]:
            again = time_tiers_line(m, layer, View(m, clock, key), G, on_cpu, chunks)
            return m.dense_s(s.T, C) + m.overhead_s, again.moe, m.dense_s(s.T, C) + again.gpu_busy

        self.retimes[-1].append(retime)


def at_level(m: Machine, level: Level, memory_scales: bool) -> Machine:
    """Return the machine with its GPU at a level."""
    memory = level.frequency if memory_scales else 1.0
    return replace(m, gpu=replace(m.gpu, F=m.gpu.F * level.frequency, B=m.gpu.B * memory))


def leveled(
    retimes: list[list[Retime]],
    m: Machine,
    levels: list[Level],
    deadline_s: float,
    *,
    memory_scales: bool = False,
    wait_s: list[float] | None = None,
    evict_s: list[float] | None = None,
) -> Leveled:
    """Choose the level of each step; `wait_s` and `evict_s` of a step do not depend on it."""
    found = Leveled(layer_moe_s=np.zeros(m.L))
    machines = [at_level(m, level, memory_scales) for level in levels]
    for step, of_layers in enumerate(retimes):
        waited_s, evicted_s = (sums[step] if sums else 0.0 for sums in (wait_s, evict_s))
        tried = []
        for machine in machines:
            before_s, moe_s, busy_s = zip(*(retime(machine) for retime in of_layers), strict=True)
            dense_s, head_s = sum(before_s) + evicted_s, machine.head_s()
            duration_s = dense_s + sum(moe_s) + head_s + waited_s
            tried.append((duration_s, dense_s, moe_s, head_s, sum(busy_s) + head_s))
        in_time = [n for n, (duration_s, *_) in enumerate(tried) if not less(deadline_s, duration_s)]
        level = max(in_time, default=0)
        duration_s, dense_s, moe_s, head_s, busy_s = tried[level]
        found.layer_moe_s += moe_s
        for name, value in (
            ("level", level),
            ("duration_s", duration_s),
            ("dense_s", dense_s),
            ("moe_s", sum(moe_s)),
            ("head_s", head_s),
            ("top_s", tried[0][0]),
            ("gpu_busy_s", busy_s),
            ("in_time", bool(in_time)),
        ):
            getattr(found, name).append(value)
    return found
