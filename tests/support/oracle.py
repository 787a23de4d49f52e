"""A slow, obvious simulator of the timing model: what every kernel of the engine is held against.

It follows the page of the timing model section by section, in plain Python, and recomputes everything from scratch:
`moe` of a split is the whole time line of the layer, the victim of an eviction is the minimum over all residents,
Belady looks forward over the whole trace. It shares no code with the package: from the specs it reads raw fields only.
`oracle_layer.py` has what needs no memory (sections 1, 2, 3, 5, 6), `oracle_memory.py` what does (4, 7), this file runs
the steps, adds up and computes the yardsticks (4, 8). Where the page leaves room, a comment says how it is read.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from support.oracle_bound import Bound, room_of
from support.oracle_dispatch import dispatch, dispatch_by_cost, share_one
from support.oracle_layer import (
    DECODE,
    MIXED,
    OPTIMAL_LIMIT,
    PREFILL,
    Machine,
    OracleTrace,
    TimeLine,
    demand_order,
    machine_of,
    place,
    time_line,
)
from support.oracle_memory import Memory
from support.oracle_requests import Row, all_figures, quantile

__all__ = ["DECODE", "MIXED", "PREFILL", "OracleTrace", "Outcome", "simulate"]

STEP_SUMS: tuple[str, ...] = ("dense_s", "moe_s", "hits", "misses", "demand_bytes")
STEP_COLUMNS: tuple[str, ...] = (
    "phase",
    "rows",
    "start_s",
    "duration_s",
    "head_s",
    "wait_s",
    "overhead_s",
    "prefetch_bytes",
    "late",
    "imbalance",
)
LAYER_COLUMNS: tuple[str, ...] = (*STEP_SUMS, "gpu_experts", "ndp_experts", "cpu_experts")


@dataclass
class Outcome:
    """What a replay yields; tables are columns of arrays, NaN where a figure is undefined."""

    steps: dict[str, np.ndarray]  # phase rows start_s duration_s dense_s moe_s head_s wait_s hits misses ...
    layers: dict[str, np.ndarray]  # dense_s moe_s hits misses imbalance gpu_experts ndp_experts cpu_experts ...
    units: dict[str, np.ndarray]  # unit busy_s utilization experts rows bytes
    requests: dict[str, np.ndarray]  # request prompt_rows output_rows ttft_s tpot_s e2e_s turns tokens ...
    total_s: float
    prefill_s: float
    decode_s: float
    mixed_s: float
    tokens_per_s: float
    hits: int
    misses: int
    late: int
    wasted: int  # prefetches that brought nothing
    used: int  # prefetched copies that the GPU ran; each once
    demand_bytes: float
    prefetch_bytes: float
    imbalance_mean: float
    work_bound_s: float
    lower_bound_s: float
    clairvoyant_s: float
    optimal_fallbacks: int


class Replay:
    """One policy over one trace."""

    def __init__(self, trace: OracleTrace, machine: Machine, policy: Any, user_dispatch, user_residency):
        self.trace, self.machine, self.policy = trace, machine, policy
        self.user_dispatch = user_dispatch
        self.units = place(policy, machine)
        self.demand = [[trace.demand(step, layer) for layer in range(machine.L)] for step in range(trace.steps)]
        residency = "user" if user_residency else policy.residency
        self.memory = Memory(trace, machine, policy, residency, self.demand, user_residency)
        units = [] if machine.home_is_cpu else machine.home_names
        self.unit_names = ["gpu", *units, "cpu", "link_in", "link_out"]
        self.unit = {name: dict.fromkeys(("busy_s", "experts", "rows", "bytes"), 0.0) for name in self.unit_names}
        self.carrying_s = 0.0  # in which the link towards the GPU carries anything, however much at once
        self.steps: list[dict[str, float]] = []
        self.layers = [dict.fromkeys(LAYER_COLUMNS, 0.0) for _ in range(machine.L)]
        self.imbalance: list[list[float]] = []  # [step][layer], NaN where undefined
        self.work_bound_s = 0.0
        g = len(self.units[0][0]) if machine.home else 1
        self.bound = Bound(machine, g, room_of(policy, machine, user_dispatch), bool(self.memory.copies))
        self.clairvoyant_s = 0.0
        self.optimal_fallbacks = 0
        self.has_waited = False

    def add(self, name: str, **amounts: float) -> None:
        for column, amount in amounts.items():
            self.unit[name][column] += amount

    def run(self) -> None:
        start_s = 0.0
        for step in range(self.trace.steps):
            if self.policy.scope == "request" and step and not self.under_way(step):
                self.memory.forget()
            figures = self.run_step(step)
            figures["start_s"] = start_s
            parts = ("wait_s", "dense_s", "moe_s", "head_s")
            figures["duration_s"] = sum(figures[part] for part in parts)
            start_s += figures["duration_s"]
            self.steps.append(figures)
        self.memory.finish()
        moved = math.fsum(figures["prefetch_bytes"] for figures in self.steps)
        self.add("link_in", busy_s=moved / self.machine.B_l if moved else 0.0, bytes=moved)
        self.add("link_in", experts=self.memory.completed)

    def under_way(self, step: int) -> bool:
        """Whether a request has rows before the step and from there on."""
        at = int(self.trace.offset[step])
        return bool(set(self.trace.request[:at].tolist()) & set(self.trace.request[at:].tolist()))

    def run_step(self, step: int) -> dict[str, float]:
        m, memory = self.machine, self.memory
        rows = self.trace.rows_of(step)
        highest: dict[int, int] = {}
        for row in rows:
            request, position = int(self.trace.request[row]), int(self.trace.position[row])
            highest[request] = max(highest.get(request, -1), position)
        C = sum(position + 1 for position in highest.values())
        figures = dict.fromkeys(STEP_COLUMNS + STEP_SUMS, 0.0)
        figures.update(phase=self.trace.phase(step), rows=len(rows), head_s=m.head_s())
        late, memory.moved_bytes = memory.late, 0.0
        # only the first step of the whole trace that is all decode waits
        if self.policy.prefetch_blocks and figures["phase"] == DECODE and not self.has_waited:
            self.has_waited = True
            figures["wait_s"] = memory.wait()
            self.carrying_s += figures["wait_s"]
        figures["overhead_s"] = m.L * m.overhead_s
        self.imbalance.append([])
        for layer in range(m.L):
            for column, amount in self.run_layer(step, layer, len(rows), C).items():
                if column in STEP_SUMS:
                    figures[column] += amount
                self.layers[layer][column] += amount
        self.add("gpu", busy_s=m.head_s(), bytes=m.head_bytes)
        self.work_bound_s += m.head_s()
        self.clairvoyant_s += m.head_s()
        self.bound.add_step(self.demand[step], m.dense_s(len(rows), C) + m.overhead_s)
        memory.step_done(step)
        figures["prefetch_bytes"] = memory.moved_bytes
        figures["late"] = memory.late - late
        figures["imbalance"] = mean(self.imbalance[-1])
        return figures

    def run_layer(self, step: int, layer: int, T: int, C: int) -> dict[str, float]:
        m, memory, n = self.machine, self.memory, self.demand[step][layer]
        dense_s = m.dense_s(T, C)
        memory.admit_completed()
        before = memory.moved_bytes
        before_s = dense_s + m.overhead_s  # the host's work follows the dense part; prefetches flow, the GPU is idle
        memory.flow(before_s)
        self.carrying_s += (memory.moved_bytes - before) / m.B_l if m.linked else 0.0
        memory.router_speaks(step, layer)
        resident = memory.resident(layer)
        hits = sum(e in resident for e in n)
        line = self.split(layer, n, T, resident)
        self.optimal_fallbacks += self.policy.dispatch == "optimal" and len(n) > OPTIMAL_LIMIT
        memory.dispatched(layer, line)
        before = memory.moved_bytes
        memory.flow(max(0.0, line.moe - line.fetch_s))
        weights_s = line.fetch_s + ((memory.moved_bytes - before) / m.B_l if m.linked else 0.0)
        returning = [(line.T_home - line.act, line.T_home), (line.T_cpu - line.act_cpu, line.T_cpu)]
        self.carrying_s += union_s([(0.0, weights_s), *returning])
        memory.layer_done(line, T)
        demand_bytes = math.fsum(m.W[layer, e] for e in line.fetched) + line.streamed
        self.account(layer, n, line, dense_s, demand_bytes)
        self.yardsticks(layer, n, T, before_s, line.moe)
        measured = line.at_home and not m.home_is_cpu
        self.imbalance[-1].append(max(line.busy) / (math.fsum(line.busy) / m.N) if measured else math.nan)
        on_cpu = len(line.on_cpu) + (len(line.at_home) if m.home_is_cpu else 0)
        on_units = 0 if m.home_is_cpu else len(line.at_home)
        experts = (len(line.on_gpu) + bool(line.share), on_units, on_cpu)
        figures = (before_s, line.moe, hits, len(n) - hits, demand_bytes, *experts)
        return dict(zip(LAYER_COLUMNS, figures, strict=True))

    def split(self, layer: int, n: dict[int, int], T: int, resident: set[int], arrived: bool = True) -> TimeLine:
        """Dispatch the active experts and return the layer's time line; ``arrived``: what did in part counts."""
        units = self.units[layer]

        def line_of(G: set[int], C: set[int] = frozenset(), share=None) -> TimeLine:
            return time_line(self.machine, layer, n, T, G, C, resident, units, share)

        order = demand_order(n)
        if not order:
            return line_of(set())
        if self.user_dispatch:
            return line_of(*self.planned(self.user_dispatch(layer, order, n, resident), order))
        if self.policy.dispatch in ("in-place", "fiddler", "cheapest"):
            return line_of(*dispatch_by_cost(self.policy, self.machine, layer, n, T, resident, units))
        G = dispatch(self.policy.dispatch, order, resident, lambda G: line_of(G).moe)
        if self.policy.dispatch != "split":
            return line_of(G)
        here = {e: 1.0 if e in resident else self.memory.arrived((layer, e)) if arrived else 0.0 for e in n}
        full = not arrived or not self.memory.room(layer)
        return share_one(self.machine, layer, n, G, resident, line_of, here, full)

    def planned(self, plan: set[int] | dict[int, int], order: list[int]) -> tuple[set[int], set[int]]:
        """Return G and C of what a user's function decides: G, or 0 = home, 1 = GPU, 2 = CPU of each active expert."""
        if not isinstance(plan, dict):
            plan = {e: int(e in plan) for e in order}
        if 2 in plan.values() and self.machine.cpu is None:
            raise ValueError("the plan gives experts to a CPU that is home or absent")
        if 0 in plan.values() and self.machine.home is None:
            raise ValueError("the plan leaves experts at home, and there is none")
        return {e for e in plan if plan[e] == 1}, {e for e in plan if plan[e] == 2}

    def account(self, layer: int, n: dict[int, int], line: TimeLine, dense_s: float, demand_bytes: float) -> None:
        """Add one layer to the units: seconds, experts run, rows, and bytes of weights read (of links: moved)."""
        m = self.machine
        self.add("gpu", busy_s=dense_s + line.gpu_busy, bytes=m.dense_bytes)
        of_gpu = dict.fromkeys(line.on_gpu, 1.0) | ({line.share.expert: line.share.gpu} if line.share else {})
        for e, part in of_gpu.items():
            self.add("gpu", experts=1, rows=part * n[e], bytes=part * m.W[layer, e])
        for e in line.at_home:
            g, part = len(self.units[layer][e]), 1 - of_gpu.get(e, 0.0)
            for u in self.units[layer][e]:
                self.add(m.home_names[u], experts=1, rows=part * n[e] / g, bytes=part * m.W[layer, e] / g)
        for name, busy_s in zip(m.home_names, line.busy, strict=True):
            self.add(name, busy_s=busy_s)
        for e in line.on_cpu:
            self.add("cpu", experts=1, rows=n[e], bytes=m.W[layer, e])
        self.add("cpu", busy_s=line.cpu_busy)
        act_s, act_bytes = line.act + line.act_cpu, line.X + line.X_cpu
        self.add(
            "link_in",
            busy_s=line.fetch_s + act_s,
            experts=len(line.fetched + line.run_whole),
            bytes=demand_bytes + act_bytes,
        )
        self.add("link_out", busy_s=act_s, bytes=act_bytes)

    def yardsticks(self, layer: int, n: dict[int, int], T: int, before_s: float, moe_s: float) -> None:
        """Section 8, for one layer; every schedule pays what comes before its experts."""
        m = self.machine
        devices = [m.gpu] + [m.home] * m.N + ([m.cpu] if m.cpu else [])
        weights_s = math.fsum(m.W[layer, e] for e in n) / sum(device.B for device in devices)
        flops_s = m.flop_per_row * sum(n.values()) / sum(device.F for device in devices)
        self.work_bound_s += before_s + max(weights_s, flops_s)
        if not self.user_dispatch and self.policy.dispatch in ("hot", "ndp", "home"):  # they ignore residency
            self.clairvoyant_s += before_s + moe_s
        else:
            resident = set(demand_order(n)[: m.slots]) if m.linked else set(n)
            self.clairvoyant_s += before_s + self.split(layer, n, T, resident, False).moe


def union_s(intervals: list[tuple[float, float]]) -> float:
    """Return how long at least one of the intervals lasts."""
    edges = sorted({edge for interval in intervals for edge in interval})
    covered = [
        end - start
        for start, end in itertools.pairwise(edges)
        if any(first <= start and end <= last for first, last in intervals)
    ]
    return math.fsum(covered)


def mean(values: list[float]) -> float:
    """Return the mean of those that are defined."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def requests_of(trace: OracleTrace, start_s: np.ndarray, end_s: np.ndarray) -> dict[str, np.ndarray]:
    """Return the requests, by ascending id; a row of a mixed step counts by its own phase."""
    rows = [
        Row(step, int(trace.request[row]), int(trace.position[row]), int(trace.row_phase[row]))
        for step in range(trace.steps)
        for row in trace.rows_of(step)
    ]
    table: dict[str, list] = {}
    for request, figures in all_figures(rows, start_s.tolist(), end_s.tolist()).items():
        own = [row for row in rows if row.request == request]
        found: dict[str, float] = {
            "request": request,
            "prompt_rows": sum(row.phase == PREFILL for row in own),
            "output_rows": sum(row.phase == DECODE for row in own),
            "e2e_s": end_s[own[-1].step] - start_s[own[0].step],
            "tokens_per_s": 1 / figures.tpot_s if figures.tpot_s > 0 else math.nan,
        }
        found |= {f"itl_s_p{q}": quantile(figures.gaps, q / 100) for q in (50, 95, 99)}
        found |= {name: value for name, value in vars(figures).items() if name != "gaps"}
        for name, value in found.items():
            table.setdefault(name, []).append(value)
    return {name: np.asarray(column) for name, column in table.items()}


def simulate(
    trace: OracleTrace,
    model: Any,
    system: Any,
    policy: Any,
    slots: int | None = None,
    *,
    dispatch: Callable | None = None,
    residency: Callable | None = None,
) -> Outcome:
    """Replay a trace.

    model, system and policy are the spec structs, or anything with the same fields. `dispatch(layer, active, n,
    resident) -> G` (or a dict: 0 home, 1 GPU, 2 CPU) and `residency(layer, n, T, scores) -> scores` stand in for a
    user's own functions: active is in demand order, n a dict of the active ones' rows, resident a set; the latter's n
    and scores are lists over the layer's experts, and the victim is the one of least score.
    """
    machine = machine_of(trace, model, system, slots, "user" if dispatch else policy.dispatch)
    replay = Replay(trace, machine, policy, dispatch, residency)
    replay.run()
    steps = {name: np.asarray([step[name] for step in replay.steps]) for name in STEP_COLUMNS + STEP_SUMS}
    layers = {name: np.asarray([layer[name] for layer in replay.layers]) for name in LAYER_COLUMNS}
    layers["imbalance"] = np.asarray([mean(list(of_steps)) for of_steps in zip(*replay.imbalance, strict=True)])
    total_s = math.fsum(steps["duration_s"])
    units = {"unit": np.asarray(replay.unit_names)}
    for name in ("busy_s", "experts", "rows", "bytes"):
        units[name] = np.asarray([replay.unit[unit][name] for unit in replay.unit_names])
    units["utilization"] = units["busy_s"] / total_s
    units["utilization"][replay.unit_names.index("link_in")] = replay.carrying_s / total_s
    requests = requests_of(trace, steps["start_s"], steps["start_s"] + steps["duration_s"])
    phase_s = [math.fsum(steps["duration_s"][steps["phase"] == phase]) for phase in (PREFILL, DECODE, MIXED)]
    return Outcome(
        steps=steps,
        layers=layers,
        units=units,
        requests=requests,
        total_s=total_s,
        prefill_s=phase_s[PREFILL],
        decode_s=phase_s[DECODE],
        mixed_s=phase_s[MIXED],
        tokens_per_s=int(requests["tokens"].sum()) / total_s,
        hits=int(steps["hits"].sum()),
        misses=int(steps["misses"].sum()),
        late=replay.memory.late,
        wasted=replay.memory.wasted,
        used=replay.memory.used,
        demand_bytes=math.fsum(steps["demand_bytes"]),
        prefetch_bytes=math.fsum(steps["prefetch_bytes"]),
        imbalance_mean=mean([value for of_layers in replay.imbalance for value in of_layers]),
        work_bound_s=replay.work_bound_s,
        lower_bound_s=max(replay.bound.seconds(), replay.work_bound_s),
        clairvoyant_s=replay.clairvoyant_s,
        optimal_fallbacks=replay.optimal_fallbacks,
    )
