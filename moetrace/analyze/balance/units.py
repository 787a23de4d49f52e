"""How evenly a trace's experts keep units busy under placements and plans: made on one part of it, judged on the rest.

docs/balance.md defines every figure.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from moetrace.analyze.balance import fan_out as rows_apart
from moetrace.analyze.balance import imbalance, plan_frames
from moetrace.analyze.balance.imbalance import COPY_RULES, Least
from moetrace.analyze.balance.judged import CLAIRVOYANT, FIXED, GIVEN, KEPT, REMADE, JudgedPlan
from moetrace.analyze.balance.loads import add, choices_of, loads_of, summed
from moetrace.analyze.balance.plans import (
    DEFAULT_PLACEMENTS,
    Copies,
    Plan,
    Tier,
    check_placement,
    copies_of,
    is_made_from_loads,
    make_plan,
    moved_bytes,
)
from moetrace.analyze.balance.spans import Span, span_of
from moetrace.analyze.balance.unit_costs import UnitCosts, costs_of
from moetrace.analyze.sizes import own_experts
from moetrace.spec import Model, System
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.forks import refuse_if_forked
from moetrace.trace.format import Trace
from moetrace.trace.opening import accepts_path

SCHEMA = "moetrace.balance/1"
FRAMES = ("summary", "layers", "staleness", "over_time")
PERIODS = 120  # of the judged steps, for a picture
# The largest models have 94 layers and 23,000 experts; a damaged file may claim anything.
MAX_LAYERS = 1024
MAX_CELLS = 1 << 20


class _Sharing(NamedTuple):
    """The copy of its expert that a row takes, and whether to count how far rows go."""

    rule: int  # EVEN, BY_PLACE or a seed, as in `fan_out.count`
    unit_nodes: np.ndarray | None  # int64 [units], of each its node; None: fan-out is not counted


@dataclass(frozen=True)
class Balance:
    """The result of `balance`. Imbalances are of one layer; nothing is pooled over layers.

    Attributes:
        trace: The judged trace and the settings, as plain values.
        summary: A row for each plan: means and extremes over the layers, sums of seconds and bytes.
        layers: A row for each plan and layer.
        staleness: A row for each placement that is made from loads, interval and layer (null: all): the loss from
            keeping a plan.
        over_time: A row for each plan, layer and period of the judged steps: its mean imbalance.
    """

    trace: dict[str, Any]
    summary: pl.DataFrame
    layers: pl.DataFrame
    staleness: pl.DataFrame
    over_time: pl.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, in which None stands for what there is not; JSON takes it."""
        return {"schema": SCHEMA, "trace": self.trace} | {name: getattr(self, name).to_dicts() for name in FRAMES}


@accepts_path
def balance(
    trace: Trace,
    placements: Sequence[str] = DEFAULT_PLACEMENTS,
    *,
    tier: Tier | int | None = None,
    window: int | None = None,
    interval: int | Sequence[int] | None = None,
    phase: str = "all",
    plans: Mapping[str, Plan] | None = None,
    copies: str = "even",
    seed: int = 0,
    fan_out: bool = False,
    model: Model | str | Path | None = None,
    system: System | str | Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> Balance:
    """Say how evenly experts keep units busy under placements and given plans.

    Plans are made from the first part of the trace and judged on the rest. A placement that is made from loads is
    judged three times: made from the window and kept; made again every `interval` steps from the last `window` ones;
    and made from the very steps that it is judged on. docs/balance.md defines every figure. Memory is constant.

    Args:
        trace: A trace of ids or counts, or the path of its file.
        placements: Names that docs/balance.md lists, or "tp:g". By default ep, ep-block, ep-lpt and eplb.
        tier: The units: a number or a `Tier`. By default the NDP units of `system`; 8 without one.
        window: How many steps plans are made from; those after them are judged. By default half of the steps. With 0,
            and by default where there is one step, all steps are judged, and plans are made from these very steps.
        interval: Steps after which a plan is made again, or several such numbers, which are judged in the same pass. By
            default an eighth of the judged ones.
        phase: The steps that count: "all", "prefill", "decode" or "mixed".
        plans: Plans to judge, by name.
        copies: How the rows of an expert are shared among its copies: "even"; "row", by each row's place in the step,
            as engines do; or "random".
        seed: Seed of `copies` "random", from 0.
        fan_out: Whether to count on how many units, and nodes of units (`tier.nodes`), the experts of one row are. It
            takes as long again. By default not.
        model: A preset's name, a TOML file or a Model. By default the preset that the trace names.
        system: A preset's name, a TOML file or a System. Figures are then in seconds too. By default none.
        progress: A function that gets the number of rows since its last call.

    Returns:
        Frames of the plans, layers and periods.

    Raises:
        UsageError: A value makes no sense, or values do not go together.
        MoetraceError: The trace is damaged, or has no steps of the phase or too many experts.

    Examples:
        >>> import moetrace as mt
        >>> found = mt.balance("traces/tiny-olmoe.h5", ["ep", "eplb"], tier=8, phase="prefill")
        >>> for placement, plan, imbalance in found.summary.select("placement", "plan", "imbalance").rows():
        ...     print(f"{placement:4} {plan:11} {imbalance:.3f}")
        ep   fixed       2.229
        eplb kept        1.548
        eplb re-made     1.564
        eplb clairvoyant 1.544
    """
    refuse_if_forked()
    _check_size(trace)
    machine, tier = costs_of(trace, model, system, tier)
    span = span_of(trace, phase, window, interval)
    plans = plans or {}
    own = own_experts(trace)
    for placement in placements:
        check_placement(placement, tier, own)
    if not placements and not plans:
        raise UsageError("no placement and no plan is given to judge.")
    _check_copies(trace, copies, seed, fan_out, tier)
    told = progress or (lambda rows: None)
    recent = np.zeros((trace.layers, trace.num_experts), np.int64)
    for loads in loads_of(trace, span.steps[: span.window]):
        add(loads, recent)
        told(loads.all_rows)
    judged_plans = _judged_plans(trace, placements, plans, tier, machine, span, recent)
    _check_bytes(trace, machine, judged_plans, span)
    rule = {"even": rows_apart.EVEN, "row": rows_apart.BY_PLACE}.get(copies, seed)
    unit_nodes = np.arange(tier.units) * tier.nodes // tier.units if fan_out else None
    _walk(trace, judged_plans, tier, machine, span, recent, _Sharing(rule, unit_nodes), told)
    facts = _facts(trace, phase, tier, machine, span, judged_plans) | {"copies": copies, "fan_out": fan_out}
    layer = trace.layer_index.astype(np.int64)
    by_layer = plan_frames.layers(
        judged_plans, layer, facts["sizes_known"], machine.link_bytes_s, machine.system is not None
    )
    return Balance(
        facts,
        plan_frames.summary(by_layer, judged_plans, facts["judged_steps"]),
        by_layer,
        plan_frames.staleness(by_layer, facts["judged_steps"], span.intervals),
        plan_frames.over_time(judged_plans, layer, span.judged),
    )


def plan_for_next(trace: Trace, placement: str, tier: Tier, window: int | None = None, phase: str = "all") -> Plan:
    """Return the plan that a rebalance after the last step would install, made from `Span.latest`."""
    own = own_experts(trace)
    check_placement(placement, tier, own)
    _check_size(trace)
    loads = loads_for_next(trace, window, phase) if is_made_from_loads(placement) else None
    return make_plan(placement, tier, (trace.layers, trace.num_experts), loads, own)


def loads_for_next(trace: Trace, window: int | None = None, phase: str = "all") -> np.ndarray:
    """Return the loads of `Span.latest`, int64 [layers, experts], from which that plan is made."""
    _check_size(trace)
    return summed(trace, span_of(trace, phase, window, None).latest)


def _check_copies(trace: Trace, copies: str, seed: int, fan_out: bool, tier: Tier) -> None:
    if copies not in COPY_RULES or not 0 <= seed < 2**63:
        raise UsageError(f"copies are {copies!r}, seed {seed}: give {', '.join(COPY_RULES)}, and a seed from 0.")
    if copies != "even" and "counts" in trace.has:
        raise UsageError(f"copies {copies!r} asks which row chose what, but {trace.shown} holds counts only.")
    if fan_out and "counts" in trace.has:
        raise UsageError(f"fan-out asks which row chose what, but {trace.shown} holds counts only.")
    if fan_out and tier.units % tier.nodes:
        raise UsageError(
            f"{tier.units} units cannot be in {tier.nodes} nodes equally: give a number that divides them."
        )


def _check_size(trace: Trace) -> None:
    if trace.layers > MAX_LAYERS or trace.layers * trace.num_experts > MAX_CELLS:
        raise MoetraceError(
            f"{trace.shown} has {trace.layers} layers of {trace.num_experts} experts; balance takes "
            f"{MAX_LAYERS} layers and {MAX_CELLS} experts at most."
        )


def _judged_plans(
    trace: Trace,
    placements: Sequence[str],
    plans: Mapping[str, Plan],
    tier: Tier,
    machine: UnitCosts,
    span: Span,
    recent: np.ndarray,
) -> list[JudgedPlan]:
    own, shape = own_experts(trace), (trace.layers, trace.num_experts)
    ahead = summed(trace, span.judged) if any(is_made_from_loads(placement) for placement in placements) else recent
    kinds: list[tuple[str, str, Plan, int | None]] = []
    for placement in dict.fromkeys(placements):
        if not is_made_from_loads(placement):
            kinds.append((placement, FIXED, make_plan(placement, tier, shape, None, own), None))
            continue
        if span.window:
            first = make_plan(placement, tier, shape, recent, own)
            kinds.append((placement, KEPT, first, None))
            kinds += [
                (placement, REMADE, first, interval) for interval in span.intervals if span.rebalances(interval).size
            ]
        kinds.append((placement, CLAIRVOYANT, make_plan(placement, tier, shape, ahead, own), None))
    for name, plan in plans.items():
        _check_given(name, plan, tier, own)
        kinds.append((name, GIVEN, plan, None))
    least: dict[tuple[int, int, bytes], Least] = {}
    return [
        JudgedPlan(
            placement,
            plan_is,
            plan,
            machine.cost(plan.share, shape),
            imbalance.new_tally(trace.layers, min(PERIODS, span.judged.size)),
            np.zeros(trace.layers, np.int64),
            copies_of(plan, trace.num_experts),
            least.setdefault(_key(plan), Least(np.zeros(trace.layers), np.zeros(trace.layers))),
            np.zeros((trace.layers, len(rows_apart.SUMS)), np.int64),
            interval,
        )
        for placement, plan_is, plan, interval in kinds
    ]


def _check_bytes(trace: Trace, machine: UnitCosts, judged_plans: list[JudgedPlan], span: Span) -> None:
    """Raise MoetraceError if what moves could be more bytes than are counted exactly."""
    copies = (
        max(int(judged.plan.slots.max()) for judged in judged_plans)
        * trace.layers
        * (span.judged.size // min(span.intervals) + 1)
    )
    if machine.expert_bytes is not None and int(machine.expert_bytes.max()) * copies >= 2**63:
        raise MoetraceError(
            f"{trace.shown} has experts of {machine.expert_bytes.max()} bytes: what moves would be more "
            f"than can be counted."
        )


def _key(plan: Plan) -> tuple[int, int, bytes]:
    """Plans of the same key have the same lower bounds."""
    return plan.share, plan.bins, plan.slots.tobytes()


def _check_given(name: str, plan: Plan, tier: Tier, own: np.ndarray) -> None:
    layers, experts = own.size, own.max()
    held = plan.expert_of_slot.reshape(len(plan.expert_of_slot), -1)
    if (len(held), plan.bins * plan.share) != (layers, tier.units) or held.max() >= experts:
        raise UsageError(
            f"the plan {name} is of {len(held)} layers, {plan.bins * plan.share} units and experts up to "
            f"{held.max()}, but there are {layers} layers of {experts} experts and {tier.units} units."
        )
    for layer, slots in enumerate(held):
        missing, beyond = np.setdiff1d(np.arange(own[layer]), slots), slots[slots >= own[layer]]
        if missing.size:
            raise MoetraceError(f"the plan {name} has no copy of expert {missing[0]} in layer entry {layer}.")
        if beyond.size:
            raise MoetraceError(
                f"the plan {name} holds expert {beyond[0]} in layer entry {layer}, which has {own[layer]} experts."
            )


def _walk(
    trace: Trace,
    judged_plans: list[JudgedPlan],
    tier: Tier,
    machine: UnitCosts,
    span: Span,
    recent: np.ndarray,
    sharing: _Sharing,
    told: Callable[[int], object],
) -> None:
    """Judge all plans on the judged steps, re-making plans at every interval from ``recent``, the window's loads."""
    periods = judged_plans[0].tally.over_time.shape[0]
    period = np.arange(span.judged.size) * periods // span.judged.size
    bounds = {_key(judged.plan): (judged, judged.plan.slots) for judged in judged_plans}
    own, (rule, unit_nodes) = own_experts(trace), sharing
    remade = {judged.interval for judged in judged_plans if judged.interval is not None}
    anew = sorted({0, *(begin for each in remade for begin in range(each, span.judged.size, each))})
    turn, before = 0, 0
    for begin, end in pairwise([*anew, span.judged.size]):
        if begin:
            recent -= summed(trace, span.steps[before:begin])
            before = begin
            due = [one for one in judged_plans if one.interval is not None and begin % one.interval == 0]
            _make_anew(due, tier, own, machine, recent)
        for loads, choices in choices_of(trace, span.judged[begin:end]):
            for judged in judged_plans:
                if rule == rows_apart.EVEN or choices is None:
                    judged.judge(loads, turn, period[turn : turn + loads.steps])
                else:
                    judged.judge_rows(choices, rule, turn, period[turn : turn + loads.steps])
                if unit_nodes is not None and choices is not None:
                    judged.count_fan_out(choices, rule, turn, unit_nodes)
            for judged, slots in bounds.values():
                imbalance.bound(loads, own, judged.plan.bins, slots, judged.cost, judged.least)
            if remade:
                add(loads, recent)
            turn += loads.steps
            told(loads.all_rows)


def _make_anew(
    judged_plans: list[JudgedPlan], tier: Tier, own: np.ndarray, machine: UnitCosts, recent: np.ndarray
) -> None:
    made: dict[str, tuple[Plan, Copies]] = {}  # by placement: that of each interval which is due
    for judged in judged_plans:
        if judged.placement not in made:
            plan = make_plan(judged.placement, tier, recent.shape, recent, own)
            made[judged.placement] = plan, copies_of(plan, recent.shape[1])
        new, copies = made[judged.placement]
        if machine.expert_bytes is not None:
            judged.moved_bytes += moved_bytes(judged.plan, new, machine.expert_bytes)
        judged.plan, judged.copies = new, copies


def _facts(
    trace: Trace, phase: str, tier: Tier, machine: UnitCosts, span: Span, judged_plans: list[JudgedPlan]
) -> dict[str, Any]:
    anew = any(judged.plan_is == REMADE for judged in judged_plans)
    rebalance_steps = [span.rebalances(interval).tolist() if anew else [] for interval in span.intervals]
    return {
        "model": trace.model,
        "layers": trace.layers,
        "experts": trace.num_experts,
        "experts_min": int(own_experts(trace).min()),
        "top_k": trace.top_k,
        "phase": phase,
        "steps": int(span.steps.size),
        "judged_steps": int(span.judged.size),
        "judged_rows": int((trace.offset[span.judged + 1] - trace.offset[span.judged]).sum()),
        "window": span.window,
        "intervals": list(span.intervals),
        "rebalance_steps": rebalance_steps,  # of each interval
        "rebalances": [len(steps) for steps in rebalance_steps],
        "units": tier.units,
        "redundant": tier.redundant,
        "nodes": tier.nodes,
        "groups": tier.groups,
        "system": None if machine.system is None else machine.system.name,
        "sizes_known": machine.expert_bytes is not None,
    }
