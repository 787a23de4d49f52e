"""The replay: steps one after another, and what they add up to."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from support.cluster_oracle.figures import Figures, StepFigures
from support.cluster_oracle.moving import Change, Rebalance
from support.cluster_oracle.parts import DECODE, MIXED, PREFILL, Machine, Network, Plan, Plans, Policy, Step, less
from support.cluster_oracle.sharing import Choice, cut, share
from support.cluster_oracle.stages import Priced, Traffic, own_further_kernels_s, price, step_s

AUTO_CUTS = (1, 2, 4, 8)
AUTO_ORDERS = ("asas", "aass")
AUTO_SHARED = ("with-attention", "apart")
STAGES = ("A", "S", "A2E", "E", "E2A", "K")

Cut = tuple[int, int, str, str]  # r1, r2, order, where shared experts run


def replay(rows: list[Step], machine: Machine, policy: Policy, plans: Plans) -> Figures:
    """Replay the rows of all steps; plans come in as data, or from a function of loads."""
    clock, parts, rebalance = 0.0, [], Rebalance(machine, policy, plans)
    chosen = choose(rows, machine, policy, plans.first)
    totals = Totals(machine)
    for number, step in enumerate(rows):
        net = machine.network[step.phase]
        change = rebalance.before(number, rows, clock, net)
        totals.plans += change.made
        totals.pauses += change.pause_s > 0
        if rebalance.migrating:
            net = replace(net, B_net=(1 - policy.migrate_share) * net.B_net)
        r1, r2, order, where = chosen[step.phase]
        policy = replace(policy, shared=where)
        shared = share(step, number, rebalance.plan, machine, policy)
        priced = price(step, shared, cut(len(step.rows), r1, r2), machine, policy, net)
        figures = run_step(step, shared, priced, change, machine, policy, net, order)
        figures.start_s, figures.r1, figures.r2 = clock, r1, r2
        figures.migrating, figures.plan = rebalance.migrating, rebalance.number
        clock += figures.duration_s
        totals.add(priced, figures, policy)
        parts.append(figures)
    return totals.figures(parts, chosen)


def fixed_cut(policy: Policy) -> Cut:
    """The cut of a schedule that says it."""
    if policy.schedule == "serial":
        return 1, 1, policy.order, policy.shared
    r1, r2 = policy.schedule.removeprefix("pipeline:").split(",")
    return int(r1), int(r2), policy.order, policy.shared


def choose(rows: list[Step], machine: Machine, policy: Policy, first: Plan) -> dict[int, Cut]:
    """Schedule of each phase that occurs: what the policy says or, for pipeline:auto, the best of its first steps."""
    phases = sorted({step.phase for step in rows})
    if policy.schedule != "pipeline:auto":
        return dict.fromkeys(phases, fixed_cut(policy))
    chosen = {}
    for phase in phases:
        tried = [(number, step) for number, step in enumerate(rows) if step.phase == phase][: policy.plan_steps]
        shared = [share(step, number, first, machine, policy) for number, step in tried]
        best_s = math.inf
        for r1 in AUTO_CUTS:
            for r2 in AUTO_CUTS:
                for where in AUTO_SHARED if policy.shared == "auto" else (policy.shared,):
                    how = replace(policy, shared=where)
                    priced = [
                        price(step, of_step, cut(len(step.rows), r1, r2), machine, how, machine.network[phase])
                        for (_, step), of_step in zip(tried, shared, strict=True)
                    ]
                    for order in AUTO_ORDERS:
                        seconds = math.fsum(step_s(p, machine, how, machine.network[phase], order)[0] for p in priced)
                        if less(seconds, best_s):
                            best_s, chosen[phase] = seconds, (r1, r2, order, where)
    return chosen


def run_step(
    step: Step,
    shared: list[list[list[Choice]]],
    priced: Priced,
    change: Change,
    machine: Machine,
    policy: Policy,
    net: Network,
    order: str,
) -> StepFigures:
    """Figures of a step; `replay` fills in where it stands among the others."""
    seconds, spans = step_s(priced, machine, policy, net, order)
    free_s, _ = step_s(priced, machine, policy, net, order, free=True)
    gpu_rows, gpu_s = of_gpus(priced, machine)
    distinct = [len({gpu for _, gpu, _ in of_row}) for of_layer in shared for of_row in of_layer if of_row]
    sizes = [(d, c) for d, c in zip(flat(priced.dispatch), flat(priced.combine), strict=True)]
    overhead_s = machine.overhead_s * priced.stages.layers * priced.stages.batches
    kernels_s = [span.end_s - span.start_s for span in spans if span.stage == "K"]
    stage_s = {stage: math.fsum(flat(getattr(priced.stages, stage))) for stage in STAGES[:5]}
    stage_s |= {"A": stage_s["A"] - overhead_s, "K": math.fsum(kernels_s)}
    return StepFigures(
        phase=step.phase,
        rows=len(step.rows),
        start_s=math.nan,
        duration_s=change.pause_s + seconds,
        pause_s=change.pause_s,
        head_s=machine.head_s(),
        overhead_s=overhead_s,
        exposed_s=max(0.0, seconds - free_s),
        r1=0,
        r2=0,
        order=order,
        stage_s=stage_s,
        dispatch_bytes=math.fsum(d.total for d, _ in sizes),
        combine_bytes=math.fsum(c.total for _, c in sizes),
        node_bytes=math.fsum(d.node_total + c.node_total for d, c in sizes),
        moved_bytes=change.moved_bytes,
        migrating=False,
        plan=0,
        imbalance_rows=[imbalance(of_layer) for of_layer in gpu_rows],
        imbalance_s=[
            imbalance(of_layer) if any(rows) else math.nan for of_layer, rows in zip(gpu_s, gpu_rows, strict=True)
        ],
        gpu_rows=gpu_rows,
        gpu_s=gpu_s,
        fan_out=sum(distinct) / len(distinct) if distinct else math.nan,
        fan_out_gpus=sum(distinct),
        fan_out_cells=len(distinct),
        taxes=taxes_of(priced, machine, policy, net) if policy.schedule == "serial" else None,
        spans=spans,
    )


def taxes_of(priced: Priced, machine: Machine, policy: Policy, net: Network) -> dict[str, float]:
    """What bulk pays more than fused: launches, trips to memory, and waiting at barriers, switched off in turn."""

    def bulk_s(**kept: bool) -> float:
        return step_s(priced, machine, policy, net, "asas", execution="bulk", **kept)[0]

    whole, no_starts, lean = bulk_s(), bulk_s(starts=False), bulk_s(starts=False, locality=False)
    fused_s, _ = step_s(priced, machine, policy, net, "asas", execution="fused")
    return {"launch": whole - no_starts, "locality": no_starts - lean, "barrier": lean - fused_s}


def flat(nested: list) -> list:
    """All that is in lists of lists."""
    return [inner for part in nested for inner in (flat(part) if isinstance(part, list) else [part])]


def imbalance(of_gpus: Sequence[float]) -> float:
    """The largest over the mean; NaN if all are 0."""
    total = math.fsum(of_gpus)
    return max(of_gpus) / (total / len(of_gpus)) if total else math.nan


def of_gpus(priced: Priced, machine: Machine) -> tuple[list[list[int]], list[list[float]]]:
    """Rows and seconds of each expert GPU in each layer, over all chunks."""
    rows, seconds = [], []
    for layer in range(machine.L):
        traffic: list[Traffic] = flat(priced.traffic[layer])
        works = [of_chunk for of_batch in priced.work_s[layer] for of_chunk in of_batch]
        gpus = range(machine.expert_gpus)
        rows.append([sum(sum(t.loads[gpu].values()) for t in traffic) for gpu in gpus])
        seconds.append([math.fsum(work[gpu] for work in works) for gpu in gpus])
    return rows, seconds


def mean(values: list[float]) -> float:
    """The mean of those that are defined."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


class Totals:
    """What GPUs and resources add up to."""

    def __init__(self, machine: Machine):
        self.machine = machine
        names = dict.fromkeys(machine.attention_names + machine.expert_names)
        self.busy_s = dict.fromkeys(names, 0.0)
        self.rows: Counter[str] = Counter(dict.fromkeys(machine.expert_names, 0))
        self.slots: Counter[str] = Counter(dict.fromkeys(machine.expert_names, 0))
        self.bytes = dict.fromkeys(names, 0.0)
        self.plans = self.pauses = 0

    def add(self, priced: Priced, figures: StepFigures, policy: Policy) -> None:
        machine = self.machine
        # Shared experts are read once, with attention or apart.
        dense_bytes = machine.dense_params * machine.dense_bits / 8 * machine.L * priced.stages.batches
        for gpu, name in enumerate(machine.attention_names):
            self.busy_s[name] += priced.attended_s[gpu] - figures.overhead_s + machine.own_head_s(gpu)
            if policy.execution != "fused":
                self.busy_s[name] += machine.L * own_further_kernels_s(priced.rows, machine, policy, gpu)
            self.bytes[name] += dense_bytes + machine.head_bytes
        for layer in range(machine.L):
            for traffic in flat(priced.traffic[layer]):
                for gpu, name in enumerate(machine.expert_names):
                    loads = traffic.loads[gpu]
                    self.rows[name] += sum(loads.values())
                    self.slots[name] += len(loads)
                    self.bytes[name] += math.fsum(machine.W[layer][expert] for _, expert in loads)
            for gpu, name in enumerate(machine.expert_names):
                self.busy_s[name] += figures.gpu_s[layer][gpu]

    def figures(self, steps: list[StepFigures], chosen: dict[int, Cut]) -> Figures:
        def total(name: str) -> float:
            return math.fsum(getattr(step, name) for step in steps)

        phase_s = {p: math.fsum(s.duration_s for s in steps if s.phase == p) for p in (PREFILL, DECODE, MIXED)}
        stage_s = {stage: math.fsum(step.stage_s[stage] for step in steps) for stage in STAGES}
        attention_s = stage_s["A"] + stage_s["S"] + stage_s["K"] + total("head_s")
        resource_s = {"AG": attention_s, "A2E": stage_s["A2E"], "EG": stage_s["E"], "E2A": stage_s["E2A"]}
        if self.machine.colocated:
            resource_s = {"GPU": attention_s + stage_s["E"], "NET": stage_s["A2E"] + stage_s["E2A"]}
        cells = sum(step.fan_out_cells for step in steps)
        layers = range(self.machine.L)
        taxes = [step.taxes for step in steps if step.taxes is not None]
        return Figures(
            steps=steps,
            total_s=total("duration_s"),
            prefill_s=phase_s[PREFILL],
            decode_s=phase_s[DECODE],
            mixed_s=phase_s[MIXED],
            pause_s=total("pause_s"),
            pauses=self.pauses,
            plans=self.plans,
            overhead_s=total("overhead_s"),
            exposed_s=total("exposed_s"),
            busy_s=self.busy_s,
            resource_s=resource_s,
            gpu_rows=dict(self.rows),
            gpu_slots=dict(self.slots),
            gpu_bytes=self.bytes,
            dispatch_bytes=total("dispatch_bytes"),
            combine_bytes=total("combine_bytes"),
            network_bytes=total("dispatch_bytes") + total("combine_bytes"),
            node_bytes=total("node_bytes"),
            moved_bytes=total("moved_bytes"),
            imbalance_rows=[mean([step.imbalance_rows[layer] for step in steps]) for layer in layers],
            imbalance_s=[mean([step.imbalance_s[layer] for step in steps]) for layer in layers],
            imbalance_rows_mean=mean([value for step in steps for value in step.imbalance_rows]),
            imbalance_s_mean=mean([value for step in steps for value in step.imbalance_s]),
            fan_out=sum(step.fan_out_gpus for step in steps) / cells if cells else math.nan,
            taxes={name: math.fsum(of_step[name] for of_step in taxes) for name in taxes[0]} if taxes else None,
            chosen=chosen,
        )
