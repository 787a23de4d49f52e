"""One pass over a trace: blocks in, logs out; every policy of the pass sees a block while it is in the cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetrace.engine.bounds import clairvoyant_batch, work_bound_s
from moetrace.engine.cost import Machine, machine_of
from moetrace.engine.demand import Demand, demand_of
from moetrace.engine.dispatch import DISPATCH
from moetrace.engine.lookahead import NextSteps
from moetrace.engine.placement import group_of_expert
from moetrace.engine.plugin import load_hook
from moetrace.engine.prefetch import COMPLETED_EVER
from moetrace.engine.replay import (
    FROM_PROMPT,
    NO_PREFETCH,
    ONLINE,
    ORACLE,
    Batch,
    Setting,
    State,
    Work,
    new_state,
    replay_batch,
)
from moetrace.engine.residency import FLAT, KEEPS_SOME, RESIDENCY, hold
from moetrace.engine.schedule import Schedule, request_index, schedule_of
from moetrace.engine.state import LINK_IN, Log, new_log
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.model import Model, check_shape
from moetrace.spec.policy import PolicySpec, check_policy, load_loads, load_static
from moetrace.spec.system import System, check_fits, gpu_slots
from moetrace.trace.format import Block, Trace
from moetrace.trace.schema import check_ids

PREFETCH = {"none": NO_PREFETCH, "prefill": FROM_PROMPT, "online": ONLINE, "oracle": ORACLE}


@dataclass
class Lane:
    """One policy on its way through a trace, and what it recorded.

    ``clairvoyant_s``: seconds with whatever is active resident already, up to the slots (timing model, section 8).
    """

    policy: PolicySpec
    machine: Machine
    setting: Setting
    log: Log
    state: State
    hooks: tuple[Any, Any]
    own_state: State | None  # of the clairvoyant run; None if the dispatch ignores residency
    clairvoyant_s: float = 0.0

    def advance(self, batch: Batch) -> None:
        """Replay a block."""
        try:
            replay_batch(self.work(batch), *self.hooks)
            if self.own_state is not None:
                own = self.work(batch)._replace(state=self.own_state)
                self.clairvoyant_s = clairvoyant_batch(own, self.hooks[0], self.clairvoyant_s)
        except MemoryError:
            raise
        except Exception as error:  # only a user's function can raise
            raise MoetraceError(f"Policy {self.policy.name} failed: {type(error).__name__}: {error}.") from error

    def work(self, batch: Batch) -> Work:
        """Return all that the replay of a block takes."""
        return Work(batch, self.machine, self.setting, self.state, self.log)

    def finish(self) -> None:
        """Close the books after the last block: what was prefetched and never run was wasted."""
        self.log.unit["experts"][LINK_IN] += self.state.queue.ends[COMPLETED_EVER]
        self.log.tally["wasted"] += int(self.state.cache.fresh.sum())
        if self.own_state is None:
            self.clairvoyant_s = float(np.sum(self.log.step["duration_s"] - self.log.step["wait_s"]))


@dataclass(frozen=True)
class Run:
    """A finished replay: the schedule of the trace, and one lane a policy."""

    model: Model
    system: System
    slots: int
    schedule: Schedule
    lanes: list[Lane]
    work_bound_s: float
    warnings: list[str]


def run(
    trace: Trace,
    model: Model,
    system: System,
    policies: Sequence[PolicySpec],
    *,
    slots: int | None = None,
    ignore_capacity: bool = False,
    hooks: Mapping[str, Callable] | None = None,
    jobs: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """Replay a trace through policies in one pass, ``jobs`` threads at a time; ``progress`` is told rows done.

    A policy's dispatch or residency that is a key of ``hooks`` is that function.

    The figures do not depend on ``jobs``, nor on how the trace is cut into blocks. Raises UsageError if trace, model,
    system and policies do not go together, MoetraceError (file, dataset, row) if an id is wrong.
    """
    check_shape(str(trace.path or "the trace"), trace.layers, trace.num_experts, model)
    warnings = []
    if trace.top_k != model.top_k:
        warnings.append(
            f"the trace has {trace.top_k} experts a token and layer, {model.name} {model.top_k}: fewer or more work."
        )
    weight_bytes = _weight_bytes(trace, model)
    check_fits(model, system, weight_bytes, ignore_capacity)
    fitting = gpu_slots(model, system, weight_bytes)
    slots = _slots(model, system, slots, fitting)
    if slots > fitting:
        warnings.append(f"{slots} slots are more than the {fitting} experts that fit the GPU of {system.name}.")
    schedule = schedule_of(trace)
    lanes = [_lane(trace, model, system, policy, weight_bytes, slots, schedule, hooks or {}) for policy in policies]
    bound_s = 0.0
    with ThreadPoolExecutor(jobs) if jobs > 1 else nullcontext() as pool:
        for batch, rows in _batches(trace, lanes, schedule, pool):
            bound_s = work_bound_s(lanes[0].work(batch), bound_s)
            _each(pool, lanes, batch)
            if progress is not None:
                progress(rows)
    for lane in lanes:
        lane.finish()
    return Run(model, system, slots, schedule, lanes, bound_s, warnings)


def _each(pool: Executor | None, lanes: list[Lane], batch: Batch) -> None:
    if pool is None:
        for lane in lanes:
            lane.advance(batch)
    else:
        for future in [pool.submit(lane.advance, batch) for lane in lanes]:
            future.result()


def _weight_bytes(trace: Trace, model: Model) -> np.ndarray:
    if trace.expert_bytes is None:
        return model.expert_bytes()
    own = np.asarray(trace.expert_bytes, np.float64)
    return np.broadcast_to(own.reshape(trace.layers, -1), (trace.layers, trace.num_experts)).copy()


def _slots(model: Model, system: System, slots: int | None, fitting: int) -> int:
    everything = model.moe_layers * model.experts
    if slots is None:
        return fitting
    if slots < 0:
        raise UsageError(f"slots wants a number of experts of at least 0, got {slots}.")
    if system.link is None and slots < everything:
        raise UsageError(f"System {system.name} has no link, so all {everything} experts are resident: drop --slots.")
    return min(slots, everything)


def _lane(
    trace: Trace,
    model: Model,
    system: System,
    policy: PolicySpec,
    weight_bytes: np.ndarray,
    slots: int,
    schedule: Schedule,
    own: Mapping[str, Callable],
) -> Lane:
    check_policy(policy, system)
    layers, experts = weight_bytes.shape
    loads = load_loads(policy.loads, layers, experts) if policy.loads else None
    share = policy.group_size(system.units) if system.units else 1
    groups = group_of_expert(policy.placement, layers, experts, system.units, share, loads)
    machine = machine_of(model, system, weight_bytes, groups, share)
    setting = Setting(
        prefetch=PREFETCH[policy.prefetch_kind],
        depth=policy.prefetch_depth or 0,
        waits=int(policy.prefetch_blocks),
        counts_prompts=int(policy.residency == "prefill"),
        learns=int(policy.residency not in FLAT),
        looks_ahead=int(policy.residency == "belady"),
        optimal=int(policy.dispatch == "optimal"),
        own_dispatch=int(policy.dispatch not in DISPATCH),
        slots=slots,
        half_life=policy.half_life or 0,
        alpha=float(policy.alpha),
        chance=float(policy.p),
        seed=policy.seed,
    )
    pools = layers if policy.scope == "layer" else 1
    keeps_all, flat = policy.residency not in KEEPS_SOME, policy.residency in FLAT
    state = new_state(machine, schedule, setting, pools, keeps_all, flat)
    if system.link is None:
        hold(state.cells, state.cache, np.arange(layers * experts))
    elif policy.static:
        hold(state.cells, state.cache, _static_codes(policy, state, layers, experts))
    ignores_residency = policy.dispatch in ("ndp", "hot")
    unlearned = setting._replace(counts_prompts=0)
    own_state = None if ignores_residency else new_state(machine, schedule, unlearned, 1, True, True)
    hooks = load_hook(policy.dispatch, {**DISPATCH, **own}), load_hook(policy.residency, {**RESIDENCY, **own})
    return Lane(policy, machine, setting, new_log(trace.steps, layers, machine.groups), state, hooks, own_state)


def _static_codes(policy: PolicySpec, state: State, layers: int, experts: int) -> np.ndarray:
    assert policy.static is not None
    pairs = load_static(policy.static, layers, experts)
    pools, capacity = len(state.cache.residents), state.cache.capacity
    most = int(np.bincount(pairs[:, 0] if pools > 1 else np.zeros(len(pairs), np.int64), minlength=1).max())
    if most > capacity:
        place = "a layer" if pools > 1 else "all layers together"
        raise UsageError(
            f"Policy {policy.name}: {policy.static} holds {most} experts for {place}, but the GPU has {capacity} slots."
        )
    return pairs[:, 0] * experts + pairs[:, 1]


def _batches(trace: Trace, lanes: list[Lane], schedule: Schedule, pool: Executor | None) -> Iterator[tuple[Batch, int]]:
    """Yield each block ready for the kernels, and its rows; with a pool the next one is made meanwhile."""
    depth = max((lane.setting.depth for lane in lanes if lane.setting.prefetch == ORACLE), default=0)
    ahead = -(-depth // trace.layers)
    next_steps = None
    if any(lane.policy.residency == "belady" for lane in lanes):
        most = int(np.minimum(schedule.rows * trace.top_k, trace.num_experts).sum()) * trace.layers
        demands = (_demand(trace, block) for block in trace.blocks())
        next_steps = NextSteps(demands, trace.layers, trace.num_experts, most)
    counts_prompts = any(lane.setting.counts_prompts for lane in lanes)

    def prepare(block: Block) -> tuple[Batch, int]:
        demand = _demand(trace, block)
        if next_steps is not None:
            demand = next_steps.add_to(demand, block.steps, trace.layers)
        return _batch(block, demand, schedule, counts_prompts), int(block.offset[block.steps])

    blocks = trace.blocks(ahead=ahead)
    if pool is None:
        yield from map(prepare, blocks)
        return
    coming: Future | None = None
    for block in blocks:
        ready = coming.result() if coming else None  # one at a time: what looks ahead reads the blocks in order
        coming = pool.submit(prepare, block)
        if ready is not None:
            yield ready
    if coming is not None:
        yield coming.result()


def _demand(trace: Trace, block: Block) -> Demand:
    demand = demand_of(block.experts, block.offset, trace.num_experts)
    if demand is None:
        where = str(trace.path or "trace in memory")
        check_ids(where, int(trace.offset[block.first_step]), block.experts, trace.num_experts)  # says which
        raise MoetraceError(f"{where}: /experts changed while it was read.")
    return demand


def _batch(block: Block, demand: Demand, schedule: Schedule, with_rows: bool) -> Batch:
    steps = slice(block.first_step, block.first_step + block.steps)
    shape = block.experts.shape
    return Batch(
        first_step=block.first_step,
        rows=schedule.rows[steps],
        kv_tokens=schedule.kv_tokens[steps],
        phase=schedule.phase[steps].astype(np.int64),
        prompt_ends=schedule.prompt_ends[steps],
        demand=demand,
        offset=np.ascontiguousarray(block.offset, np.int64),
        experts=block.experts.astype(np.uint16) if with_rows else np.zeros((0, *shape[1:]), np.uint16),
        request=request_index(schedule.requests, block) if with_rows else np.zeros(0, np.int64),
        row_phase=np.ascontiguousarray(block.phase, np.uint8),
    )
