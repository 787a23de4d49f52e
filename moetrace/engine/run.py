"""One pass over a trace: blocks in, logs out; every policy of the pass sees a block while it is in the cache."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from time import thread_time
from typing import Any, TypeVar

import numpy as np

from moetrace.engine.bounds import clairvoyant_s, work_bound_s
from moetrace.engine.cluster.cluster_lane import ClusterLane, cluster_lane
from moetrace.engine.cold import ColdStarts, cold_steps
from moetrace.engine.decoded import Decoded, needs_of
from moetrace.engine.demand import Popularity, count_experts, new_popularity, without_ahead
from moetrace.engine.failure import place_of
from moetrace.engine.folding import FoldedSteps, StepStore
from moetrace.engine.foresight import Foresight, foresight_of
from moetrace.engine.in_common import InCommon, PromptBooks, Yardstick
from moetrace.engine.layer_slots import layer_slots
from moetrace.engine.lower_bound import add_to_lower_bound, room_of
from moetrace.engine.machine import Machine, MachinePart, machine_of, parts_of
from moetrace.engine.placement import place_experts
from moetrace.engine.plugin import is_users, load_hook, weighs_gates
from moetrace.engine.prefetch import COMPLETED_EVER
from moetrace.engine.recording import Recording
from moetrace.engine.replay import Batch, State, Work, new_state
from moetrace.engine.residency import EVICTED_SHARE, MOST_COUNT, empty_cache, keep_for_good
from moetrace.engine.schedule import Schedule
from moetrace.engine.setting import new_setting
from moetrace.engine.setup import Setup, check_ids_of, check_setup, weight_bytes_of
from moetrace.engine.state import LINK_IN, STEP, Log, new_log, new_steps, records
from moetrace.engine.variants import variant
from moetrace.jit.apart import Hands, may_wait, result_of
from moetrace.jit.compile import compile_now
from moetrace.spec.choices import Dispatch, Prefetch, Residency, find
from moetrace.spec.errors import MoetraceError
from moetrace.spec.model import Model
from moetrace.spec.participants import seen_by
from moetrace.spec.policy import PolicySpec, check_policy
from moetrace.spec.system import System
from moetrace.trace.format import Trace

# What is taken to be true of a user's own function.
_OWN_DISPATCH, _OWN_RESIDENCY = Dispatch(name="own", meaning=""), Residency(name="own", meaning="")
_Made = TypeVar("_Made")


@dataclass
class Lane:
    """One policy on its way through a trace, and what it recorded.

    ``clairvoyant_s``: seconds with whatever is active resident already, up to the slots; ``work_bound_s``: of any
    schedule on the parts that take part; ``lower_bound`` counts starts, the link and the slots, too, and may serve
    several lanes (timing model, section 8).
    """

    policy: PolicySpec
    machine: Machine
    parts: list[MachinePart]
    has_units: bool
    setting: Any  # SETTING [1]
    log: Log
    state: State
    foresight: Foresight | None
    hooks: tuple[Any, Any]
    work_bound: Yardstick
    lower_bound: Yardstick
    clairvoyant: Yardstick | None  # None if the dispatch ignores residency
    cold_starts: ColdStarts | None = None  # of scope "request"
    clairvoyant_s: float = 0.0
    work_bound_s: float = 0.0
    recording: Recording | None = None  # of the steps of a timeline
    folded: FoldedSteps | None = None  # instead of the log of each step
    books: PromptBooks | None = None  # then, of a policy that counts prompts: whose the prompts of the state are
    last_s: float = 0.0  # processor time that the last block took
    _first_step: int = 0  # that the log has

    def fold(self, store: StepStore, common: InCommon) -> None:
        """Keep no log of each step, but what a summary needs."""
        self.folded = FoldedSteps(store)
        if self.setting["counts_prompts"][0]:
            self.books = common.books(self.state.prompts)
            self.state = self.state._replace(prompts=None)

    def keep(self, steps: int) -> None:
        """Keep the log of each step."""
        self.log = self.log._replace(step=new_steps(steps))

    def advance(self, batch: Batch) -> None:
        """Replay a block."""
        begun_s, cells, scratch = thread_time(), self.state.cells, self.state.scratch
        if self.folded is not None:
            self.log = self.log._replace(step=records(len(batch.steps.rows), STEP))
            self._first_step = batch.steps.first
        if self.books is not None:
            self.state = self.state._replace(prompts=self.books.lend(batch.steps.first))
        try:
            for part in self._cut_where_cold(batch):
                if self.recording is None:
                    self._replay(part)
                else:
                    self._replay_and_record(part, self.recording)
            if self.clairvoyant is not None:
                cells, scratch = self.clairvoyant.kept
                self.clairvoyant.advance(batch)
        except MemoryError:
            raise
        except Exception as error:  # only a user's function can raise
            why = f"{type(error).__name__}: {error}{place_of(error, self.work(batch), cells, scratch, self.hooks)}"
            raise MoetraceError(f"Policy {self.policy.name} failed: {why}.") from error
        if self.folded is not None:
            self.folded.add(batch.steps.first, self.log.step)
            self.log = self.log._replace(step=new_steps(0))
        if self.books is not None:
            self.books.give_back(self.state.prompts)
            self.state = self.state._replace(prompts=None)
        self.last_s = thread_time() - begun_s

    def _cut_where_cold(self, batch: Batch) -> Iterator[Batch]:
        """Yield a block in the parts before which the cache is emptied, once that has been done."""
        if self.cold_starts is None:
            yield batch
            return
        for part, is_cold in self.cold_starts.parts(batch, len(self.state.cells)):
            if is_cold:
                self.cold_starts.empty(self.state, self.log)
            yield part

    def _replay(self, batch: Batch) -> None:
        variant(self.foresight is not None, False)(self.work(batch), *self.hooks, self.foresight, None)

    def _replay_and_record(self, batch: Batch, recording: Recording) -> None:
        for part, is_recorded in recording.parts(batch, len(self.state.cells)):
            if is_recorded:
                recording.record(self.work(part), self.hooks, self.foresight)
            else:
                self._replay(part)

    @property
    def lower_bound_s(self) -> float:
        """The bound that counts starts, the link and the slots; the work bound, should that be greater."""
        return max(self.lower_bound.seconds, self.work_bound_s)

    def work(self, batch: Batch) -> Work:
        """Return all that the replay of a block takes."""
        first = batch.steps.first - self._first_step
        log = self.log._replace(step=self.log.step[first : first + len(batch.steps.rows)])
        return Work(batch, self.machine, self.setting, self.state, log)

    @property
    def kernels(self) -> list[Any]:
        """What it calls."""
        found = [work_bound_s, add_to_lower_bound, variant(self.foresight is not None, False)]
        found += [clairvoyant_s] if self.clairvoyant is not None else []
        return found + ([variant(self.foresight is not None, True)] if self.recording is not None else [])

    @property
    def duration_s(self) -> np.ndarray:
        """Seconds of each step, float64 [steps]."""
        return np.ascontiguousarray(self.log.step["duration_s"]) if self.folded is None else self.folded.duration_s

    @property
    def prefetch_bytes(self) -> float:
        """What was prefetched, in all."""
        return float(np.sum(self.log.step["prefetch_bytes"])) if self.folded is None else self.folded.prefetch_bytes

    @property
    def late(self) -> int:
        """Experts that were demanded while they were fetched ahead."""
        return int(np.sum(self.log.step["late"])) if self.folded is None else self.folded.late

    def finish(self) -> None:
        """Close the books after the last block: what was prefetched and never run was wasted."""
        self.log.unit["experts"][LINK_IN] += self.state.queue.ends[COMPLETED_EVER]
        self.log.tally["wasted"] += int(self.state.cache.fresh.sum())
        if not self.has_units:  # one CPU is no tier that could be out of balance
            self.log.step["imbalance"] = np.nan
            self.log.layer["imbalance_sum"], self.log.layer["imbalance_count"] = 0.0, 0
        self.work_bound_s = self.work_bound.seconds
        if self.clairvoyant is not None:
            self.clairvoyant_s = self.clairvoyant.seconds
        elif self.folded is not None:
            self.clairvoyant_s = float(np.sum(self.folded.busy_s))
        else:
            self.clairvoyant_s = float(np.sum(self.log.step["duration_s"] - self.log.step["wait_s"]))


AnyLane = Lane | ClusterLane


@dataclass(frozen=True)
class Run:
    """A finished replay: the schedule of the trace and how popular experts were in it, and one lane a policy."""

    model: Model
    system: System
    slots: int
    schedule: Schedule
    popularity: Popularity
    lanes: list[AnyLane]
    warnings: list[str]

    @property
    def work_bound_s(self) -> float:
        """The work bound of the first policy: that of all, unless a CPU takes part in some of them only."""
        return self.lanes[0].work_bound_s


@dataclass
class _Underway:
    """One setup on its way through a trace; ``error`` ends it, but not the others."""

    setup: Setup
    slots: int
    lanes: list[AnyLane]
    warnings: list[str]
    error: MoetraceError | None = None

    def end(self, schedule: Schedule, popularity: Popularity) -> Run | MoetraceError:
        """Close the books of a setup that came through; else return why it did not."""
        if self.error is not None:
            return self.error
        model, system = self.setup.model, self.setup.system
        if (error := check_ids_of(model, popularity.rows)) is not None:
            return error
        for lane in self.lanes:
            lane.finish()
        return Run(model, system, self.slots, schedule, popularity, self.lanes, self.warnings)


def run_setups(
    trace: Trace | Decoded,
    setups: Sequence[Setup],
    *,
    jobs: int = 1,
    progress: Callable[[int], None] | None = None,
    store: StepStore | None = None,
) -> list[Run | MoetraceError]:
    """Replay a trace through any number of setups in one pass, each block decoded once.

    ``jobs`` threads work at a time; ``progress`` is told rows done. Of the steps in a setup's window each lane keeps a
    recording, which changes nothing else. With a ``store`` lanes have no log of each step: `FoldedSteps` keep what a
    summary needs. The figures do not depend on ``jobs``, nor on how the trace is cut.

    Returns, for each setup, its run or the error that it ended with: one that does not fit the trace, or whose
    function fails, costs the others nothing. A damaged trace raises MoetraceError, as it would for each of them.
    A ``Decoded`` must have been made for what the policies need.
    """
    checked = [_attempt(check_setup, _trace_of(trace), setup) for setup in setups]
    if all(isinstance(one, MoetraceError) for one in checked):
        return [one for one in checked if isinstance(one, MoetraceError)]
    if isinstance(trace, Trace):
        trace = Decoded(trace, needs_of(policy for setup in setups for policy in setup.policies))
    common = InCommon()
    begun = [
        one if isinstance(one, MoetraceError) else _attempt(_begin, trace, setup, *one, common, store)
        for setup, one in zip(setups, checked, strict=True)
    ]
    popularity = _pass(trace, [one for one in begun if isinstance(one, _Underway)], jobs, progress)
    return [one if isinstance(one, MoetraceError) else one.end(trace.schedule, popularity) for one in begun]


def _trace_of(trace: Trace | Decoded) -> Trace:
    return trace if isinstance(trace, Trace) else trace.trace


def _attempt(function: Callable[..., _Made], *arguments: Any) -> _Made | MoetraceError:
    try:
        return function(*arguments)
    except MoetraceError as error:
        return error


def _begin(
    decoded: Decoded, setup: Setup, slots: int, warnings: list[str], common: InCommon, store: StepStore | None
) -> _Underway:
    weight_bytes = weight_bytes_of(decoded.trace, setup.model)
    lanes: list[AnyLane] = []
    for policy in setup.policies:
        check_policy(policy, setup.system)
        if setup.system.cluster is not None:
            lane = cluster_lane(decoded, setup, policy, weight_bytes, common)
        else:
            lane = _lane(decoded, setup, policy, weight_bytes, slots, common)
            if setup.window is not None:
                lane.recording = Recording(setup.window.start, setup.window.stop)
        lane.keep(decoded.trace.steps) if store is None else lane.fold(store, common)
        lanes.append(lane)
    warnings = warnings + [
        f"policy {lane.policy.name}: requests overlap from first to last, so scope request empties nothing."
        for lane in lanes
        if lane.cold_starts is not None and len(lane.cold_starts.steps) == 0 and len(decoded.schedule.requests.id) > 1
    ]
    return _Underway(setup, slots, lanes, warnings)


def _pass(decoded: Decoded, underway: list[_Underway], jobs: int, progress: Callable[[int], None] | None) -> Popularity:
    """Replay every block in every lane; return how much each expert was wanted."""
    popularity = new_popularity(decoded.trace.layers, decoded.trace.num_experts)
    compile_now(*(each for one in underway for lane in one.lanes for each in lane.kernels))  # before threads want them
    # A user's function may never return: that must not keep the main thread from hearing Ctrl-C. What is built in does
    # soon, and would take a few percent longer in another thread, whose caches are cold.
    own = may_wait() and any(is_users(hook) for one in underway for lane in one.lanes for hook in lane.hooks)
    weighs = any(lane.setting["weighs"][0] for one in underway for lane in one.lanes)
    with Hands(jobs) if jobs > 1 or own else nullcontext() as pool:
        for batch, rows in decoded.batches(pool if jobs > 1 else None, weighs):
            underway = [one for one in underway if one.error is None]
            if not underway:
                break
            count_experts(without_ahead(batch.demand, len(batch.steps.rows), decoded.trace.layers), popularity)
            _each(pool, underway, batch)
            if progress is not None:
                progress(rows)
    return popularity


def _each(pool: Executor | None, underway: list[_Underway], batch: Batch) -> None:
    """Replay a block in each lane."""
    jobs: list[tuple[_Underway, Callable[[Batch], None], float]] = []  # with what each took of the block before
    bounds: set[int] = set()
    for one in underway:
        for lane in one.lanes:
            for bound in (lane.work_bound, lane.lower_bound):
                if id(bound) not in bounds:
                    bounds.add(id(bound))
                    jobs.append((one, bound.advance, 0.0))
            jobs.append((one, lane.advance, lane.last_s))
    if pool is None:
        errors = [_attempt(job, batch) for _, job, _ in jobs]
    else:
        # What took longest in the block before goes first: begun last, it would keep one thread when others are done.
        longest_first = sorted(range(len(jobs)), key=lambda i: -jobs[i][2])
        futures = {i: pool.submit(_attempt, jobs[i][1], batch) for i in longest_first}
        errors = [result_of(futures[i]) for i in range(len(jobs))]
    for (one, _, _), error in zip(jobs, errors, strict=True):
        if error is not None and one.error is None:
            one.error = error
            one.lanes = []  # and what they recorded


def _lane(
    decoded: Decoded, setup: Setup, policy: PolicySpec, weight_bytes: np.ndarray, slots: int, common: InCommon
) -> Lane:
    model, system = setup.model, seen_by(policy, setup.system)
    schedule, own = decoded.schedule, setup.hooks
    layers, experts = weight_bytes.shape
    share = policy.group_size(system.units) if system.units else 1
    groups = place_experts(policy, decoded.trace.layer_index, experts, system.units, model)
    machine = common.machine(machine_of(model, system, weight_bytes, groups, share))
    dispatch: Dispatch = find("dispatch", policy.dispatch) or _OWN_DISPATCH
    residency: Residency = find("residency", policy.residency) or _OWN_RESIDENCY
    prefetch: Prefetch = find("prefetch", policy.prefetch)
    hooks = load_hook("dispatch", policy.dispatch, own), load_hook("residency", policy.residency, own)
    setting = new_setting(
        prefetch=prefetch.rule,
        depth=policy.prefetch_depth or 0,
        waits=int(policy.prefetch_blocks),
        counts_prompts=int(residency.counts_prompts),
        learns=int(residency is _OWN_RESIDENCY or residency.hook is not None),
        looks_ahead=int(residency.next_steps),
        optimal=int(dispatch.counts_fallbacks),
        splits=int(dispatch.splits),
        own_dispatch=int(dispatch.reads_state),
        weighs=int(any(map(weighs_gates, hooks))),
        slots=slots,
        half_life=policy.half_life or 0,
        gpu_rows=policy.gpu_rows or 0,
        alpha=float(policy.alpha),
        most_count=float(policy.most_count or MOST_COUNT),
        chance=float(policy.p),
        seed=policy.seed,
    )
    pools = layers if policy.scope == "layer" and not residency.shares_slots else 1
    capacity: int | np.ndarray = slots // pools
    if policy.budget is not None:
        capacity = layer_slots(policy.budget, lambda: decoded.first_counts, slots, weight_bytes > 0)
    evicted_share = EVICTED_SHARE if policy.evicted_share is None else float(policy.evicted_share)
    cache = empty_cache(layers, experts, pools, capacity, residency.order, evicted_share)
    prompts = common.prompts(schedule.requests, residency.counts_prompts, layers * experts)
    state = new_state(machine, prompts, cache, residency.admits)
    if system.link is None:
        keep_for_good(state.cells, state.cache, np.arange(layers * experts))
    elif residency.begin is not None:
        residency.begin(policy, state, decoded)
    clairvoyant = None if dispatch.ignores_residency else common.clairvoyant(machine, setting, hooks[0])
    log = new_log(0, layers, len(state.scratch.groups))
    parts = parts_of(system, share)
    foresight = None
    if residency.foresees:
        foresight = foresight_of(policy, schedule.requests, layers, experts, decoded.trace.top_k)
    lower_bound = common.lower_bound(machine, room_of(setting[0], layers * experts), bool(cache.residents.any()))
    cold = ColdStarts(cold_steps(schedule.requests, decoded.trace.steps), state) if policy.scope == "request" else None
    yardsticks = common.work_bound(machine), lower_bound, clairvoyant
    has_units = system.ndp is not None
    return Lane(policy, machine, parts, has_units, setting, log, state, foresight, hooks, *yardsticks, cold)
