"""One layer on a machine with more tiers, in plain numbers: its time line and dispatches, as the text has them.

Everything is computed from scratch for each plan. `Layer.view()` is the same layer as the kernels take it.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from moetrace.engine.state import ACTIVE, GROUP, OWN, View, records
from moetrace.engine.tiers.tier_records import TERM, new_tiers

HOME, GPU, CPU = 0, 1, 2
TIES = (GPU, CPU, HOME)


def less(a, b):
    return a < b * (1 - 1e-12)


@dataclass
class Expert:
    rows: int
    resident: bool
    gpu: float
    fetch: float
    cpu: float
    home: float
    unit: int
    outside: float = 0.0


@dataclass
class Layer:
    experts: list[Expert]
    units: int = 1
    share: int = 1
    rows: int = 8
    row_s: float = 0.0
    latency: float = 0.0
    gpu_start: float = 0.0
    home_start: float = 0.0
    term: dict = field(default_factory=dict)

    def __getattr__(self, name):
        if name == "term" or name not in (TERM.names or ()):
            raise AttributeError(name)
        return self.term.get(name, new_tiers(1).term[name][0])

    def view(self):
        """Return the layer as kernels take it, and what must stay alive as long."""
        n = len(self.experts)
        active, groups, own, term = records(n, ACTIVE), records(self.units, GROUP), records(1, OWN), new_tiers(1).term
        for name, value in self.term.items():
            term[name] = value
        for i, e in enumerate(self.experts):
            given = {"expert": i, "group": e.unit, "rows": e.rows, "ndp_s": e.home, "gpu_s": e.gpu, "cpu_s": e.cpu}
            given |= {"fetch_s": 0.0 if e.resident else e.fetch, "outside_s": e.outside, "resident": e.resident}
            for name, value in given.items():
                active[name][i] = value
        active["turn"] = sorted(range(n), key=lambda i: not self.experts[i].resident)
        own["term_at"] = term.ctypes.data
        start = (self.gpu_start, self.home_start, 0, 0.0, 0.0, 0)
        of_layer = (0, 1, self.rows, 0, self.share, self.row_s, self.latency, 0.3, 0, 1.0, 0.0)
        return View(*of_layer, *start, active, groups, own.ctypes.data), (own, term)

    def ends(self, plan):
        """Return when GPU, CPU and each unit end, None for what runs nothing; and the layer's seconds."""
        of = [[e for e, to in zip(self.experts, plan, strict=True) if to == device] for device in (HOME, GPU, CPU)]
        busy, unit_rows = [0.0] * self.units, [0] * self.units
        for e in of[HOME]:
            busy[e.unit] += e.home
            unit_rows[e.unit] += e.rows
        works = {e.unit for e in of[HOME]}
        for e in [*of[CPU], *(e for e in of[GPU] if not e.resident)]:
            busy[e.unit] += e.outside
        out = sum(min(self.rows, rows) for rows in unit_rows) * self.share
        if self.sends_once:
            out = min(self.rows, sum(unit_rows))
        units, home = [None] * self.units, 0.0
        if works:
            busiest = max(busy[u] + self.home_start for u in works)
            chunks = self.chosen(out * self.row_s, busiest, self.home_chunks, self.home_command_s)
            exchange = lambda c: self.exchange(out * self.row_s, c, chunks, self.home_command_s)  # noqa: E731
            units = [exchange(busy[u] + self.home_start) if u in works else None for u in range(self.units)]
            home = exchange(busiest)
        cpu = None
        if of[CPU]:
            rows_s, work = min(self.rows, sum(e.rows for e in of[CPU])) * self.row_s, sum(e.cpu for e in of[CPU])
            work += self.cpu_layer_s
            chunks = self.chosen(rows_s, work, self.cpu_chunks, self.cpu_command_s)
            cpu = self.exchange(rows_s, work, chunks, self.cpu_command_s)
        gpu = self.gpu_end(of[GPU]) if of[GPU] else None
        return gpu, cpu, units, max(gpu or 0.0, cpu or 0.0, home)

    def moe(self, plan):
        return self.ends(plan)[3]

    def gpu_end(self, experts):
        free = sum(e.gpu for e in experts if e.resident)
        free += self.gpu_start if any(e.resident for e in experts) else 0.0
        link = 0.0
        for e in experts:
            if not e.resident:
                begun, link = link, link + e.fetch
                free = self.fetched(free, begun, link, e.gpu)
        return free

    def fetched(self, free, begun, end, work):
        if self.stream == 0:
            return max(max(free, begun) + work, end)
        part = (end - begun) / self.stream
        return max(max(free, begun + part) + work, end + work / self.stream)

    def exchange(self, out, work, chunks, command):
        x, c = out / chunks + self.latency, work / chunks + (command if chunks > 1 else 0.0)
        return x + c + x + (chunks - 1) * max(x, c)

    def chosen(self, out, work, chunks, command):
        if chunks:
            return chunks
        best = 1
        for count in (2, 4, 8, 16, 32, 64):
            if less(self.exchange(out, work, count, command), self.exchange(out, work, best, command)):
                best = count
        return best

    def own(self, e, device):
        if device == GPU:
            return e.gpu if e.resident else self.fetched(0.0, 0.0, e.fetch, e.gpu)
        return e.cpu if device == CPU else e.home

    def devices(self):
        return [device for device in TIES if device != CPU or self.has_cpu]

    def least(self, times):
        """Return the first device of least time, of pairs of device and time in the order of ties."""
        best = times[0]
        for one in times[1:]:
            if less(one[1], best[1]):
                best = one
        return best

    def cheapest(self):
        return [self.least([(d, self.own(e, d)) for d in self.devices()])[0] for e in self.experts]

    def bottleneck(self):
        plan = self.cheapest()
        while True:
            gpu, cpu, units, moe = self.ends(plan)
            resources = [((GPU, None), gpu), ((CPU, None), cpu), *(((HOME, u), end) for u, end in enumerate(units))]
            resources = [(who, -1.0 if end is None else end) for who, end in resources]
            (device, u), end = resources[0]
            for who, its_end in resources[1:]:
                if less(end, its_end):
                    (device, u), end = who, its_end
            of = [i for i, to in enumerate(plan) if to == device and (u is None or self.experts[i].unit == u)]
            if not of:
                return plan
            i = of[0]
            for j in of[1:]:
                if less(self.own(self.experts[i], device), self.own(self.experts[j], device)):
                    i = j
            moved = [(d, self.moe([*plan[:i], d, *plan[i + 1 :]])) for d in self.devices() if d != device]
            to, its_moe = self.least(moved)
            if not less(its_moe, moe):
                return plan
            plan[i] = to

    def balance(self):
        plan = [HOME] * len(self.experts)
        for i in sorted(range(len(plan)), key=lambda i: not self.experts[i].resident):
            moved, now = [*plan[:i], GPU, *plan[i + 1 :]], self.moe(plan)
            if less(self.moe(moved), now) or (self.experts[i].resident and not less(now, self.moe(moved))):
                plan = moved
        return plan

    def hot(self):
        plans = [[GPU] * h + [HOME] * (len(self.experts) - h) for h in range(len(self.experts) + 1)]
        return self.least([(plan, self.moe(plan)) for plan in plans])[0]

    def optimal(self):
        best, best_moe = None, np.inf
        plans = itertools.product(range(3 if self.has_cpu else 2), repeat=len(self.experts))
        for plan in sorted(plans, key=lambda plan: (len(away(plan)), away(plan), plan)):
            if less(moe := self.moe(plan), best_moe):
                best, best_moe = list(plan), moe
        return best


def away(plan):
    return [i for i, to in enumerate(plan) if to != HOME]


@st.composite
def layers(draw, most=8, with_cpu=None):
    """Draw a layer; seconds are small integers, so that ties happen."""
    units = draw(st.integers(1, 3))
    number = st.integers(1, 6).map(float)
    nothing_or = st.sampled_from([0.0, 0.0, 0.5, 2.0])
    has_cpu = draw(st.booleans()) if with_cpu is None else with_cpu
    contends = draw(st.booleans())

    def expert(rows):
        fields = {name: draw(number) for name in ("gpu", "cpu", "home")}
        fields["cpu"] = fields["cpu"] if has_cpu else np.inf
        resident, unit = draw(st.integers(0, 3)) == 0, draw(st.integers(0, units - 1))
        outside = draw(nothing_or) if contends else 0.0
        return Expert(rows, resident, fetch=draw(number), unit=unit, outside=outside, **fields)

    rows = sorted(draw(st.lists(st.integers(1, 4), min_size=1, max_size=most)), reverse=True)
    term = {
        "has_cpu": has_cpu,
        "contends": contends,
        "stream": draw(st.sampled_from([0, 1, 1, 2, 8])),
        "home_chunks": draw(st.sampled_from([0, 1, 1, 4])),
        "cpu_chunks": draw(st.sampled_from([0, 1, 1, 4])),
        "home_command_s": draw(nothing_or) / 8,
        "cpu_command_s": draw(nothing_or) / 8,
        "cpu_layer_s": draw(nothing_or),
        "sends_once": draw(st.booleans()),
    }
    fields = {name: draw(nothing_or) / 4 for name in ("row_s", "latency", "gpu_start", "home_start")}
    return Layer(
        [expert(n) for n in rows], units, draw(st.integers(1, 2)), draw(st.integers(4, 8)), term=term, **fields
    )
