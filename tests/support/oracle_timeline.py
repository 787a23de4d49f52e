"""The slices of a timeline as the oracle sees them: section 3 of the timing model, written down layer by layer."""

from typing import Any

import numpy as np

from support.oracle import OracleTrace, Replay
from support.oracle_layer import TimeLine, demand_order, machine_of

Slice = tuple[int, int, str, str, int, float, float, float | None, float, bool | None]


class Recorder(Replay):
    """A replay that notes (step, layer, kind, unit, expert, start_s, duration_s, rows, bytes, resident); -1 = none."""

    def __init__(self, trace: OracleTrace, model: Any, system: Any, policy: Any, slots: int):
        super().__init__(trace, machine_of(trace, model, system, slots, policy.dispatch), policy, None, None)
        self.slices: list[Slice] = []
        self.start_s = self.clock_s = self.flow_s = 0.0
        self.step = 0
        self.resident: set[int] = set()
        self.move, self.memory.move = self.memory.move, self.moved
        self.dispatched, self.memory.dispatched = self.memory.dispatched, self.spoken

    def note(self, layer, kind, unit, expert, start_s, duration_s, rows, moved_bytes, resident=None) -> None:
        at_s = self.start_s + start_s
        self.slices.append((self.step, layer, kind, unit, expert, at_s, duration_s, rows, moved_bytes, resident))

    def run_step(self, step: int) -> dict[str, float]:
        self.step, self.clock_s, self.flow_s = step, 0.0, 0.0
        figures = super().run_step(step)
        self.note(-1, "head", "gpu", -1, self.clock_s, self.machine.head_s(), None, self.machine.head_bytes)
        self.start_s += figures["wait_s"] + figures["dense_s"] + figures["moe_s"] + figures["head_s"]
        return figures

    def run_layer(self, step: int, layer: int, T: int, C: int) -> dict[str, float]:
        if layer == 0:
            self.clock_s = self.flow_s  # what the step has waited
        self.flow_s, self.dense_s = self.clock_s, self.machine.dense_s(T, C)
        figures = super().run_layer(step, layer, T, C)
        self.clock_s += figures["dense_s"] + figures["moe_s"]
        return figures

    def moved(self, entry, moved_bytes: float) -> None:
        """A part of a prefetch, right after the one before."""
        if moved_bytes > 0:
            seconds = moved_bytes / self.machine.B_l
            self.note(entry.key[0], "prefetch", "link_in", entry.key[1], self.flow_s, seconds, None, moved_bytes)
            self.flow_s += seconds
        self.move(entry, moved_bytes)

    def spoken(self, layer: int, line: TimeLine) -> None:
        self.resident = self.memory.resident(layer)
        self.flow_s = self.clock_s + self.dense_s + line.fetch_s  # prefetches take what demand fetches leave
        self.dispatched(layer, line)

    def account(self, layer: int, n: dict[int, int], line: TimeLine, dense_s: float, demand_bytes: float) -> None:
        super().account(layer, n, line, dense_s, demand_bytes)
        m, router_s = self.machine, self.clock_s + dense_s
        self.note(layer, "dense", "gpu", -1, self.clock_s, dense_s, None, m.dense_bytes)
        arrival: dict[int, float] = {}
        clock_s = 0.0
        for e in line.fetched:
            self.note(layer, "fetch", "link_in", e, router_s + clock_s, m.fetch_s(layer, e), None, m.W[layer, e])
            clock_s = arrival[e] = clock_s + m.fetch_s(layer, e)
        free_s = 0.0
        for e in sorted(line.on_gpu, key=lambda e: (e not in self.resident, demand_order(n).index(e))):
            begin_s = max(free_s, arrival.get(e, 0.0))
            seconds = m.gpu_s(layer, e, n[e], e in self.resident)
            self.note(layer, "expert", "gpu", e, router_s + begin_s, seconds, n[e], m.W[layer, e], e in self.resident)
            free_s = begin_s + seconds
        if line.share:
            e, x = line.share.expert, line.share.gpu
            if line.streamed:
                seconds = line.streamed / m.B_l + m.t_l
                self.note(layer, "fetch", "link_in", e, router_s + clock_s, seconds, None, line.streamed)
                free_s = max(free_s, clock_s + seconds)
            seconds = x * (m.gpu_s(layer, e, n[e], False) - m.lone_start(m.gpu)) + m.lone_start(m.gpu)
            part = (x * n[e], x * m.W[layer, e])
            self.note(layer, "expert", "gpu", e, router_s + free_s, seconds, *part, e in self.resident)
        shared = line.share.expert if line.share else -1
        for u in range(m.N):
            unit_s = router_s + line.act
            for e in sorted(line.at_home, key=lambda e: e == shared):  # what is shared comes last
                if u in self.units[layer][e]:
                    g = len(self.units[layer][e])
                    rest = 1 - line.share.gpu if e == shared else 1.0
                    seconds = rest * (m.home_s(layer, e, n[e], g) - m.lone_start(m.home)) + m.lone_start(m.home)
                    part = (rest * n[e] / g, rest * m.W[layer, e] / g)
                    self.note(layer, "expert", f"ndp{u}", e, unit_s, seconds, *part, e in self.resident)
                    unit_s += seconds
        if line.at_home:
            self.note(layer, "activations", "link_out", -1, router_s, line.act, None, line.X)
            back_s = router_s + line.act + max(line.busy)
            self.note(layer, "activations", "link_in", -1, back_s, line.act, None, line.X)


def slices(trace: OracleTrace, model: Any, system: Any, policy: Any, slots: int) -> list[Slice]:
    """Return the slices of every step, in order of kind, unit and time."""
    recorder = Recorder(trace, model, system, policy, slots)
    recorder.run()
    return sorted(recorder.slices, key=order)


def order(each: Slice) -> tuple:
    step, layer, kind, unit, expert, start_s = each[:6]
    return (step, kind, unit, layer, expert, np.round(start_s, 12))
