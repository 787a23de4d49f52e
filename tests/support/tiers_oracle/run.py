"""The steps of a replay, and the sums."""

import math
from collections.abc import Callable
from dataclasses import replace as with_changes

import numpy as np

from support.oracle import union_s
from support.oracle_layer import DECODE, OracleTrace, demand_order
from support.tiers_oracle.choose import Places, choose, is_exhaustive
from support.tiers_oracle.domains import Relayout, first_layout
from support.tiers_oracle.figures import Figures, Step
from support.tiers_oracle.functions import call, cold_start_s, remote_experts
from support.tiers_oracle.line import Line, Situation, time_line, timed
from support.tiers_oracle.link import CPU, HOME, View, lost_pairs
from support.tiers_oracle.machine import Plain, Tiers
from support.tiers_oracle.store import HostMemory, Store


def refuse(m: Tiers, policy: Plain) -> None:
    """Refuse what does not go together."""
    if m.loss >= 1:
        raise ValueError("link.loss must be below 1")
    if m.rates and min(rate for _, rate in m.rates) <= 0:
        raise ValueError("rates must be above 0")
    if m.disk and ((m.N and not m.home_is_cpu) or not m.linked):
        raise ValueError("a disk goes with a link, without NDP units")
    if policy.prefetch == "relayout" and (policy.placement, policy.residency) != ("mixed", "ewma"):
        raise ValueError("relayout goes with placement mixed and residency ewma")
    if policy.prefetch == "relayout" and m.move_bytes_s is None:
        raise ValueError("relayout needs ndp.move_gb_s")


class Tale:
    """One policy over one trace."""

    def __init__(self, trace: OracleTrace, m: Tiers, policy: Plain, user: Callable | None, with_regret: bool):
        refuse(m, policy)
        self.trace, self.m, self.policy, self.user, self.with_regret = trace, m, policy, user, with_regret
        self.remote = remote_experts(trace, m, policy)
        local = trace.experts.copy()
        for layer, experts in enumerate(self.remote):
            local[:, layer][np.isin(local[:, layer], sorted(experts))] = -1
        self.local = with_changes(trace, experts=local)  # the trace without the experts that functions run
        steps, layers = range(trace.steps), range(m.L)
        self.demand = [[self.local.demand(step, layer) for layer in layers] for step in steps]
        self.relayout = Relayout(m, policy, first_layout(m, policy))
        self.host = HostMemory.of(self.local, m, policy) if m.disk else None
        here = m.W.copy()
        for layer, experts in enumerate(self.remote):
            here[layer, sorted(experts)] = 0
        parts = {"relayout": self.relayout, "host": self.host}
        self.store = Store(self.local, with_changes(m, W=here), policy, policy.residency, self.demand, **parts)
        self.clock = 0.0
        self.has_waited = False
        self.figures = Figures()
        units = [] if m.home_is_cpu else m.home_names
        for name in ("gpu", *units, "cpu", "link_in", "link_out"):
            self.figures.add(name)

    def run(self) -> Figures:
        f, store = self.figures, self.store
        for step in range(self.trace.steps):
            if self.policy.scope == "request" and step and not self.under_way(step):
                store.forget()
            f.steps.append(self.run_step(step))
        store.finish()
        f.add("link_in", busy_s=store.flowing_s, bytes=f.prefetch_bytes, experts=store.completed)
        f.late, f.wasted, f.used = store.late, store.wasted, store.used
        f.moved_bytes, f.moved_s = self.relayout.moved_bytes, self.relayout.moved_s
        if self.host:
            f.host_hits, f.host_misses = self.host.hits, self.host.misses
            f.disk_bytes, f.disk_busy_s = self.host.bytes, self.host.busy_s
            f.add("disk", busy_s=f.disk_busy_s, experts=f.host_misses, bytes=f.disk_bytes)
        present = self.trace.experts >= 0
        f.gate_mass_total = float(sum(self.gate(*cell) for cell in np.argwhere(present)))
        return f

    def under_way(self, step: int) -> bool:
        """Whether a request has rows before the step and from there on."""
        at = int(self.trace.offset[step])
        return bool(set(self.trace.request[:at].tolist()) & set(self.trace.request[at:].tolist()))

    def gate(self, row: int, layer: int, slot: int) -> float:
        gates = self.trace.gates
        if gates is None or not math.isfinite(gates[row, layer, slot]):
            return 1 / self.trace.experts.shape[2]
        return float(gates[row, layer, slot])

    def mass(self, step: int, layer: int) -> dict[int, float]:
        """Return the sum of the gates of each expert that the step's rows choose."""
        found: dict[int, float] = {}
        for row in self.trace.rows_of(step):
            for slot, e in enumerate(self.trace.experts[row, layer].tolist()):
                if e >= 0:
                    found[e] = found.get(e, 0.0) + self.gate(row, layer, slot)
        return found

    def context(self, step: int) -> int:
        """Return C: the cached tokens that the step attends to."""
        highest: dict[int, int] = {}
        for row in self.trace.rows_of(step):
            request, position = int(self.trace.request[row]), int(self.trace.position[row])
            highest[request] = max(highest.get(request, -1), position)
        return sum(position + 1 for position in highest.values())

    def run_step(self, step: int) -> Step:
        m, store, f = self.m, self.store, self.figures
        figures = Step(start_s=self.clock, head_s=m.head_s())
        T, C = len(self.trace.rows_of(step)), self.context(step)
        late, store.moved_bytes = store.late, 0.0
        if step == 0:
            figures.cold_s = cold_start_s(m, self.policy, self.remote)
            self.clock += figures.cold_s
        if self.policy.prefetch_blocks and self.trace.phase(step) == DECODE and not self.has_waited:
            self.has_waited = True
            figures.wait_s = store.wait_at(self.clock)
            f.carrying_s += figures.wait_s
            self.clock += figures.wait_s
        for layer in range(m.L):
            self.run_layer(figures, step, layer, T, C)
        f.add("gpu", busy_s=m.head_s(), bytes=m.head_bytes)
        f.work_bound_s += m.head_s()
        f.clairvoyant_s += m.head_s()
        store.step_done(step)
        if self.host:
            self.host.step_done(step)
        figures.prefetch_bytes, figures.late = store.moved_bytes, store.late - late
        layers_s = sum(figures.dense_s) + sum(figures.moe_s)
        figures.duration_s = figures.cold_s + figures.wait_s + layers_s + figures.head_s
        self.clock = figures.start_s + figures.duration_s
        return figures

    def run_layer(self, figures: Step, step: int, layer: int, T: int, C: int) -> None:
        m, store, f, n = self.m, self.store, self.figures, self.demand[step][layer]
        dense_s = m.dense_s(T, C)
        store.admit_completed()
        evict_s = store.evictions * m.evict_s
        store.evictions = 0
        before_s = dense_s + m.overhead_s + evict_s
        f.carrying_s += store.flow_at(self.clock, before_s, before_s)
        self.relayout.flow(before_s)
        self.clock += before_s
        store.router_speaks(step, layer)
        resident = store.resident(layer)
        s = self.situation(step, layer, T, resident)
        view = View(m, self.clock, None)
        store.view = view
        decided = self.decide(s, view)
        line = timed(m, s, self.clock, (step, layer), decided)
        store.dispatched(layer, line)
        left_s, disk_s = (max(0.0, line.moe - busy_s) for busy_s in (line.fetch_s, max(s.reads.values(), default=0.0)))
        flowed = store.flow_at(self.clock + line.fetch_s, left_s, disk_s)
        returning = [(end.T - end.back_s, end.T) for end in (line.home, line.cpu)]
        f.carrying_s += union_s([(0.0, line.fetch_s + flowed), *returning])
        f.sending_s += max(line.home.out_s, line.cpu.out_s)
        store.layer_done(line, T)
        if self.host:
            self.host.asked(step, layer, {e: rows for e, rows in n.items() if e not in resident}, set(n), T)
        self.account(s, line, dense_s, (step, layer))
        self.yardsticks(s, before_s - evict_s, line.moe, decided)
        self.clock += line.moe
        figures.dense_s.append(before_s)
        figures.evict_s += evict_s
        figures.moe_s.append(line.moe)
        figures.hits.append(sum(e in resident for e in n))
        figures.misses.append(sum(e not in resident for e in n))
        figures.demand_bytes.append(math.fsum(m.W[layer, e] for e in line.fetched))
        measured = line.at_home and not m.home_is_cpu
        figures.imbalance.append(max(line.busy) / (math.fsum(line.busy) / m.N) if measured else math.nan)
        away = dict.fromkeys(self.trace.demand(step, layer).keys() - n.keys(), 3)
        figures.plan.append(line.device_of | away)
        figures.chunks.append((line.home.chunks, line.cpu.chunks))

    def situation(self, step: int, layer: int, T: int, resident: set[int]) -> Situation:
        """Return the layer as its router leaves it; the disk begins to read what host memory lacks."""
        n = self.demand[step][layer]
        away = {e: rows for e, rows in self.trace.demand(step, layer).items() if e not in n}
        s = Situation(layer, n, T, resident, list(self.relayout.units[layer]), away)
        s.calls = call(self.m, layer, away, self.policy.replicas)
        s.mass = self.mass(step, layer)
        if self.host:
            s.reads = self.host.read(layer, [e for e in s.order if e not in resident])
        return s

    def decide(self, s: Situation, view: View) -> Line:
        """Return the line that the dispatch decides on, as it sees it."""
        if self.user:
            plan = self.user(s.layer, s.order, s.n, s.resident)
            plan = plan if isinstance(plan, dict) else {e: int(e in plan) for e in s.n}
            by = {device: frozenset(e for e in plan if plan[e] == device) for device in (1, 2)}
            return time_line(self.m, s, view, by[1], by[2])
        kind = self.policy.dispatch
        self.figures.optimal_fallbacks += kind == "optimal" and not is_exhaustive(self.m, len(s.n))
        return time_line(self.m, s, view, *choose(self.m, self.policy, s, view, kind))

    def account(self, s: Situation, line: Line, dense_s: float, key: tuple[int, int]) -> None:
        """Add one layer to the parts of the machine."""
        m, f, W = self.m, self.figures, self.m.W[s.layer]
        f.add("gpu", busy_s=dense_s + line.gpu_busy, bytes=m.dense_bytes)
        for e in line.on_gpu:
            f.add("gpu", experts=1, rows=s.n[e], bytes=W[e])
        for e in line.at_home:
            g = len(s.units[e])
            for u in s.units[e]:
                f.add(m.home_names[u], experts=1, rows=s.n[e] / g, bytes=W[e] / g)
        for name, busy_s in zip(m.home_names, line.busy, strict=True):
            f.add(name, busy_s=busy_s)
        for e in line.on_cpu:
            f.add("cpu", experts=1, rows=s.n[e], bytes=W[e])
        f.add("cpu", busy_s=line.cpu_busy)
        sent, fetched = line.home.sent_bytes + line.cpu.sent_bytes, math.fsum(W[e] for e in line.fetched)
        back_s, out_s = line.home.back_s + line.cpu.back_s, line.home.out_s + line.cpu.out_s
        f.add("link_in", busy_s=line.fetch_s + back_s, experts=len(line.fetched), bytes=fetched + sent)
        f.add("link_out", busy_s=out_s, bytes=sent)
        f.resent_in_bytes += line.resent_fetching + line.home.resent_in + line.cpu.resent_in
        f.resent_out_bytes += line.home.resent_out + line.cpu.resent_out
        f.remote_s += s.calls.seconds
        f.remote_calls += s.calls.calls
        if s.away:
            read = math.fsum(W[e] for e in s.away)
            f.add("remote", busy_s=s.calls.T, experts=len(s.away), rows=sum(s.away.values()), bytes=read)
        if m.relaxed and m.loss:
            self.lose(s, line, key)

    def lose(self, s: Situation, line: Line, key: tuple[int, int]) -> None:
        """Count the gates of choices whose rows a relaxed transfer lost."""
        m, rows = self.m, self.trace.rows_of(key[0])
        whole = m.host_activations or m.home_is_cpu
        held = [set(line.at_home)] if whole else [{e for e in line.at_home if u in s.units[e]} for u in range(m.N)]
        lost: set[tuple[int, int]] = set()  # (row, slot)
        for device, of_units in ((HOME, held), (CPU, [set(line.on_cpu)])):
            ids = {row: self.local.experts[row, s.layer].tolist() for row in rows}
            rows_of = [[row for row in rows if experts & set(ids[row])] for experts in of_units]
            for experts, gone in zip(of_units, lost_pairs(m, key, device, rows_of), strict=True):
                lost |= {(row, slot) for row in gone for slot, e in enumerate(ids[row]) if e in experts}
        self.figures.gate_mass_lost += sum(self.gate(row, s.layer, slot) for row, slot in sorted(lost))

    def yardsticks(self, s: Situation, before_s: float, moe_s: float, decided: Line) -> None:
        """Add the layer to the work bound, to the clairvoyant time and to the regret."""
        m, f = self.m, self.figures
        devices = [m.gpu] + [m.home] * m.N + ([m.cpu] if m.cpu else [])
        weights_s = math.fsum(m.W[s.layer, e] for e in s.n) / sum(device.B for device in devices)
        flops_s = m.flop_per_row * sum(s.n.values()) / sum(device.F for device in devices)
        f.work_bound_s += before_s + max(weights_s, flops_s)
        ignores = not self.user and self.policy.dispatch in ("hot", "ndp", "home", "hot:ratio")
        if ignores and self.is_calm:
            f.clairvoyant_s += before_s + moe_s
        else:
            held = set() if ignores else set(demand_order(s.n)[: m.slots]) if m.linked else set(s.n)
            best = with_changes(s, resident=held, reads={})
            view = View(m, 0.0, None, base=True)
            places = self.places(best, view)
            f.clairvoyant_s += before_s + time_line(m, best, view, *places).moe
        if self.with_regret and is_exhaustive(m, len(s.n)):
            view = View(m, self.clock, None)
            best = time_line(m, s, view, *choose(m, self.policy, s, view, "optimal"))
            f.regret_s += decided.moe - best.moe
            f.regret_base_s += best.moe
            f.decisions += len(s.n)
            f.equal_decisions += sum(best.device_of[e] == device for e, device in decided.device_of.items())

    @property
    def is_calm(self) -> bool:
        """Whether a layer's time does not hang on the clock, on draws or on a disk."""
        return not self.m.loss and self.m.rates is None and self.m.disk is None

    def places(self, s: Situation, view: View) -> Places:
        if not self.user:
            return choose(self.m, self.policy, s, view, self.policy.dispatch)
        plan = self.user(s.layer, s.order, s.n, s.resident)
        plan = plan if isinstance(plan, dict) else {e: int(e in plan) for e in s.n}
        return Places(*(frozenset(e for e in plan if plan[e] == device) for device in (1, 2)))


def replay(
    trace: OracleTrace,
    machine: Tiers,
    policy: Plain,
    *,
    dispatch: Callable | None = None,
    regret: bool = False,
) -> Figures:
    """Replay a trace; `dispatch(layer, active, n, resident)` as in `support.oracle.simulate`.

    The trace may have `gates`, [rows, L, k]; without them each of a row's k choices weighs 1/k.
    """
    return Tale(trace, machine, policy, dispatch, regret).run()
